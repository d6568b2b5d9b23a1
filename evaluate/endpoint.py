"""An OpenAI-compatible endpoint as a target, through the collection's ledger: no answer is asked for twice."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

from terselm.compress.counter import Count, resolve_counter
from terselm.data.collection.collect import ask, open_run
from terselm.data.collection.plan import plan_requests
from terselm.data.collection.settings import Api, CollectSettings, LimitSettings, Options, PromptTemplate
from terselm.data.instructions import Instruction
from terselm.data.schema import Message, Role
from terselm.errors import ConfigError, TargetLLMError
from terselm.evaluate.settings import TargetSettings
from terselm.evaluate.targets import Score

_log = logging.getLogger(__name__)
_SLOT = "{prompt}"


class EndpointTarget:
    """Asks an endpoint, and keeps what it answers in a ledger beside ``records``.

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
            templates={"default": PromptTemplate(text=_SLOT, stop=sent)} if plain else {},
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
