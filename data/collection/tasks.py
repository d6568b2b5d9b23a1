"""What can be asked of an endpoint: an answer, or the log-probabilities of a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from terselm.data.collection.entries import ANSWERED, Intent, Outcome, State
from terselm.data.collection.money import Price
from terselm.data.collection.plan import Request, remote_body
from terselm.data.collection.responses import parse_response
from terselm.data.collection.settings import Api, CollectSettings, PromptScores
from terselm.data.collection.sizes import PromptSizes
from terselm.data.collection.verdicts import answered
from terselm.data.schema import Message, PlainText, Role


class Task(Protocol):
    """One thing to ask, whose row in the ledger has the name ``id``."""

    @property
    def id(self) -> str: ...

    @property
    def plain(self) -> bool:
        """Through ``/completions``."""
        ...

    def body(self) -> dict[str, Any]:
        """What is sent."""
        ...

    def bounds(self, sizes: PromptSizes) -> tuple[int, int]:
        """The most tokens of the prompt, and of the completion."""
        ...

    def learn(self, sizes: PromptSizes, prompt_tokens: int) -> None:
        """Say how long the prompt really was."""
        ...

    def outcome(self, intent: Intent, raw: bytes, price: Price) -> Outcome:
        """What a response means; ValueError where it cannot be read."""
        ...


@dataclass(frozen=True, kw_only=True)
class AnswerTask:
    """An answer that is wanted."""

    request: Request
    settings: CollectSettings
    versions: dict[str, str]

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def plain(self) -> bool:
        return self.settings.api is Api.COMPLETIONS

    def body(self) -> dict[str, Any]:
        return remote_body(self.request, self.settings.api)

    def bounds(self, sizes: PromptSizes) -> tuple[int, int]:
        return sizes.bound(self.request.instruction.messages), self.settings.max_new_tokens

    def learn(self, sizes: PromptSizes, prompt_tokens: int) -> None:
        sizes.learn(self.request.instruction.messages, prompt_tokens)

    def outcome(self, intent: Intent, raw: bytes, price: Price) -> Outcome:
        response = parse_response(raw)
        return answered(self.request, intent, response, raw=raw, price=price, versions=self.versions)


@dataclass(frozen=True, kw_only=True)
class ScoreTask:
    """A text whose log-probabilities are wanted."""

    id: str
    text: PlainText
    settings: CollectSettings
    plain: bool = True

    def body(self) -> dict[str, Any]:
        top_k = self.settings.logprobs.top_k
        body: dict[str, Any] = {"model": self.settings.model, "prompt": self.text.text, **self.settings.extra_body}
        if self.settings.logprobs.of_texts is PromptScores.ECHO:
            return body | {"echo": True, "max_tokens": 0, "logprobs": max(1, top_k)}
        return body | {"prompt_logprobs": top_k, "max_tokens": 1}

    def bounds(self, sizes: PromptSizes) -> tuple[int, int]:
        return sizes.bound(self._messages()), 1

    def learn(self, sizes: PromptSizes, prompt_tokens: int) -> None:
        sizes.learn(self._messages(), prompt_tokens)

    def outcome(self, intent: Intent, raw: bytes, price: Price) -> Outcome:
        from terselm.data.collection.token_scores import text_scores

        text_scores(self.text, raw, self.settings.logprobs)  # that it can be read
        response = parse_response(raw)
        used = price.cost(response.prompt_tokens, response.completion_tokens)
        return Outcome(
            request=intent.request,
            number=intent.number,
            outcome=ANSWERED,
            raw=raw,
            prompt_tokens=response.prompt_tokens,
            completion_tokens=response.completion_tokens,
            cost=used if response.metered else intent.bound_cost,
            state=State.DONE,
        )

    def _messages(self) -> list[Message]:
        return [Message(role=Role.USER, content=self.text.text)] if self.text.text.strip() else []
