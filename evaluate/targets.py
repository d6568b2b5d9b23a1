"""What reads the prompts: a local model, an endpoint, or anything else that does the same."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

import numpy as np

from terselm.compress.counter import Count, TokenizerCounter, resolve_counter
from terselm.data.collection.collect import Options, ask, open_ledger, register
from terselm.data.collection.plan import plan_requests
from terselm.data.collection.settings import Api, CollectSettings, LimitSettings, PromptTemplate
from terselm.data.instructions import Instruction
from terselm.data.schema import Message, Role
from terselm.errors import ConfigError, ContextLengthError, TargetLLMError
from terselm.evaluate.settings import TargetSettings
from terselm.models import CausalLM

_log = logging.getLogger(__name__)
_ROWS_AT_ONCE = {"cpu": 8, "cuda": 128}  # that are decoded together
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
        can_score: whether `score` works.
    """

    count: Count
    can_score: bool

    def generate(self, prompts: Sequence[str], *, max_new_tokens: int, stop: tuple[str, ...]) -> list[str]:
        """Greedy answers."""
        ...

    def score(self, prompts: Sequence[str], golds: Sequence[str]) -> list[Score]:
        """−log p of each gold answer after its prompt."""
        ...


class LocalTarget:
    """A causal LM in this process.

    The gold answer is tokenised by itself, so that its tokens are the same after every prompt.
    """

    can_score = True

    def __init__(self, lm: CausalLM) -> None:
        self.lm = lm
        self.count: Count = TokenizerCounter(lm.tokenizer)
        self._device = lm.model.device.type

    def generate(self, prompts: Sequence[str], *, max_new_tokens: int, stop: tuple[str, ...]) -> list[str]:
        """Greedy answers.

        Raises:
            ContextLengthError: a prompt and its answer do not fit into the model's window.
        """
        from terselm.data.generate import Limits, Query, generate

        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        answers = [""] * len(prompts)
        rows = _ROWS_AT_ONCE.get(self._device, 8)
        for begin in range(0, len(order), rows):
            batch = order[begin : begin + rows]
            queries = [Query(prompt=prompts[i], temperature=0.0, seed=0, stop=stop) for i in batch]
            for i, answer in zip(batch, generate(self.lm, queries, Limits(max_new_tokens=max_new_tokens)), strict=True):
                answers[i] = answer.text
        return answers

    def score(self, prompts: Sequence[str], golds: Sequence[str]) -> list[Score]:
        """−log p of each gold answer after its prompt.

        Raises:
            ContextLengthError: the two do not fit into the model's window.
        """
        from terselm.models.scoring import score_rows

        befores, targets = self._ids(prompts), self._ids(golds)
        for before, gold in zip(befores, targets, strict=True):
            if 1 + len(before) + len(gold) > self.lm.window:
                raise ContextLengthError(
                    f"a prompt of {1 + len(before)} tokens and a gold answer of {len(gold)} do not fit into the window "
                    f"of {self.lm.window} tokens of {self.lm.name}; choose shorter prompts"
                )
        nats = [0.0] * len(befores)
        rows = [before + gold for before, gold in zip(befores, targets, strict=True)]
        for i, scores in score_rows(self.lm, rows, skips=[len(before) for before in befores]):
            nats[i] = float(scores.nats.sum(dtype=np.float64))
        return [Score(nats=value, tokens=len(gold)) for value, gold in zip(nats, targets, strict=True)]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(self.lm.tokenizer(text, add_special_tokens=False).input_ids) for text in texts]


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
        counter = resolve_counter(settings.counter)
        if counter is None:
            raise ConfigError("target.counter is empty; name the tokenizer that the endpoint's tokens are counted in")
        self.count: Count = counter

    def generate(self, prompts: Sequence[str], *, max_new_tokens: int, stop: tuple[str, ...]) -> list[str]:
        """Greedy answers; an empty one where the endpoint refuses a prompt for good.

        Raises:
            TargetLLMError: the endpoint stopped answering; what it has answered is kept.
        """
        settings = self._collection(max_new_tokens, stop)
        texts = list(dict.fromkeys(prompts))
        requests = plan_requests([_instruction(text) for text in texts], settings)
        options = Options(
            key_file=self._settings.key_file, prices=self._settings.prices, max_cost=self._settings.max_cost
        )
        with open_ledger(self._records) as ledger:
            register(ledger, requests, self._records)
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


def _instruction(text: str) -> Instruction:
    name = blake2b(text.encode(), digest_size=12).hexdigest()
    return Instruction(id=name, messages=(Message(role=Role.USER, content=text),))


def _cut(answer: str, stop: tuple[str, ...]) -> str:
    """Servers may leave the stop string in, or know fewer of them."""
    for end in stop:
        answer = answer.split(end, 1)[0]
    return answer.strip()
