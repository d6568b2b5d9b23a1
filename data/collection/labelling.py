"""What the ledger knows of some prompts' labels, and asking for the rest: own answers first, then scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

from terselm.data.collection.answer_scores import score_locally, score_remotely, too_long
from terselm.data.collection.collect import ask, still_waiting
from terselm.data.collection.label_plan import AnswerQuestion, LabelPlan, PromptToLabel, distinct, in_groups
from terselm.data.collection.ledger import Ledger, State, WithoutRecord
from terselm.data.collection.outcome import CollectionProgress
from terselm.data.collection.plan import asked
from terselm.data.collection.settings import Options
from terselm.data.rows import Json
from terselm.data.utility import LabelledPrompt, fit_utilities
from terselm.errors import ContextLengthError
from terselm.models.process import Process

if TYPE_CHECKING:
    from terselm.models import CausalLM

_AT_ONCE = 64  # prompts whose questions are made, and of a local target begun, together
_DIGITS = 5
_WHOLE = -2  # the question after the whole prompt, among those of `LabelPlan.questions`


class Labelling:
    """The labels of some prompts, as far as the ledger knows what they are made of.

    Args:
        process: asks its share of the prompts.
        lm: a local target that is loaded already.
    """

    def __init__(
        self,
        ledger: Ledger,
        prompts: Sequence[PromptToLabel],
        plan: LabelPlan,
        options: Options,
        process: Process | None = None,
        lm: CausalLM | None = None,
    ) -> None:
        self.ledger, self.prompts, self.plan = ledger, prompts, plan
        self.own = plan.own_answers(prompts)
        self._options = options
        self._process = process or Process()
        self._lm = lm
        self._keys: dict[str, list[str]] = {}

    def ask(self, prompts: Sequence[PromptToLabel] | None = None) -> str | None:
        """Ask for what is not known of these prompts, by default this process's share.

        Returns:
            why it stopped before all was asked; None if it did not.
        """
        share = self._process
        mine = [one for one in self.prompts if int(one.key, 16) % share.count == share.index]
        mine = mine if prompts is None else list(prompts)
        load = cache(self._load)  # loaded once, and only where it is needed
        if stopped := self._ask_own_answers(mine, load):
            return stopped
        self._note((question.key, question.noted) for one in mine for question in self.questions(one))
        if not (pending := self.pending(mine)):
            return None
        waiting = {key for keys in pending.values() for key in keys}
        some = [one for one in mine if one.key in pending]
        with CollectionProgress(len(waiting), f"Labelling with {self.plan.settings.target}", "score") as progress:
            if self.plan.settings.is_local:
                self._score_locally(load(), some, waiting, progress)
                return None
            return self._score_remotely(some, waiting, progress)

    def labels(self) -> list[LabelledPrompt]:
        """Those that the ledger can make, in the order of the prompts."""
        states = self.ledger.states()
        return [
            self._label(one, keys)
            for one in self.prompts
            if (keys := self._keys_of(one)) and all(states.get(key) is State.DONE for key in keys)
        ]

    def without_label(self) -> dict[str, WithoutRecord]:
        """By id, the prompts that will have no label unless what failed is asked again."""
        lost = self.ledger.without_record()
        found: dict[str, WithoutRecord] = {}
        for one in self.prompts:
            own = [self.own[one.key].id] if one.key in self.own else []
            if failed := [key for key in [*own, *self._keys_of(one)] if key in lost]:
                found[one.id] = lost[failed[0]]
        return found

    def pending(self, prompts: Sequence[PromptToLabel]) -> dict[str, list[str]]:
        """By key of the prompt, the keys of its questions that are still to be asked; nothing where there are none."""
        states = self.ledger.states()
        found = {one.key: [key for key in self._keys_of(one) if self._is_open(states.get(key))] for one in prompts}
        return {name: keys for name, keys in found.items() if keys}

    def questions(self, prompt: PromptToLabel) -> list[AnswerQuestion]:
        """One for each mask, that of the whole prompt, that of none; nothing as long as there is no answer."""
        answer = self.plan.answer(self.ledger, prompt, self.own)
        return [] if answer is None else self.plan.questions(prompt, answer)

    def expected_questions(self, prompt: PromptToLabel, states: Mapping[str, State]) -> list[AnswerQuestion]:
        """Those that are still to be asked; with blank answers as long as there is no answer.

        Args:
            states: of the ledger's requests.
        """
        questions = self.questions(prompt)
        if questions:
            return [question for question in questions if self._is_open(states.get(question.key))]
        own = states.get(self.own[prompt.key].id)
        return self.plan.questions(prompt, " ") if self._is_open(own) else []

    def unlabelled(self) -> list[PromptToLabel]:
        """The prompts of which something is still to be asked."""
        states = self.ledger.states()
        return [one for one in self.prompts if self.expected_questions(one, states)]

    def _ask_own_answers(self, prompts: Sequence[PromptToLabel], load: Callable[[], CausalLM]) -> str | None:
        own = list({request.id: request for one in prompts if (request := self.own.get(one.key))}.values())
        self._note((request.id, asked(request)) for request in own)
        if not (waiting := still_waiting(self.ledger, own)):
            return None
        lm = load() if self.plan.settings.is_local else None
        return ask(self.ledger, waiting, self.plan.settings, self._options, lm=lm)

    def _score_locally(
        self, lm: CausalLM, prompts: Sequence[PromptToLabel], waiting: set[str], progress: CollectionProgress
    ) -> None:
        chat, attempts = self.plan.chat, self.ledger.attempts()
        self._check_window(lm, prompts)
        for questions in self._in_groups(prompts, waiting):
            score_locally(lm, self.ledger, questions, attempts, progress, chat=chat)

    def _check_window(self, lm: CausalLM, prompts: Sequence[PromptToLabel]) -> None:
        """See that whole prompts fit, before the first is scored: longer ones would be read in parts."""
        longer: dict[str, tuple[int, int]] = {}
        for group in in_groups(prompts, _AT_ONCE):
            longer |= too_long(lm, [self.questions(one)[_WHOLE] for one in group], chat=self.plan.chat)
        if longer:
            name, (tokens, answer) = max(longer.items(), key=lambda item: item[1])
            others = f" and {len(longer) - 1} others do" if len(longer) > 1 else " does"
            raise ContextLengthError(
                f"prompt {name!r} of {tokens} tokens with an answer of {answer}{others} not fit into the window of "
                f"{lm.window} tokens of {lm.name}; shorten what is longer, or leave it out"
            )

    def _score_remotely(
        self, prompts: Sequence[PromptToLabel], waiting: set[str], progress: CollectionProgress
    ) -> str | None:
        from terselm.data.collection.remote import Remote

        remote = Remote(self.plan.settings, self._options)
        for questions in self._in_groups(prompts, waiting):
            if stopped := score_remotely(remote, self.ledger, questions, progress):
                return stopped
        return None

    def _in_groups(self, prompts: Sequence[PromptToLabel], waiting: set[str]) -> Iterator[list[AnswerQuestion]]:
        """The questions of some prompts at a time that are waiting, each once."""
        left = set(waiting)
        for group in in_groups(prompts, _AT_ONCE):
            every = distinct(question for one in group for question in self.questions(one))
            if questions := [question for question in every if question.key in left]:
                yield questions
            left.difference_update(question.key for question in questions)

    @staticmethod
    def _is_open(state: State | None) -> bool:
        """Whether a question is to be asked; None where the ledger does not know it yet."""
        return state is None or state is State.WAITING

    def _keys_of(self, prompt: PromptToLabel) -> list[str]:
        """The keys of its questions, made once: there are many, and all their texts go into them."""
        if not (keys := self._keys.get(prompt.key, [])):
            keys = self._keys[prompt.key] = [question.key for question in self.questions(prompt)]
        return keys

    def _label(self, prompt: PromptToLabel, keys: Sequence[str]) -> LabelledPrompt:
        *thinned, whole, none = (float((self.ledger.record(key) or {})["nats"]) for key in keys)
        masks = self.plan.masks(prompt)
        utility = fit_utilities(masks, thinned, self.plan.settings.labels.ridge)
        answer = self.plan.answer(self.ledger, prompt, self.own)
        assert answer is not None, prompt.id
        return LabelledPrompt(
            **vars(prompt.prompt),
            id=prompt.id,
            utility=tuple(round(value, _DIGITS) for value in utility.tolist()),
            answer=answer,
            target=self.plan.settings.target,
            masks=len(masks),
            nats_whole=round(whole, _DIGITS),
            nats_none=round(none, _DIGITS),
        )

    def _note(self, rows: Iterable[tuple[str, Json]]) -> None:
        """Note what is asked; attempts that a kill cut off are closed."""
        noted = dict(rows)
        self.ledger.add(noted.items())
        self.ledger.close_interrupted(set(noted))

    def _load(self) -> CausalLM:
        from terselm.models import load_causal_lm

        settings = self.plan.settings
        device = self._process.claim_device(settings.device)
        return self._lm or load_causal_lm(settings.local_name, device=device, dtype=settings.dtype)
