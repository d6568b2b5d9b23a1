"""What is to be asked to label prompts: the target's own answers, and how likely answers are after what is kept.

Every question has a key that all that it is made of goes into, so that a changed prompt, answer, target or form makes
new ones, and more masks ask for nothing anew but themselves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from terselm.data.collection.ledger import Ledger
from terselm.data.collection.plan import DEFAULT_TEMPLATE, Request, plan_requests
from terselm.data.collection.settings import SLOT, Api, CollectSettings, LogProbSettings, PromptTemplate
from terselm.data.instructions import Instruction
from terselm.data.rows import Json
from terselm.data.schema import Message, Role, check_text
from terselm.data.utility import CutPrompt, Masks, draw_masks


@dataclass(frozen=True, kw_only=True)
class PromptToLabel:
    """A prompt whose units are to be labelled.

    Attributes:
        id: the label's.
        answer: what the target should say; None for what it says itself to the whole prompt.

    Raises:
        ValueError: a blank text.
    """

    id: str
    prompt: CutPrompt
    answer: str | None = None

    def __post_init__(self) -> None:
        check_text("id", self.id)
        check_text("the prompt", self.prompt.text())
        if self.answer is not None:
            check_text("answer", self.answer)

    @cached_property
    def key(self) -> str:
        """20 hex digits, equal for equal prompts, units and answers."""
        return _digest([vars(self.prompt), self.answer])


@dataclass(frozen=True, kw_only=True)
class AnswerQuestion:
    """How likely is an answer after a prompt of which some units are kept?

    Attributes:
        key: of its row in the ledger.
        label: the id of the label that it is for.
        kept: ``(m,)`` bool.
        before: the prompt as text; through a chat template, a turn of the user.
        answer: the text that follows it.
    """

    key: str
    label: str
    kept: Masks
    before: str
    answer: str

    @property
    def noted(self) -> Json:
        """What the ledger notes; the texts are those of the source, which would be many times as long."""
        return {"label": self.label, "kept": np.packbits(self.kept).tobytes().hex()}


class LabelPlan:
    """Everything that labels ask.

    Args:
        settings: whose `CollectSettings.labels` says how prompts are thinned.
        chat: whether a local target reads prompts through its chat template.

    Attributes:
        settings: those under which own answers are asked for: greedily, once, without log-probabilities.
        chat: as given.
    """

    def __init__(self, settings: CollectSettings, *, chat: bool) -> None:
        logprobs = LogProbSettings(keep=False, of_texts=settings.logprobs.of_texts)
        plain = not chat and (settings.is_local or settings.api is Api.COMPLETIONS)
        templates = settings.templates
        if plain and DEFAULT_TEMPLATE not in templates:
            templates = templates | {DEFAULT_TEMPLATE: PromptTemplate(text=SLOT)}
        self.settings = replace(settings, temperatures=[0.0], samples=1, logprobs=logprobs, templates=templates)
        self.chat = chat
        self._masks: dict[str, Masks] = {}

    def own_answers(self, prompts: Iterable[PromptToLabel]) -> dict[str, Request]:
        """By key of the prompt, the request for the target's own answer where none is given."""
        asked = [prompt for prompt in prompts if prompt.answer is None]
        ask = [Instruction(id=one.key, messages=(Message(role=Role.USER, content=one.prompt.text()),)) for one in asked]
        requests = plan_requests(ask, self.settings, chat=self.chat)
        return {one.key: request for one, request in zip(asked, requests, strict=True)}

    def answer(self, ledger: Ledger, prompt: PromptToLabel, own: dict[str, Request]) -> str | None:
        """What the target should say; None where that is not known yet."""
        if prompt.answer is not None:
            return prompt.answer
        record = ledger.record(own[prompt.key].id)
        return None if record is None else str(record["response"])

    def masks(self, prompt: PromptToLabel) -> Masks:
        """``(≤ K, m)``: the ways of thinning a prompt that its label is fitted to."""
        if prompt.key not in self._masks:
            seed = f"{self.settings.seed}/{_digest(prompt.prompt.text())}"
            self._masks[prompt.key] = draw_masks(prompt.prompt.parents, self.settings.labels.masks, seed)
        return self._masks[prompt.key]

    def questions(self, prompt: PromptToLabel, answer: str) -> list[AnswerQuestion]:
        """One for each mask, then those of the whole prompt and of none of its units."""
        size = len(prompt.prompt.units)
        every = [*self.masks(prompt), np.ones(size, bool), np.zeros(size, bool)]
        return [self._question(prompt, kept, answer) for kept in every]

    def whole(self, prompt: PromptToLabel) -> str:
        """The whole prompt, as `AnswerQuestion.before` has it."""
        return self._before(prompt.prompt.text())

    def _question(self, prompt: PromptToLabel, kept: Masks, answer: str) -> AnswerQuestion:
        before = self._before(prompt.prompt.text(kept))
        after = self._after(before, answer)
        local = self.settings.dtype if self.settings.is_local else ""
        key = _digest(["utility", self.settings.target, local, self.chat, before, after])
        return AnswerQuestion(key=key, label=prompt.id, kept=kept, before=before, answer=after)

    def _before(self, text: str) -> str:
        template = None if self.chat else self.settings.templates.get(DEFAULT_TEMPLATE)
        return text if template is None else template.text.replace(SLOT, text)

    def _after(self, before: str, answer: str) -> str:
        """The answer with the white space that should stand before it: its own, else a line end."""
        if self.chat or not before or before[-1].isspace():
            return answer.lstrip()
        return answer if answer[0].isspace() else f"\n{answer}"


def distinct(questions: Iterable[AnswerQuestion]) -> Iterator[AnswerQuestion]:
    """Each question once."""
    seen: set[str] = set()
    for question in questions:
        if question.key not in seen:
            seen.add(question.key)
            yield question


def in_groups(prompts: Sequence[PromptToLabel], size: int) -> Iterator[list[PromptToLabel]]:
    """The longest first, so that prompts of a group are alike in length."""
    ordered = sorted(prompts, key=lambda one: (-len(one.prompt.text()), one.key))
    for begin in range(0, len(ordered), size):
        yield ordered[begin : begin + size]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:20]
