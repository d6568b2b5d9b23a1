"""What is to be asked: every instruction, rendered for the model, once for each temperature."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from terselm.data.instructions import Instruction
from terselm.data.schema import Message, Parameter, Role, prompt_hash, record_id
from terselm.errors import ConfigError, DataFormatError

DEFAULT_TEMPLATE = "default"
CHAT_TEMPLATE = "chat"
"""Recorded as the prompt template where the tokenizer's own chat template rendered the prompt."""
_SLOT = "{prompt}"


@dataclass(frozen=True, kw_only=True)
class PromptTemplate:
    """Plain text around a prompt, for a model that was not trained to chat.

    Raises:
        ConfigError: not exactly one ``{prompt}``, or an empty stop string.
    """

    text: str
    """Holds ``{prompt}`` once; worked examples before it show a base model what is wanted."""
    stop: list[str] = field(default_factory=list)
    """The answer ends before the first of these."""

    def __post_init__(self) -> None:
        if self.text.count(_SLOT) != 1:
            raise ConfigError(f"a template holds {_SLOT} {self.text.count(_SLOT)} times; expected once")
        if "" in self.stop:
            raise ConfigError("a stop string is empty; leave it out")


@dataclass(frozen=True, kw_only=True)
class CollectSettings:
    """Which target LLM is asked, how, and how often.

    Raises:
        ConfigError: a value is out of range.
    """

    model: str
    """What `load_causal_lm` takes: an alias, a folder, a hub id."""
    device: str = "auto"
    dtype: str = "auto"
    temperatures: list[float] = field(default_factory=lambda: [0.0])
    """One answer to each instruction for each entry; 0 is greedy. An entry may come twice."""
    top_p: float = 1.0
    """Nucleus: the least set of tokens with so much probability, in (0, 1]."""
    top_k: int = 0
    """Tokens to choose from; 0 is no limit."""
    max_new_tokens: int = 256
    seed: int = 0
    batch_size: int = 32
    """Answers generated together."""
    attempts: int = 3
    """How often a sampled answer is drawn until it is neither empty nor looping nor copied from the template."""
    templates: dict[str, PromptTemplate] = field(default_factory=dict)
    """By category of the instruction; ``default`` for all others. Where none applies, the model's chat template."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size", "attempts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1")
        if not self.temperatures or not all(0 <= t < math.inf for t in self.temperatures):
            raise ConfigError(f"temperatures is {list(self.temperatures)}; expected numbers of at least 0")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; expected a number above 0 and up to 1")
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}; expected 0 (no limit) or more")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One answer that is wanted; ``id`` will be its record's."""

    id: str
    instruction: Instruction
    template: PromptTemplate | None
    parameters: dict[str, Parameter]
    sample: int
    temperature: float
    seed: int


def plan_requests(instructions: Sequence[Instruction], settings: CollectSettings) -> list[Request]:
    """All requests, instruction by instruction, in the order of ``settings.temperatures``."""
    requests = []
    for instruction in instructions:
        default = settings.templates.get(DEFAULT_TEMPLATE)
        template = settings.templates.get(instruction.category or DEFAULT_TEMPLATE, default)
        count: Counter[float] = Counter()
        for temperature in settings.temperatures:
            requests.append(_request(instruction, template, settings, temperature, sample=count[temperature]))
            count[temperature] += 1
    return requests


def render(request: Request, tokenizer: Any) -> str:
    """The prompt as text, by its template or by the tokenizer's chat template.

    Raises:
        ConfigError: there is neither.
        DataFormatError: a plain template cannot hold a prompt with turns of the assistant or of a tool.
    """
    messages = request.instruction.messages
    if request.template is not None:
        return request.template.text.replace(_SLOT, _plain(request.instruction.id, messages))
    if getattr(tokenizer, "chat_template", None) is None:
        raise ConfigError(
            f"no template for category {request.instruction.category!r}, and the model has no chat template; "
            f"give one under templates.{DEFAULT_TEMPLATE} (data/sample/collect.yaml shows how)"
        )
    turns = [{"role": message.role.value, "content": message.content} for message in messages]
    text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    return text.removeprefix(tokenizer.bos_token or "")


def _plain(name: str, messages: Sequence[Message]) -> str:
    for message in messages:
        if message.role not in (Role.SYSTEM, Role.USER):
            raise DataFormatError(
                f"instruction {name}",
                None,
                f"a plain template cannot hold a turn of the {message.role}; use a chat model",
            )
    return "\n\n".join(message.content for message in messages)


def _request(
    instruction: Instruction,
    template: PromptTemplate | None,
    settings: CollectSettings,
    temperature: float,
    sample: int,
) -> Request:
    seed = _seed(settings.seed, prompt_hash(instruction.messages), temperature, sample)
    parameters: dict[str, Parameter] = {
        "temperature": temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k,
        "max_new_tokens": settings.max_new_tokens,
        "seed": seed,
        "dtype": settings.dtype,
        "prompt_template": template.text if template else CHAT_TEMPLATE,
        "stop": list(template.stop) if template else [],
    }
    return Request(
        id=record_id(instruction.messages, settings.model, parameters, sample),
        instruction=instruction,
        template=template,
        parameters=parameters,
        sample=sample,
        temperature=temperature,
        seed=seed,
    )


def _seed(base: int, prompt: str, temperature: float, sample: int) -> int:
    """A seed of 31 bits that no other request shares but by chance."""
    digest = hashlib.sha256(f"{base}:{prompt}:{float(temperature)}:{sample}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
