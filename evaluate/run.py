"""Running an evaluation: every method at every budget on every item, committed batch by batch.

A run that was killed goes on when it is started again: what is in its journal is not done anew.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from itertools import groupby
from pathlib import Path
from typing import Any

from terselm.compress.length import resolve_counter
from terselm.data.journal import Journal
from terselm.errors import ConfigError
from terselm.evaluate.answers import squad_exact, squad_f1
from terselm.evaluate.figures import Figures, Figuring
from terselm.evaluate.items import Item, Suite, full_text
from terselm.evaluate.measurements import FULL, JOURNAL, NO_BUDGET, ZERO, Measurement
from terselm.evaluate.methods import EvaluationMethod, kept_words, overlap
from terselm.evaluate.opening import OURS, READY, MethodName, Workshop, open_target, parse_method
from terselm.evaluate.report import write_results
from terselm.evaluate.settings import EvaluateSettings, EvaluationBudget, parse_budget
from terselm.evaluate.suites import load_suite
from terselm.evaluate.targets import Score, Target
from terselm.files import locked
from terselm.progress import Progress


def evaluate(
    settings: EvaluateSettings,
    folder: Path,
    target: Target | None = None,
    methods: Mapping[str, EvaluationMethod] | None = None,
) -> tuple[list[Figures], str]:
    """Evaluate into ``folder``: a journal, ``results.json``, ``table.md``, ``quality.png``.

    Args:
        target: instead of the one that the settings name.
        methods: your own methods by name, which ``settings.methods`` may name too.

    Returns:
        the figures and the Markdown table.
    """
    evaluation = Evaluation(settings, folder, target, methods)
    measurements = evaluation.measure()
    figures = Figuring(settings, evaluation.suite, measurements).all()
    return figures, write_results(folder, settings, evaluation.suite, figures)


@dataclass(frozen=True, kw_only=True)
class _Cell:
    """One method at one budget; or a reference, which shortens nothing and has neither name nor budget."""

    method: str
    name: MethodName | None = None
    budget: EvaluationBudget | None = None

    @property
    def key(self) -> tuple[str, str]:
        return self.method, self.budget.name if self.budget is not None else NO_BUDGET


class Evaluation:
    """One evaluation. Its data is read, and its models are loaded, when they are first needed.

    Args:
        settings: of the evaluation.
        folder: where its journal is.
        target: instead of the one that the settings name.
        methods: ready methods by name, which ``settings.methods`` may name too.
        progress: whether progress is shown.

    Raises:
        ConfigError: an unknown method or budget.
    """

    def __init__(
        self,
        settings: EvaluateSettings,
        folder: Path,
        target: Target | None = None,
        methods: Mapping[str, EvaluationMethod] | None = None,
        *,
        progress: bool = True,
    ) -> None:
        self.settings = settings
        self.folder = folder
        self._target = target
        self._ready = methods if methods is not None else {}
        self._progress = progress
        self._cells = self._cells_of(settings.methods, settings.budgets)

    @cached_property
    def suite(self) -> Suite:
        """The questions."""
        return load_suite(self.settings.suite)

    @cached_property
    def items(self) -> list[Item]:
        """The questions, group by group."""
        return sorted(self.suite.items, key=lambda item: item.group)

    def measure(self, methods: Sequence[str] = (), budgets: Sequence[str] = ()) -> list[Measurement]:
        """Measure what is not in the journal yet; give all of it.

        Args:
            methods: instead of those that the settings name.
            budgets: instead of those that the settings name; both or neither.

        Raises:
            ConfigError: the folder holds another evaluation, or another process is at work in it.
        """
        cells = self._cells_of(methods, budgets) if methods else self._cells
        path = self.folder / JOURNAL
        with locked(path), Journal(path) as journal:
            measurements = self._committed(journal)
            done = {one.key for one in measurements}
            missing = [(cell, [item for item in self.items if (*cell.key, item.id) not in done]) for cell in cells]
            left = [(cell, items) for cell, items in missing if items]
            for batch in self._measure_missing(left, any(one.chat for one in measurements) if measurements else None):
                journal.append(one.to_json() for one in batch)
                measurements += batch
        keys = {cell.key for cell in cells}
        return [one for one in measurements if one.cell in keys]

    def _cells_of(self, methods: Sequence[str], budgets: Sequence[str]) -> list[_Cell]:
        names = [MethodName(text=text, kind=READY) if text in self._ready else parse_method(text) for text in methods]
        lengths = [parse_budget(text) for text in budgets]
        references = [_Cell(method=ZERO), _Cell(method=FULL)] if self.settings.references else []
        return references + [_Cell(method=name.text, name=name, budget=length) for name in names for length in lengths]

    def _committed(self, journal: Journal) -> list[Measurement]:
        entries, fingerprint = journal.entries, self._fingerprint()
        if not entries:
            journal.append([{"evaluation": fingerprint}])
        elif entries[0].get("evaluation") != fingerprint:
            raise ConfigError(
                f"{self.folder} holds another evaluation (other questions, target or measures); name another folder"
            )
        return [Measurement.from_json(entry) for entry in entries if "method" in entry]

    def _fingerprint(self) -> str:
        """Of what must not change under a journal: the questions, the target, and what is measured."""
        settings, target = self.settings, self.settings.target
        facts = [target.model, target.base_url, target.dtype, settings.model, settings.dtype, settings.counter]
        facts += [str(flag) for flag in (settings.score, settings.generate, settings.oracle, settings.seed)]
        for item in self.items:
            facts += [item.id, item.gold, full_text(item.prompt, "\x1f"), *item.answers]
        digest = blake2b(digest_size=16)
        for fact in facts:
            digest.update(fact.encode() + b"\x00")
        return digest.hexdigest()

    def _measure_missing(
        self, missing: Sequence[tuple[_Cell, Sequence[Item]]], earlier_chat: bool | None
    ) -> Iterator[list[Measurement]]:
        """``earlier_chat``: whether what is in the journal was read as chats; None for an empty one."""
        if not missing:
            return
        target = self._target or open_target(self.settings.target, self.folder)
        if earlier_chat is not None and earlier_chat != getattr(target, "chat", False):
            before, mode = ("in its chat template", "always") if earlier_chat else ("as plain text", "never")
            raise ConfigError(
                f"{self.folder} holds an evaluation whose target read prompts {before}; set target.chat={mode} to go "
                "on with it, or name another folder"
            )
        if self.settings.score and not target.can_score:
            raise ConfigError("this target does not give log-probabilities; set score=false and generate=true")
        bench = _Bench(self.settings, self.suite, target, self._ready)
        total = sum(len(items) for _, items in missing)
        with Progress(total, "evaluating", "prompt") if self._progress else nullcontext() as bar:
            for batch in bench.measure(missing):
                yield batch
                if bar is not None:
                    bar.update(len(batch), f"{batch[0].method} at {batch[0].budget}")


class _Bench:
    """Where prompts are shortened and read."""

    def __init__(
        self, settings: EvaluateSettings, suite: Suite, target: Target, ready: Mapping[str, EvaluationMethod]
    ) -> None:
        self._settings = settings
        self._suite = suite
        self._target = target
        self._count = resolve_counter(settings.counter or None) or target.count
        self._workshop = Workshop(settings, target, self._count, ready)

    def measure(self, missing: Sequence[tuple[_Cell, Sequence[Item]]]) -> Iterator[list[Measurement]]:
        """Batch by batch; the cells of a method stand together, so that it is opened once."""
        for name, cells in groupby(missing, key=lambda pair: pair[0].name):
            if name is None:
                for cell, left in cells:
                    for items in self._batches(left):
                        prompts = [item.bare if cell.method == ZERO else item.prompt for item in items]
                        yield self._read(cell, items, [full_text(prompt) for prompt in prompts])
                continue
            oracle = self._workshop.oracle(name) if self._settings.oracle and name.kind == OURS else None
            with self._workshop.method(name) as method:
                for cell, left in cells:
                    for items in self._batches(left):
                        yield self._shorten_and_read(cell, items, method, oracle)

    def _batches(self, items: Sequence[Item]) -> Iterator[Sequence[Item]]:
        """The first item of every group before all others, so that what is read of shared demonstrations is known."""
        firsts = list({item.group: item for item in reversed(items)}.values())
        leaders = {item.id for item in firsts}
        for part in (firsts, [item for item in items if item.id not in leaders]):
            for begin in range(0, len(part), self._settings.batch):
                yield part[begin : begin + self._settings.batch]

    def _shorten_and_read(
        self, cell: _Cell, items: Sequence[Item], method: EvaluationMethod, oracle: EvaluationMethod | None
    ) -> list[Measurement]:
        assert cell.budget is not None
        prompts = [item.prompt for item in items]
        budgets = [cell.budget.of(item, self._count) for item in items]
        began = time.perf_counter()
        shortened = method.compress(prompts, budgets)
        seconds = round((time.perf_counter() - began) / len(items), 6)
        measured = self._read(cell, items, [one.text for one in shortened])
        overlaps: Iterable[float | None] = [None] * len(items)
        if oracle is not None:
            pairs = zip(shortened, oracle.compress(prompts, budgets), strict=True)
            overlaps = (overlap(kept_words(a), kept_words(b)) for a, b in pairs)
        return [
            replace(one, compressor_seconds=seconds, allowed=budget, overlap=share)
            for one, budget, share in zip(measured, budgets, overlaps, strict=True)
        ]

    def _read(self, cell: _Cell, items: Sequence[Item], texts: Sequence[str]) -> list[Measurement]:
        scores = self._scores(items, texts)
        answers, seconds = self._answers(texts)
        kept, (method, budget) = self._suite.kept, cell.key
        return [
            Measurement(
                method=method,
                budget=budget,
                id=item.id,
                tokens=self._count(text),
                whole_tokens=self._count(full_text(item.prompt)),
                compressor_seconds=0.0,
                text=text,
                nats=score.nats if score is not None else None,
                gold_tokens=score.tokens if score is not None else None,
                answer=answer,
                target_seconds=seconds,
                answer_kept=kept(text, item) if kept is not None else None,
                chat=True if getattr(self._target, "chat", False) else None,
                **self._judged(answer, item),
            )
            for item, text, score, answer in zip(items, texts, scores, answers, strict=True)
        ]

    def _judged(self, answer: str | None, item: Item) -> dict[str, Any]:
        """How right an answer is, by the names of `Measurement`."""
        if answer is None or not item.answers:
            return {}
        right = self._suite.right
        judged: dict[str, Any] = {} if right is None else {"right": right(answer, item)}
        if self._suite.short:
            judged |= {"exact": squad_exact(answer, item.answers), "f1": squad_f1(answer, item.answers)}
        return judged

    def _scores(self, items: Sequence[Item], texts: Sequence[str]) -> list[Score | None]:
        """Of the gold answers; None where there is none."""
        if not self._settings.score:
            return [None] * len(items)
        places = [i for i, item in enumerate(items) if item.gold]
        scores = self._target.score([texts[i] for i in places], [items[i].gold for i in places])
        by_place = dict(zip(places, scores, strict=True))
        return [by_place.get(i) for i in range(len(items))]

    def _answers(self, texts: Sequence[str]) -> tuple[Sequence[str | None], float | None]:
        """The target's answers, and the seconds of one."""
        if not self._settings.generate:
            return [None] * len(texts), None
        began = time.perf_counter()
        answers = self._target.generate(texts, max_new_tokens=self._suite.max_new_tokens, stop=self._suite.stop)
        return answers, round((time.perf_counter() - began) / len(texts), 6)
