"""What is to be asked: every instruction, once for each temperature and sample, and the parameters of each request."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from terselm.data.collection.settings import SLOT, Api, CollectSettings, PromptTemplate
from terselm.data.formats import message_to_object, messages_of
from terselm.data.instructions import Instruction
from terselm.data.rows import Json
from terselm.data.schema import Message, Parameter, Role, prompt_hash, record_id
from terselm.errors import ConfigError, DataFormatError
from terselm.models.chat import ChatMode, chat_prompt, chat_text

DEFAULT_TEMPLATE = "default"
CHAT_TEMPLATE = "chat"
"""Recorded as the prompt template where the tokenizer's own chat template rendered the prompt."""
_CHAT = "chat"
"""The parameter of requests that are asked through the chat template, exactly as it renders them."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One answer that is wanted; ``id`` will be its record's."""

    id: str
    model: str
    instruction: Instruction
    template: PromptTemplate | None
    parameters: dict[str, Parameter]
    sample: int
    temperature: float
    seed: int

    @property
    def chat(self) -> bool:
        """Whether a local target reads it exactly as its chat template renders it."""
        return self.parameters.get(_CHAT) is True


def plan_requests(
    instructions: Sequence[Instruction], settings: CollectSettings, *, chat: bool = False
) -> list[Request]:
    """All requests, instruction by instruction, in the order of ``settings.temperatures``.

    Args:
        chat: a local target is asked through its chat template, which makes other requests; else by the plain template
            of each category, or where none applies as collections were before there was this choice: through the chat
            template, but after the start token of plain text.

    Raises:
        ConfigError: two requests are the same, since what tells them apart is not sent; a category has no plain
            template, and there is no other way.
    """
    requests = []
    for instruction in instructions:
        count: Counter[float] = Counter()
        samples = [(t, settings.samples if t > 0 else 1) for t in settings.temperatures]
        for temperature in (t for t, times in samples for _ in range(times)):
            requests.append(_request(instruction, settings, temperature, sample=count[temperature], chat=chat))
            count[temperature] += 1
    if len({request.id for request in requests}) < len({(r.id, r.temperature, r.sample) for r in requests}):
        raise ConfigError("temperature is omitted, so several temperatures ask the same; give one, and samples")
    if settings.is_local and settings.chat == ChatMode.NEVER:
        for request in requests:
            if request.template is None:
                raise ConfigError(
                    f"no template for category {request.instruction.category!r}, and chat is 'never'; give one under "
                    f"templates.{DEFAULT_TEMPLATE}, or choose chat=auto"
                )
    return requests


def remote_body(request: Request, api: Api) -> dict[str, Any]:
    """What an endpoint is sent.

    Raises:
        ConfigError: the interface is plain completions, and no template makes text of the messages.
        DataFormatError: a plain template cannot hold a prompt with turns of the assistant or of a tool.
    """
    sent = {name: value for name, value in request.parameters.items() if name not in ("prompt_template", "extra_body")}
    extra = json.loads(str(request.parameters.get("extra_body", "{}")))
    body: dict[str, Any] = {"model": request.model, **sent, **extra}
    if api is Api.COMPLETIONS:
        return body | {"prompt": prompt_text(request, None)}
    return body | {"messages": [message_to_object(message) for message in request.instruction.messages]}


def asked(request: Request) -> Json:
    """What the ledger notes of a request: all that its id is made of, and whose it is."""
    return {
        "instruction": request.instruction.id,
        "category": request.instruction.category,
        "messages": [message_to_object(message) for message in request.instruction.messages],
        "model": request.model,
        "parameters": request.parameters,
        "sample": request.sample,
    }


def recall(name: str, noted: Json) -> Request:
    """The request that `asked` noted in a ledger."""
    parameters = noted["parameters"]
    text = parameters.get("prompt_template", CHAT_TEMPLATE)
    template = None if text == CHAT_TEMPLATE else PromptTemplate(text=text, stop=parameters.get("stop", []))
    return Request(
        id=name,
        model=noted["model"],
        instruction=Instruction(
            id=noted["instruction"], messages=messages_of(noted["messages"]), category=noted["category"]
        ),
        template=template,
        parameters=parameters,
        sample=noted["sample"],
        temperature=parameters.get("temperature", 0.0),
        seed=parameters.get("seed", 0),
    )


def local_prompt(request: Request, tokenizer: Any) -> str | tuple[int, ...]:
    """What a local target reads: token ids as the chat template has them, start token included; or text after it.

    Raises:
        ConfigError, DataFormatError: as `prompt_text`.
        ModelError: the chat template refuses the messages.
    """
    if not request.chat:
        return prompt_text(request, tokenizer)
    return tuple(chat_prompt(tokenizer, _turns(request.instruction.messages)))


def prompt_text(request: Request, tokenizer: Any) -> str:
    """The prompt as text, by its template or by the tokenizer's chat template.

    Raises:
        ConfigError: there is neither.
        DataFormatError: a plain template cannot hold a prompt with turns of the assistant or of a tool.
    """
    messages = request.instruction.messages
    if request.template is not None:
        return request.template.text.replace(SLOT, _plain(request.instruction.id, messages))
    if getattr(tokenizer, "chat_template", None) is None:
        raise ConfigError(
            f"no template for category {request.instruction.category!r}, and the model has no chat template; "
            f"give one under templates.{DEFAULT_TEMPLATE} (data/sample/collect.yaml shows how)"
        )
    text = chat_text(tokenizer, _turns(messages))
    return text.removeprefix(tokenizer.bos_token or "")


def _turns(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role.value, "content": message.content} for message in messages]


def _plain(name: str, messages: Sequence[Message]) -> str:
    for message in messages:
        if message.role not in (Role.SYSTEM, Role.USER):
            fault = f"a plain template cannot hold a turn of the {message.role}; use a chat model"
            raise DataFormatError(f"instruction {name}", None, fault)
    return "\n\n".join(message.content for message in messages)


def _request(
    instruction: Instruction, settings: CollectSettings, temperature: float, *, sample: int, chat: bool
) -> Request:
    default = settings.templates.get(DEFAULT_TEMPLATE)
    template = None if chat else settings.templates.get(instruction.category or DEFAULT_TEMPLATE, default)
    key = f"{settings.seed}:{prompt_hash(instruction.messages)}:{float(temperature)}:{sample}"
    # 31 bits, a seed that no other request shares but by chance
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") >> 1
    make = _local_parameters if settings.is_local else _remote_parameters
    parameters = make(settings, template, temperature, seed) | ({_CHAT: True} if chat else {})
    return Request(
        id=record_id(instruction.messages, settings.target, parameters, sample),
        model=settings.target,
        instruction=instruction,
        template=template,
        parameters=parameters,
        sample=sample,
        temperature=temperature,
        seed=seed,
    )


def _local_parameters(
    settings: CollectSettings, template: PromptTemplate | None, temperature: float, seed: int
) -> dict[str, Parameter]:
    return {
        "temperature": temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k,
        "max_new_tokens": settings.max_new_tokens,
        "seed": seed,
        "dtype": settings.dtype,
        "prompt_template": template.text if template else CHAT_TEMPLATE,
        "stop": list(template.stop) if template else [],
    }


def _remote_parameters(
    settings: CollectSettings, template: PromptTemplate | None, temperature: float, seed: int
) -> dict[str, Parameter]:
    """As the endpoint is sent them; those that it does not know everywhere only where they are asked for."""
    usual = {"temperature": temperature, "top_p": settings.top_p, "max_tokens": settings.max_new_tokens, "seed": seed}
    parameters: dict[str, Parameter] = {name: value for name, value in usual.items() if name not in settings.omit}
    if settings.top_k:
        parameters["top_k"] = settings.top_k
    if settings.logprobs.keep and settings.api is Api.CHAT:
        parameters |= {"logprobs": True, "top_logprobs": settings.logprobs.top_k}
    elif settings.logprobs.keep:
        parameters["logprobs"] = max(1, settings.logprobs.top_k)
    if template is not None:
        parameters["prompt_template"] = template.text
        if template.stop:
            parameters["stop"] = list(template.stop)
    if settings.extra_body:
        parameters["extra_body"] = json.dumps(settings.extra_body, sort_keys=True)
    return parameters
