"""Label prompts with the utility of their units: plan, ask what is not known yet, fit, write the file, sum up.

All answers and scores are committed to a ledger beside the file first, as those of `terselm.data.collection.collect`
are, so that a run that was killed goes on where it stopped, and nothing is asked twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from terselm.data.collection.collect import failures_of, open_ledger
from terselm.data.collection.label_plan import LabelPlan, PromptToLabel
from terselm.data.collection.labelling import Labelling
from terselm.data.collection.ledger import Ledger, State, WithoutRecord, ledger_of
from terselm.data.collection.settings import CollectSettings, Options, PromptScores
from terselm.data.rows import dump_object
from terselm.data.utility import LabelledPrompt, read_labels, write_labels
from terselm.errors import ConfigError, DataFormatError, TargetLLMError
from terselm.files import atomic_file, lock_of
from terselm.models.chat import uses_chat
from terselm.models.process import Process, current_process

if TYPE_CHECKING:
    from terselm.models import CausalLM


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
