"""`tune`: from the user's own prompts and target, the settings that keep most of what the prompts are worth.

Quality is the in-context gain retained: how much of what the demonstrations bring to the gold answer, in nats a token,
is left. Where the user has no answers, the target's own greedy answers to the whole prompts are the gold ones. Shapes
that differ in kind are tried first, then one setting at a time around the best.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from terselm.compress.compressor import PromptCompressor
from terselm.compress.prompt import Prompt
from terselm.compress.settings import AnchorOrder, CompressionSettings, Order, RankBy, UnitKind, paper_settings
from terselm.data.rows import Json, dump_object, read_rows
from terselm.errors import ConfigError, ModelError
from terselm.evaluate.figures import GAIN, Figures, Figuring
from terselm.evaluate.items import Item, full_text
from terselm.evaluate.measurements import FULL, NO_BUDGET, ZERO, Measurement
from terselm.evaluate.methods import EvaluationMethod, Ours
from terselm.evaluate.report import write_results
from terselm.evaluate.run import Evaluation
from terselm.evaluate.settings import EvaluateSettings, SuiteName, SuiteSettings, TuneSettings
from terselm.evaluate.suites import load_suite
from terselm.evaluate.targets import LocalTarget
from terselm.files import atomic_file
from terselm.models import load_causal_lm
from terselm.progress import Progress

_log = logging.getLogger(__name__)
_RATES = ("0.7", "0.5", "0.35", "0.25", "0.17", "0.12", "0.08")  # tried for the smallest budget at a quality
_MIDDLE = "0.25"
_ANSWER_TOKENS = 128
_ANSWERED = "prompts.jsonl"
_NOT_TUNED = ("ablations", "cache_bytes")
_PAPER = paper_settings()
_THINNED = CompressionSettings(anchor=0.0)  # what is not question or instruction, token by token

_AROUND: dict[str, tuple[Any, ...]] = {
    "k": (1.0, 1.2, 1.5, 2.0, 3.0),
    "anchor": (0.0, 0.3, 0.5, 0.7, 1.0),
    "anchor_by": tuple(AnchorOrder),
    "unit": tuple(UnitKind),
    "segment_size": (50, 100, 200, 400),
    "question_rate": (None, _PAPER.question_rate),
    "instruction_rate": (None, _PAPER.instruction_rate),
    "rank_by": tuple(RankBy),
    "order": tuple(Order),
    "rank_delta": (0.0, 0.3),
}
_OF_RANKING = {"order", "rank_delta"}  # that differ where demonstrations are ranked
_OF_SURPRISAL = {"anchor", "anchor_by", "segment_size"}  # that differ where they are not


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What a search came to.

    Attributes:
        best: the settings.
        budget: at which, as `parse_budget` reads it.
        reached: whether the quality that was asked for is.
        figures: of all that was tried.
        table: the same in Markdown.
    """

    best: Candidate
    budget: str
    reached: bool
    figures: Sequence[Figures]
    table: str


def tune(settings: TuneSettings, folder: Path) -> Tuned:
    """Search, and write ``compress.yaml``, ``results.json``, ``table.md`` and ``quality.png`` into ``folder``.

    Raises:
        ConfigError: no usable prompts, a target that is not local, or a folder that holds another evaluation.
    """
    if settings.target.base_url:
        raise ConfigError("tune needs a local target: endpoints do not tell how likely they find a given answer")
    lm = load_causal_lm(settings.target.model, device=settings.device, dtype=settings.target.dtype)
    target = LocalTarget(lm, settings.target.chat)
    small = (
        target.lm if settings.model == settings.target.model else load_causal_lm(settings.model, device=settings.device)
    )
    search = Search(settings, folder, target, PromptCompressor(small))
    best, budget, reached = search.run()
    figures, table = search.report()
    chosen = next(one for one in figures if (one.method, one.budget) == (best.name, budget))
    _write_config(folder / "compress.yaml", best.settings, chosen, settings.model)
    if np.mean(search.nats(ZERO, NO_BUDGET)) <= np.mean(search.nats(FULL, NO_BUDGET)):
        _log.info("the demonstrations bring this target nothing: the bare question predicts the answers as well")
    if not reached:
        _log.info("no budget keeps %.0f%% of the gain; these settings keep the most", 100 * settings.quality)
    difference = chosen.against.get(GAIN)
    if difference is not None and not difference.shown:
        _log.info("with so few prompts, no difference from the default settings is shown; give more to be sure")
    return Tuned(best=best, budget=budget, reached=reached, figures=figures, table=table)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Settings under a name that says how they differ from the defaults."""

    settings: CompressionSettings

    @property
    def name(self) -> str:
        default, values = CompressionSettings(), {field: getattr(self.settings, field) for field in _AROUND}
        differences = [f"{field}={value}" for field, value in values.items() if value != getattr(default, field)]
        return f"terselm:{','.join(differences)}" if differences else "terselm"


class Search:
    """Tries settings on the user's prompts; what was tried is in a journal and is not tried again.

    Args:
        settings: of the search; its minutes begin here.
        folder: where the journal is.
        target: reads the prompts.
        compressor: shortens them.
    """

    def __init__(self, settings: TuneSettings, folder: Path, target: LocalTarget, compressor: PromptCompressor) -> None:
        self._settings = settings
        self._folder = folder
        self._target = target
        self._compressor = compressor
        self._until = time.monotonic() + 60 * settings.minutes
        self._tried: dict[str, Candidate] = {}
        self._budgets: list[str] = []
        self._ready: dict[str, EvaluationMethod] = {}
        self._measurements: dict[tuple[str, str, str], Measurement] = {}

    def run(self) -> tuple[Candidate, str, bool]:
        """The best settings, their budget, and whether the quality is reached."""
        budget = self._settings.budget or _MIDDLE
        default, *others = shapes()
        ranked = ranked_shapes([item.prompt for item in self._evaluation.items], rankers_here())
        self._try([default, *ranked, *others], budget)
        while self._time_left() and self._try(around(best := self.best(budget).settings), budget):
            if self.best(budget).settings == best:
                break
        if self._settings.budget:
            return self.best(budget), budget, True
        return self._smallest()

    def best(self, budget: str, among: Iterable[str] | None = None) -> Candidate:
        """The settings after which the gold answers are the least surprising."""
        names = [name for name in (among or self._tried) if self.nats(name, budget)]
        return self._tried[min(names, key=lambda name: float(np.mean(self.nats(name, budget))))]

    def nats(self, method: str, budget: str) -> list[float]:
        """−log p a token of each gold answer."""
        measured = [one.nats_a_token for one in self._measurements.values() if one.cell == (method, budget)]
        return [nats for nats in measured if nats is not None]

    def gain(self, method: str, budget: str) -> float:
        """The share of the gain that is left; infinite where there was none to lose."""
        zero, whole = (float(np.mean(self.nats(reference, NO_BUDGET))) for reference in (ZERO, FULL))
        left = zero - float(np.mean(self.nats(method, budget)))
        return left / (zero - whole) if zero > whole else float("inf") if left >= 0 else float("-inf")

    def report(self) -> tuple[list[Figures], str]:
        """Write what was tried; give its figures and the table."""
        compare = "terselm" if "terselm" in self._tried else ""
        settings = replace(self._evaluation.settings, methods=list(self._tried), budgets=self._budgets, compare=compare)
        figures = Figuring(settings, self._evaluation.suite, list(self._measurements.values())).all()
        return figures, write_results(self._folder, settings, self._evaluation.suite, figures)

    @cached_property
    def _evaluation(self) -> Evaluation:
        """That which all trials belong to."""
        settings = EvaluateSettings(
            suite=_suite_settings(self._settings, _with_answers(self._settings, self._folder, self._target)),
            target=self._settings.target,
            model=self._settings.model,
            seed=self._settings.seed,
        )
        return Evaluation(settings, self._folder, self._target, self._ready, progress=False)

    def _smallest(self) -> tuple[Candidate, str, bool]:
        """Down the rates with the three best settings, as long as the quality is reached."""
        ranked = sorted(self._tried, key=lambda name: float(np.mean(self.nats(name, _MIDDLE))))[:3]
        smallest: tuple[Candidate, str] | None = None
        for rate in _RATES:
            self._try([self._tried[name] for name in ranked], rate, whatever_the_time=True)
            best = self.best(rate, ranked)
            if self.gain(best.name, rate) < self._settings.quality:
                break
            smallest = best, rate
        return (*smallest, True) if smallest else (self.best(_RATES[0], ranked), _RATES[0], False)

    def _try(self, candidates: Iterable[Candidate], budget: str, *, whatever_the_time: bool = False) -> bool:
        """Measure settings; whether there were any new ones."""
        if budget not in self._budgets:
            self._budgets.append(budget)
        new = [candidate for candidate in candidates if not self.nats(candidate.name, budget)]
        with Progress(len(new), f"tuning at {budget}", "setting") as progress:
            for number, candidate in enumerate(new):
                if number and not (whatever_the_time or self._time_left()):
                    _log.info("out of time: %d settings were not tried", len(new) - number)
                    break
                self._tried[candidate.name] = candidate
                compressor = self._compressor.with_settings(candidate.settings)
                self._ready[candidate.name] = Ours(compressor=compressor, count=self._target.count)
                measured = self._evaluation.measure([candidate.name], [budget])
                self._measurements |= {one.key: one for one in measured}
                progress.update(1, candidate.name)
        return bool(new)

    def _time_left(self) -> bool:
        return time.monotonic() < self._until


def shapes() -> list[Candidate]:
    """The defaults and what differs from them in kind, the most promising first, for a search that runs out of time."""
    settings = (
        CompressionSettings(),
        replace(_THINNED, anchor=1.0),
        _THINNED,
        replace(_THINNED, anchor=0.5, unit=UnitKind.LINE),
        replace(_THINNED, unit=UnitKind.DEMONSTRATION),
        replace(_THINNED, anchor=1.0, anchor_by=AnchorOrder.LAST),
        replace(_THINNED, question_rate=_PAPER.question_rate, instruction_rate=_PAPER.instruction_rate),
        replace(_THINNED, anchor=0.5, unit=UnitKind.SENTENCE),
        replace(_THINNED, k=1.2),
        replace(_THINNED, anchor=0.7),
        replace(_THINNED, unit=UnitKind.LINE),
        replace(_THINNED, unit=UnitKind.WORD),
    )
    return [Candidate(settings=one) for one in settings]


def ranked_shapes(prompts: Sequence[Prompt], rankers: Sequence[RankBy]) -> list[Candidate]:
    """Demonstrations ranked for the question: sentences or lines of documents; worked examples whole, or their lines.

    None where a prompt has no question or no demonstrations.

    Args:
        rankers: those that are installed.
    """
    if not all(prompt.question.strip() and any(map(str.strip, prompt.demonstrations)) for prompt in prompts):
        return []
    examples = all(prompt.holds_worked_examples for prompt in prompts)
    units = (UnitKind.DEMONSTRATION, UnitKind.LINE) if examples else (UnitKind.SENTENCE, UnitKind.LINE)
    return [
        Candidate(settings=CompressionSettings(rank_by=rank_by, unit=unit)) for rank_by in rankers for unit in units
    ]


def rankers_here() -> list[RankBy]:
    """By the small LM; by MiniLM and BM25 where they are installed."""
    from terselm.models.encoder import MINILM, encoder_source

    rankers = [RankBy.QUESTION]
    try:
        encoder_source(MINILM)
        rankers.append(RankBy.EMBEDDING)
    except ModelError as error:
        _log.info("not tried: rank_by=embedding (%s)", error)
    if importlib.util.find_spec("bm25s") is not None:
        rankers.append(RankBy.BM25)
    return rankers


def around(best: CompressionSettings) -> Iterator[Candidate]:
    """All that differ from ``best`` in one setting that makes a difference there."""
    idle = {"rank_by", *({"anchor_by"} if best.anchor == 0 else ())}  # `ranked_shapes` has tried the rankers
    idle |= _OF_RANKING if best.rank_by in (RankBy.AUTO, RankBy.SURPRISAL) else _OF_SURPRISAL
    if best.anchor == 1 or best.unit is UnitKind.DEMONSTRATION:
        idle |= {"k", "segment_size"}
    for field, values in _AROUND.items():
        for value in values:
            if field not in idle and value != getattr(best, field):
                yield Candidate(settings=replace(best, **{field: value}))


def _with_answers(settings: TuneSettings, folder: Path, target: LocalTarget) -> Path:
    """A file of the prompts, each with an answer: the user's, or the target's own to the whole prompt.

    What the target answered in an earlier run is taken from the folder.

    Raises:
        ConfigError: the folder holds answers to other prompts.
    """
    suite = load_suite(_suite_settings(settings, settings.prompts))
    if all(item.gold.strip() for item in suite.items):
        return settings.prompts
    path = folder / _ANSWERED
    earlier = [row for _, row in read_rows(path)] if path.exists() else []
    rows = [row for _, row in read_rows(settings.prompts)][: len(suite.items)]
    answered = _answered(suite.items, rows, earlier, target)
    if earlier and answered != earlier:
        raise ConfigError(
            f"{folder} holds another evaluation: {_ANSWERED} in it was made from other prompts than those of "
            f"{settings.prompts}; name another folder"
        )
    if not earlier:
        with atomic_file(path) as file:
            file.writelines(dump_object(row) + "\n" for row in answered)
    return path


def _answered(items: Sequence[Item], rows: Sequence[Json], earlier: Sequence[Json], target: LocalTarget) -> list[Json]:
    """The rows with their answers, without those that the target answers with nothing.

    Args:
        items: one for each row.
        earlier: what this gave in an earlier run; the target is not asked for these answers again.
    """
    if not {_prompt_of(row) for row in earlier} <= {_prompt_of(row) for row in rows}:
        return []
    answers = {_prompt_of(row): row["answer"] for row in earlier if row not in rows}
    silent = [i for i, item in enumerate(items) if not item.gold.strip() and _prompt_of(rows[i]) not in answers]
    if silent:
        _log.info("%d prompts have no answer; the target gives its own", len(silent))
        texts = [full_text(items[i].prompt) for i in silent]
        new = target.generate(texts, max_new_tokens=_ANSWER_TOKENS, stop=("\n\n",))
        answers |= {_prompt_of(rows[i]): answer for i, answer in zip(silent, new, strict=True)}
    full = [
        row if item.gold.strip() else {**row, "answer": answers[_prompt_of(row)]}
        for item, row in zip(items, rows, strict=True)
    ]
    return [row for row in full if row["answer"].strip()]


def _prompt_of(row: Json) -> str:
    """The row without its answer."""
    return dump_object({key: value for key, value in row.items() if key != "answer"})


def _suite_settings(settings: TuneSettings, prompts: Path) -> SuiteSettings:
    return SuiteSettings(name=SuiteName.PROMPTS, data=prompts, questions=settings.questions)


def _write_config(path: Path, settings: CompressionSettings, chosen: Figures, model: str) -> None:
    """Write settings, below a line that says how they are used and what they were measured to keep."""
    option = f"--rate {chosen.budget}" if chosen.budget.startswith(("0.", ".")) else f"--budget {chosen.tokens:.0f}"
    gain = chosen.quality[GAIN]
    lines = [
        f"# terselm compress --model {model} --config {path.name} {option} --prompt prompt.json",
        f"# Kept {gain.value:.0%} of the in-context gain (95% interval {gain.low:.0%} to {gain.high:.0%}, "
        f"{chosen.items} prompts) in {chosen.tokens:.0f} tokens on average, {chosen.ratio:.1f} times fewer.",
    ]
    names = [field.name for field in fields(settings) if field.name not in _NOT_TUNED]
    lines += [f"{name}: {json.dumps(getattr(settings, name))}" for name in names]  # JSON is YAML
    with atomic_file(path) as file:
        file.write("\n".join(lines) + "\n")
