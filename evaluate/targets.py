"""What reads the prompts: a local model, an endpoint, or anything else that does the same."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from terselm.compress.length import Count, TokenizerCounter, resolve_counter
from terselm.data.collection.collect import ask, open_run
from terselm.data.collection.plan import plan_requests
from terselm.data.collection.settings import Api, CollectSettings, LimitSettings, Options, PromptTemplate
from terselm.data.instructions import Instruction
from terselm.data.schema import Message, Role
from terselm.errors import ConfigError, ContextLengthError, TargetLLMError
from terselm.evaluate.settings import TargetSettings
from terselm.models import CausalLM
from terselm.models.chat import ChatMode, chat_prompt, uses_chat

if TYPE_CHECKING:
    from terselm.data.generate import Query
    from terselm.models.scoring import RowScorer

_log = logging.getLogger(__name__)
_ROWS_AT_ONCE = 8  # that are decoded together on a CPU; a GPU takes all and refills its slots
_WHOLE_PROMPT = "{prompt}"  # the template of an endpoint that takes plain text


@dataclass(frozen=True, kw_only=True)
class Score:
    """−log p of a gold answer after a prompt, in nats, summed over its ``tokens``."""

    nats: float
    tokens: int


class Target(Protocol):
    """A model that reads prompts.

    Attributes:
        count: tokens of a text, as this target counts them.
        chat: whether prompts are turns of a user, after which answers are whole: no stop string cuts them.
        can_score: whether `score` works.
    """

    count: Count
    chat: bool
    can_score: bool

    def generate(self, prompts: Sequence[str], *, max_new_tokens: int, stop: tuple[str, ...]) -> list[str]:
        """Greedy answers."""

    def score(self, prompts: Sequence[str], golds: Sequence[str]) -> list[Score]:
        """−log p of each gold answer after its prompt."""


class LocalTarget:
    """A causal LM in this process.

    The gold answer is tokenised by itself, so that its tokens are the same after every prompt.

    Args:
        lm: the model.
        chat: whether it reads prompts through its chat template.

    Raises:
        ConfigError: ``always``, and the model has no chat template.
    """

    can_score = True

    def __init__(self, lm: CausalLM, chat: ChatMode | str = ChatMode.AUTO) -> None:
        self.lm = lm
        self.chat = uses_chat(lm.tokenizer, chat, lm.name)
        self.count: Count = TokenizerCounter(lm.tokenizer)
        self._scorers: dict[int, RowScorer] = {}

    def generate(self, prompts: Sequence[str], *, max_new_tokens: int, stop: tuple[str, ...]) -> list[str]:
        """Greedy answers; in a chat, whole ones.

        Raises:
            ContextLengthError: a prompt and its answer do not fit into the model's window.
            ModelError: the memory is too small for a single prompt; or the chat template refuses it.
        """
        from terselm.data.generate import Limits, generate
        from terselm.models.memory import in_halves, text_too_large

        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        queries = [self._query(prompts[i], stop) for i in order]
        limits = Limits(max_new_tokens=max_new_tokens)
        rows = _ROWS_AT_ONCE if self.lm.model.device.type == "cpu" else max(1, len(order))
        texts: list[str] = []
        for begin in range(0, len(order), rows):
            answers = in_halves(
                lambda some: generate(self.lm, some, limits),
                queries[begin : begin + rows],
                lambda query: text_too_large(self.lm, len(query.prompt) + max_new_tokens),
            )
            texts += [answer.text for answer in answers]
        return [text for _, text in sorted(zip(order, texts, strict=True))]

    def score(self, prompts: Sequence[str], golds: Sequence[str]) -> list[Score]:
        """−log p of each gold answer after its prompt; in a chat, without the white space that it begins with.

        Raises:
            ContextLengthError: the two do not fit into the model's window.
            ModelError: the chat template refuses a prompt.
        """
        befores = [self._ids(prompt) for prompt in prompts]
        targets = [self._plain_ids(gold.lstrip() or gold if self.chat else gold) for gold in golds]
        for before, gold in zip(befores, targets, strict=True):
            if len(before) + len(gold) > self.lm.window:
                raise ContextLengthError(
                    f"a prompt of {len(before)} tokens and a gold answer of {len(gold)} do not fit into the window "
                    f"of {self.lm.window} tokens of {self.lm.name}; choose shorter prompts"
                )
        nats = dict.fromkeys(range(len(prompts)), 0.0)
        for first in sorted({before[0] for before in befores}):
            numbers = [i for i, before in enumerate(befores) if before[0] == first]
            rows = [[*befores[i][1:], *targets[i]] for i in numbers]
            for row, scores in self._scorer(first).score(rows, skips=[len(befores[i]) - 1 for i in numbers]):
                nats[numbers[row]] = float(scores.nats.sum(dtype=np.float64))
        return [Score(nats=nats[i], tokens=len(gold)) for i, gold in enumerate(targets)]

    def _query(self, prompt: str, stop: tuple[str, ...]) -> Query:
        from terselm.data.generate import Query

        read = tuple(chat_prompt(self.lm.tokenizer, prompt)) if self.chat else prompt
        return Query(prompt=read, temperature=0.0, seed=0, stop=() if self.chat else stop)

    def _ids(self, prompt: str) -> list[int]:
        """As the model reads a prompt: after the start token, or as the chat template has it."""
        if self.chat:
            return chat_prompt(self.lm.tokenizer, prompt)
        return [self.lm.start_id, *self._plain_ids(prompt)]

    def _plain_ids(self, text: str) -> list[int]:
        return list(self.lm.tokenizer(text, add_special_tokens=False).input_ids)

    def _scorer(self, first: int) -> RowScorer:
        """Reads rows after this token: a chat template may open with another than plain text."""
        from terselm.models.scoring import RowScorer

        if first not in self._scorers:
            self._scorers[first] = RowScorer(replace(self.lm, first_id=first))
        return self._scorers[first]


class EndpointTarget:
    """An OpenAI-compatible endpoint, asked through the collection's ledger: no answer is asked for twice.

    The ledger lies beside ``records``.

    Raises:
        ConfigError: the endpoint's settings are wrong, or the counter is unknown.
    """

    can_score = False

    def __init__(self, settings: TargetSettings, records: Path) -> None:
        self._settings = settings
        self._records = settings.ledger or records
        self.chat = ChatMode(settings.chat) is ChatMode.ALWAYS
        counter = resolve_counter(settings.counter)
        if counter is None:
            raise ConfigError("target.counter is empty; name the tokenizer that the endpoint's tokens are counted in")
        self.count: Count = counter

    def generate(self, prompts: Sequence[str], *, max_new_tokens: int, stop: tuple[str, ...]) -> list[str]:
        """Greedy answers; an empty one where the endpoint refuses a prompt for good.

        Raises:
            TargetLLMError: the endpoint stopped answering; what it has answered is kept.
        """
        stop = () if self.chat else stop
        settings = self._collection(max_new_tokens, stop)
        texts = list(dict.fromkeys(prompts))
        names = [blake2b(text.encode(), digest_size=12).hexdigest() for text in texts]
        instructions = [
            Instruction(id=name, messages=(Message(role=Role.USER, content=text),))
            for name, text in zip(names, texts, strict=True)
        ]
        requests = plan_requests(instructions, settings)
        options = Options(
            key_file=self._settings.key_file, prices=self._settings.prices, max_cost=self._settings.max_cost
        )
        with open_run(self._records, requests) as ledger:
            stopped = ask(ledger, requests, settings, options)
            if stopped:
                raise TargetLLMError(f"{settings.target} has not answered all prompts: {stopped}; run again to go on")
            records = [ledger.record(request.id) for request in requests]
        if refused := sum(record is None for record in records):
            _log.warning("%d of %d prompts have no answer; they count as wrong", refused, len(records))
        answers = {
            text: _cut(record["response"] if record else "", stop) for text, record in zip(texts, records, strict=True)
        }
        return [answers[text] for text in prompts]

    def score(self, prompts: Sequence[str], golds: Sequence[str]) -> list[Score]:
        """Endpoints do not tell.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("an endpoint does not tell how likely a given answer is; set score=false and generate=true")

    def _collection(self, max_new_tokens: int, stop: tuple[str, ...]) -> CollectSettings:
        """Greedy, with the stop strings that the interface takes (at most four)."""
        plain = Api(self._settings.api) is Api.COMPLETIONS
        sent = list(stop)[:4]
        return CollectSettings(
            endpoint=self._settings.base_url,
            model=self._settings.model,
            api=Api(self._settings.api),
            max_new_tokens=max_new_tokens,
            limits=LimitSettings(concurrency=self._settings.concurrency),
            templates={"default": PromptTemplate(text=_WHOLE_PROMPT, stop=sent)} if plain else {},
            extra_body={"stop": sent} if sent and not plain else {},
        )


def _cut(answer: str, stop: tuple[str, ...]) -> str:
    """Servers may leave the stop string in, or know fewer of them."""
    for end in stop:
        answer = answer.split(end, 1)[0]
    return answer.strip()
