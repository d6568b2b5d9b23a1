"""Label prompts with the utility of their units: plan, ask what is not known yet, fit, write the file, sum up.

All answers and scores are committed to a ledger beside the file first, as those of `terselm.data.collection.collect`
are, so that a run that was killed goes on where it stopped, and nothing is asked twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from terselm.data.collection.answer_scores import check_window, score_locally, score_remotely
from terselm.data.collection.collect import ask, failures_of, open_ledger, still_waiting
from terselm.data.collection.label_plan import AnswerQuestion, LabelPlan, PromptToLabel, distinct, in_groups
from terselm.data.collection.ledger import Ledger, State, WithoutRecord, ledger_of
from terselm.data.collection.outcome import CollectionProgress
from terselm.data.collection.plan import asked
from terselm.data.collection.settings import CollectSettings, Options, PromptScores
from terselm.data.rows import Json, dump_object
from terselm.data.utility import LabelledPrompt, fit_utilities, read_labels, write_labels
from terselm.errors import ConfigError, DataFormatError, TargetLLMError
from terselm.files import atomic_file, lock_of
from terselm.models.chat import uses_chat
from terselm.models.process import Process, current_process

if TYPE_CHECKING:
    from terselm.models import CausalLM

_AT_ONCE = 64  # prompts whose questions are made, and of a local target begun, together
_DIGITS = 5


@dataclass(frozen=True, kw_only=True)
class LabelSummary:
    """What labelling has come to.

    Attributes:
        labels: in the file now.
        reused: of these, how many the ledger could have made before this run.
        waiting: prompts that still lack answers or scores.
        without_label: prompts that will have no label, by reason.
        tokens: that the target has read and written, over all runs.
        cost: of everything in the ledger, by the price table.
        stopped: why this run ended before everything was asked; None if it did not.
        files: what was written.
    """

    labels: int
    reused: int
    waiting: int
    without_label: Mapping[str, int]
    tokens: int
    cost: float
    stopped: str | None
    files: tuple[str, ...]


def collect_labels(
    prompts: Sequence[PromptToLabel],
    out: Path,
    settings: CollectSettings,
    options: Options | None = None,
    lm: CausalLM | None = None,
) -> LabelSummary:
    """Ask the target for all that is not known yet, and write the labels to ``out``.

    ``accelerate launch`` spreads a local target over several GPUs: each process takes its share of the prompts, and the
    last one to finish writes the file.

    Args:
        prompts: what to label, as `label_units` cuts them.
        out: the file of labels; it appears or changes at the end of the run.
        settings: whom to ask, and how.
        options: of this run; an endpoint's key, its prices, and where to stop.
        lm: a local target that is loaded already.

    Raises:
        ConfigError: a setting is wrong; ``out`` holds labels of another target, or ones that would be lost; another
            process is writing it.
        ContextLengthError: a prompt and its answer do not fit into a local model's window.
        DataFormatError: ``out`` or its ledger is damaged.
        ModelError: a local model cannot be loaded.
        TargetLLMError: there is no label at all, or the ledger cannot be written.
    """
    options = options or Options()
    process = current_process() if settings.is_local else Process()
    plan = plan_labels(prompts, out, settings, options, lm)
    with _opened(out, process, options) as ledger:
        labelling = Labelling(ledger, prompts, plan, options, process, lm)
        reused = len(labelling.labels())
        stopped = labelling.ask()
        labels, lost = labelling.labels(), labelling.without_label()
        waiting = len(prompts) - len(labels) - len(lost)
        if process.count > 1 and waiting:  # the last process writes
            files: tuple[str, ...] = ()
        else:
            files = _export(labels, lost, out)
        if not labels and process.count == 1:
            raise TargetLLMError(_why_nothing(lost, settings, stopped))
        report = ledger.report()
    return LabelSummary(
        labels=len(labels),
        reused=reused,
        waiting=waiting,
        without_label=dict(Counter(why.reason for why in lost.values())),
        tokens=report["prompt_tokens"] + report["completion_tokens"],
        cost=report["cost"],
        stopped=stopped,
        files=files,
    )


def plan_labels(
    prompts: Sequence[PromptToLabel],
    out: Path,
    settings: CollectSettings,
    options: Options,
    lm: CausalLM | None = None,
) -> LabelPlan:
    """See whether the target can be asked, and whether ``out`` may be written; say how it is asked.

    Raises:
        ConfigError: not so.
        DataFormatError: ``out`` is damaged; or two prompts have one id.
        ModelError: a local target's tokenizer cannot be loaded.
    """
    if not settings.is_local and settings.logprobs.of_texts is PromptScores.NONE:
        raise ConfigError(
            f"{settings.target} is not known to give log-probabilities of given texts, which utilities are made of; "
            "set logprobs.of_texts=prompt_logprobs (vLLM) or =echo, or take a local target"
        )
    if options.batch:
        raise ConfigError("batch interfaces do not score given texts; leave --batch out")
    twice = [name for name, count in Counter(prompt.id for prompt in prompts).items() if count > 1]
    if twice:
        raise DataFormatError("prompts to label", None, f"id {twice[0]!r} comes twice; give each prompt one of its own")
    _check_out(out, settings)
    chat = False
    if settings.is_local:
        from terselm.models import load_tokenizer

        tokenizer = load_tokenizer(settings.local_name) if lm is None else lm.tokenizer
        chat = uses_chat(tokenizer, settings.chat, settings.local_name)
    return LabelPlan(settings, chat=chat)


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
        for group in in_groups(prompts, _AT_ONCE):  # all of them, before the first is scored
            check_window(lm, [self.questions(one)[-2] for one in group], chat=chat)
        for questions in self._in_groups(prompts, waiting):
            score_locally(lm, self.ledger, questions, attempts, progress, chat=chat)

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


@contextmanager
def _opened(out: Path, process: Process, options: Options) -> Iterator[Ledger]:
    with open_ledger(out, (), process) as ledger:
        if options.retry_failed:
            ledger.retry([State.FAILED])
        yield ledger


def _check_out(out: Path, settings: CollectSettings) -> None:
    """Refuse to write over labels that this run cannot make again."""
    if not out.exists():
        return
    others = {label.target for label in read_labels(out)} - {settings.target}
    if others:
        raise ConfigError(
            f"{out} holds labels of {sorted(others)[0]!r}, and the target is {settings.target!r}; name another file, "
            "or move this one away"
        )
    if not ledger_of(out).is_file():
        raise ConfigError(
            f"{out} is there without its ledger {ledger_of(out).name}, so its labels would be lost; name another file, "
            "or move this one away"
        )


def _export(labels: Sequence[LabelledPrompt], lost: Mapping[str, WithoutRecord], out: Path) -> tuple[str, ...]:
    """Write the labels, and a list of the prompts that will have none; no file where there are none."""
    from filelock import FileLock

    files = []
    lock = lock_of(out.with_name(f"{out.name}.export"))
    with FileLock(lock):  # two processes that finish at once write the same
        if labels:
            write_labels(out, labels)
            files.append(out)
        if lost:
            with atomic_file(failures_of(out)) as file:
                for name, why in lost.items():
                    file.write(dump_object({"id": name, **asdict(why)}) + "\n")
            files.append(failures_of(out))
        else:
            failures_of(out).unlink(missing_ok=True)
    with suppress(OSError):
        lock.unlink()
    return tuple(map(str, files))


def _why_nothing(lost: Mapping[str, WithoutRecord], settings: CollectSettings, stopped: str | None) -> str:
    if stopped or not lost:
        return f"there is no label by {settings.target} yet: {stopped or 'scores are missing; run again'}"
    reasons = Counter(why.reason for why in lost.values())
    said = next((f": {why.message}" for why in lost.values() if why.message), "")
    counted = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    return f"none of the {len(lost)} prompts could be labelled by {settings.target} ({counted}{said})"
