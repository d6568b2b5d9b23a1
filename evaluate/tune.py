"""`tune`: from the user's own prompts and target, the settings that keep most of what the prompts are worth.

Quality is the in-context gain retained: how much of what the demonstrations bring to the gold answer, in nats a token,
is left. Where the user has no answers, the target's own greedy answers to the whole prompts are the gold ones.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from terselm.compress.compressor import PromptCompressor
from terselm.data.rows import dump_object, read_objects
from terselm.errors import ConfigError
from terselm.evaluate.candidates import Candidate, around, shapes
from terselm.evaluate.figures import GAIN, Figures, Figuring
from terselm.evaluate.items import full_text
from terselm.evaluate.ours import Ours
from terselm.evaluate.runner import FULL, ZERO, Entry, Run
from terselm.evaluate.settings import EvaluateSettings, SuiteName, SuiteSettings, TuneSettings
from terselm.evaluate.targets import LocalTarget
from terselm.files import atomic_file
from terselm.models import load_causal_lm

_log = logging.getLogger(__name__)
_RATES = ("0.7", "0.5", "0.35", "0.25", "0.17", "0.12", "0.08")  # tried for the smallest budget at a quality
_MIDDLE = "0.25"
_ANSWER_TOKENS = 128
ANSWERED = "prompts.jsonl"


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What was found.

    Attributes:
        best: the settings; budget: at which, as `parse_budget` reads it.
        reached: whether the quality that was asked for is.
        figures: of all that was tried; table: the same in Markdown.
    """

    best: Candidate
    budget: str
    reached: bool
    figures: Sequence[Figures]
    table: str


class Search:
    """Tries settings on the user's prompts; what was tried is in a journal and is not tried again."""

    def __init__(self, settings: TuneSettings, folder: Path, target: LocalTarget, compressor: PromptCompressor) -> None:
        self._settings = settings
        self._folder = folder
        self._target = target
        self._compressor = compressor
        self._tried: dict[str, Candidate] = {}
        self._budgets: list[str] = []
        self._until = time.monotonic() + 60 * settings.minutes
        self._data = self._answered()
        self._entries: list[Entry] = []

    def run(self) -> tuple[Candidate, str, bool]:
        """The best settings, their budget, and whether the quality is reached."""
        budget = self._settings.budget or _MIDDLE
        self._try(shapes(), budget)
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
        return [
            entry["nats"] / entry["gold_tokens"]
            for entry in self._entries
            if entry["method"] == method and entry["budget"] == budget
        ]

    def gain(self, method: str, budget: str) -> float:
        """The share of the gain that is left; infinite where there was none to lose."""
        zero, whole = float(np.mean(self.nats(ZERO, "-"))), float(np.mean(self.nats(FULL, "-")))
        left = zero - float(np.mean(self.nats(method, budget)))
        return left / (zero - whole) if zero > whole else float("inf") if left >= 0 else float("-inf")

    def settings(self, methods: Sequence[str]) -> EvaluateSettings:
        """Of the evaluation that all trials belong to."""
        return EvaluateSettings(
            suite=SuiteSettings(name=SuiteName.PROMPTS, data=self._data, questions=self._settings.questions),
            target=self._settings.target,
            methods=list(methods),
            budgets=list(self._budgets),
            compare="terselm" if "terselm" in methods else "",
            model=self._settings.model,
            seed=self._settings.seed,
        )

    def figures(self) -> tuple[EvaluateSettings, Run, list[Figures], list[Entry]]:
        """Of all that was tried."""
        settings = self.settings(list(self._tried))
        run = self._evaluation(settings)
        return settings, run, Figuring(settings, run.suite, self._entries).all(), self._entries

    def _smallest(self) -> tuple[Candidate, str, bool]:
        """Down the rates with the three best settings, as long as the quality is reached."""
        ranked = sorted(self._tried, key=lambda name: float(np.mean(self.nats(name, _MIDDLE))))[:3]
        found: tuple[Candidate, str] | None = None
        for rate in _RATES:
            self._try([self._tried[name] for name in ranked], rate, whatever_the_time=True)
            best = self.best(rate, ranked)
            if self.gain(best.name, rate) < self._settings.quality:
                break
            found = best, rate
        return (*found, True) if found else (self.best(_RATES[0], ranked), _RATES[0], False)

    def _try(self, candidates: Iterable[Candidate], budget: str, *, whatever_the_time: bool = False) -> bool:
        """Measure settings; whether there were any new ones."""
        if budget not in self._budgets:
            self._budgets.append(budget)
        new = [candidate for candidate in candidates if not self.nats(candidate.name, budget)]
        with tqdm(new, unit="setting", disable=None) as bar:
            for number, candidate in enumerate(bar):
                if number and not (whatever_the_time or self._time_left()):
                    _log.info("out of time: %d settings were not tried", len(new) - number)
                    break
                bar.set_postfix_str(candidate.name)
                self._tried[candidate.name] = candidate
                self._measure(candidate, budget)
        return bool(new)

    def _measure(self, candidate: Candidate, budget: str) -> None:
        settings = EvaluateSettings(**{**vars(self.settings([candidate.name])), "budgets": [budget]})
        known = {(entry["method"], entry["budget"], entry["id"]) for entry in self._entries}
        self._entries += [
            entry
            for entry in self._evaluation(settings).measure()
            if (entry["method"], entry["budget"], entry["id"]) not in known
        ]

    def _evaluation(self, settings: EvaluateSettings) -> Run:
        ready = {
            name: Ours(compressor=self._compressor.with_settings(self._tried[name].settings), count=self._target.count)
            for name in settings.methods
        }
        return Run(settings, self._folder, self._target, ready, progress=False)

    def _time_left(self) -> bool:
        return time.monotonic() < self._until

    def _answered(self) -> Path:
        """The prompts, each with an answer: the user's, or the target's own to the whole prompt."""
        source, path = self._settings.prompts, self._folder / ANSWERED
        suite = Run(
            EvaluateSettings(
                suite=SuiteSettings(name=SuiteName.PROMPTS, data=source, questions=self._settings.questions)
            ),
            self._folder,
        ).suite
        silent = [item for item in suite.items if not item.gold.strip()]
        if not silent:
            return source
        if path.exists():
            return path
        _log.info("%d prompts have no answer; the target gives its own", len(silent))
        texts = [full_text(item.prompt) for item in silent]
        answers = self._target.generate(texts, max_new_tokens=_ANSWER_TOKENS, stop=("\n\n",))
        given = {item.id: answer for item, answer in zip(silent, answers, strict=True)}
        rows = [row for _, row in read_objects(source)]
        with atomic_file(path) as file:
            for item, row in zip(suite.items, rows, strict=False):
                answer = row.get("answer") or given.get(item.id, "")
                if answer.strip():
                    file.write(dump_object({**row, "answer": answer}) + "\n")
        return path


def tune(settings: TuneSettings, folder: Path) -> Tuned:
    """Search, and write ``compress.yaml``, ``results.json``, ``table.md`` and ``quality.png`` into ``folder``.

    Raises:
        ConfigError: no usable prompts, or a target that is not local.
    """
    from terselm.evaluate.report import write_report
    from terselm.evaluate.yaml_config import write_config

    if settings.target.base_url:
        raise ConfigError("tune needs a local target: endpoints do not tell how likely they find a given answer")
    target = LocalTarget(load_causal_lm(settings.target.model, device=settings.device, dtype=settings.target.dtype))
    small = (
        target.lm if settings.model == settings.target.model else load_causal_lm(settings.model, device=settings.device)
    )
    search = Search(settings, folder, target, PromptCompressor(small))
    best, budget, reached = search.run()
    evaluation, run, figures, entries = search.figures()
    table = write_report(folder, evaluation, run.suite, entries, figures)
    chosen = next(one for one in figures if (one.method, one.budget) == (best.name, budget))
    write_config(folder / "compress.yaml", best.settings, chosen, settings.model)
    if np.mean(search.nats(ZERO, "-")) <= np.mean(search.nats(FULL, "-")):
        _log.info("the demonstrations bring this target nothing: the bare question predicts the answers as well")
    if not reached:
        _log.info("no budget keeps %.0f%% of the gain; these settings keep the most", 100 * settings.quality)
    difference = chosen.against.get(GAIN)
    if difference is not None and not difference.shown:
        _log.info("with so few prompts, no difference from the default settings is shown; give more to be sure")
    return Tuned(best=best, budget=budget, reached=reached, figures=figures, table=table)
