"""Running an evaluation: every method at every budget on every item, committed batch by batch.

A run that was killed goes on when it is started again: what is in its journal is not done anew.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

from terselm.compress.counter import Count, resolve_counter
from terselm.compress.prompt import Prompt
from terselm.data.journal import Journal, locked
from terselm.errors import ConfigError
from terselm.evaluate.budgets import Budget, parse_budget
from terselm.evaluate.items import Item, Suite, full_text
from terselm.evaluate.methods import OURS, READY, Compressed, Method, MethodName, parse_method
from terselm.evaluate.opening import Workshop, open_target
from terselm.evaluate.overlap import kept_words, overlap
from terselm.evaluate.settings import EvaluateSettings
from terselm.evaluate.suites import load_suite
from terselm.evaluate.targets import Target

JOURNAL = "journal.jsonl"
ZERO, FULL = "zero-shot", "full"  # the prompt without demonstrations; the whole prompt
NO_BUDGET = "-"

Entry = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One method at one budget; ``budget`` is None for the two references, which shorten nothing."""

    method: str
    budget: Budget | None

    @property
    def key(self) -> tuple[str, str]:
        return self.method, self.budget.name if self.budget is not None else NO_BUDGET


class Run:
    """One evaluation.

    Args:
        settings: of the evaluation.
        folder: where its journal is.
        target: instead of the one that the settings name.
        methods: ready methods by name, which ``settings.methods`` may name too.
        progress: whether a bar is shown, on a terminal.
    """

    def __init__(
        self,
        settings: EvaluateSettings,
        folder: Path,
        target: Target | None = None,
        methods: Mapping[str, Method] | None = None,
        *,
        progress: bool = True,
    ) -> None:
        self.settings = settings
        self.folder = folder
        self._ready = methods or {}
        self._no_bar = None if progress else True  # None: no bar where there is no terminal
        self.methods = [
            MethodName(text=text, kind=READY) if text in self._ready else parse_method(text)
            for text in settings.methods
        ]
        self.budgets = [parse_budget(text) for text in settings.budgets]
        self.suite: Suite = load_suite(settings.suite)
        self.items = sorted(self.suite.items, key=lambda item: item.group)
        self._target = target
        self._count: Count = resolve_counter(settings.counter or None) or _no_counter

    def measure(self) -> list[Entry]:
        """Measure what is not in the journal yet; give all entries.

        Raises:
            ConfigError: the folder holds another evaluation, or another process is at work in it.
        """
        path = self.folder / JOURNAL
        with locked(path), Journal(path) as journal:
            done = self._done(journal)
            cells = [cell for cell in self._cells() if self._missing(cell, done)]
            if cells:
                self._work(cells, done, journal)
            wanted = {cell.key for cell in self._cells()}
            return [entry for entry in journal.entries if (entry.get("method"), entry.get("budget")) in wanted]

    def _cells(self) -> list[Cell]:
        references = [Cell(method=ZERO, budget=None), Cell(method=FULL, budget=None)]
        return (references if self.settings.references else []) + [
            Cell(method=method.text, budget=budget) for method in self.methods for budget in self.budgets
        ]

    def _done(self, journal: Journal) -> set[tuple[str, str, str]]:
        entries = journal.entries
        print_now = self._fingerprint()
        if not entries:
            journal.append([{"evaluation": print_now}])
        elif entries[0].get("evaluation") != print_now:
            raise ConfigError(
                f"{self.folder} holds another evaluation (other questions, target or measures); name another folder"
            )
        return {(entry["method"], entry["budget"], entry["id"]) for entry in entries if "method" in entry}

    def _missing(self, cell: Cell, done: set[tuple[str, str, str]]) -> list[Item]:
        return [item for item in self.items if (*cell.key, item.id) not in done]

    def _batches(self, cell: Cell, done: set[tuple[str, str, str]]) -> Iterator[Sequence[Item]]:
        """The first item of every group before all others, so that what is read of shared demonstrations is known."""
        missing = self._missing(cell, done)
        firsts = list({item.group: item for item in reversed(missing)}.values())
        leaders = {item.id for item in firsts}
        for items in (firsts, [item for item in missing if item.id not in leaders]):
            for begin in range(0, len(items), self.settings.batch):
                yield items[begin : begin + self.settings.batch]

    def _work(self, cells: Sequence[Cell], done: set[tuple[str, str, str]], journal: Journal) -> None:
        from tqdm import tqdm

        target = self._target or open_target(self.settings.target, self.folder)
        if self.settings.score and not target.can_score:
            raise ConfigError("this target does not give log-probabilities; set score=false and generate=true")
        if not self.settings.counter:
            self._count = target.count
        workshop = Workshop(self.settings, target, self._count, self._ready)
        bar = tqdm(total=sum(len(self._missing(cell, done)) for cell in cells), unit="prompt", disable=self._no_bar)
        with bar:
            for name in [None, *self.methods]:
                mine = [cell for cell in cells if cell.method == name.text] if name else cells_without_budget(cells)
                if not mine:
                    continue
                for entries in self._run_method(name, mine, workshop, target, done):
                    journal.append(entries)
                    bar.set_postfix_str(mine[0].method)
                    bar.update(len(entries))

    def _run_method(
        self,
        name: MethodName | None,
        cells: Sequence[Cell],
        workshop: Workshop,
        target: Target,
        done: set[tuple[str, str, str]],
    ) -> Iterator[list[Entry]]:
        if name is None:
            for cell in cells:
                for items in self._batches(cell, done):
                    prompts = [item.bare if cell.method == ZERO else item.prompt for item in items]
                    yield self._measure(cell, items, [Compressed(text=full_text(p)) for p in prompts], 0.0, target)
            return
        oracle = workshop.oracle(name) if self.settings.oracle and name.kind == OURS else None
        with workshop.method(name) as method:
            for cell in cells:
                for items in self._batches(cell, done):
                    yield self._shorten_and_measure(cell, items, method, oracle, target)

    def _shorten_and_measure(
        self, cell: Cell, items: Sequence[Item], method: Method, oracle: Method | None, target: Target
    ) -> list[Entry]:
        assert cell.budget is not None
        prompts: list[Prompt] = [item.prompt for item in items]
        budgets = [cell.budget.of(item, self._count) for item in items]
        began = time.perf_counter()
        shortened = method.compress(prompts, budgets)
        seconds = (time.perf_counter() - began) / len(items)
        entries = self._measure(cell, items, shortened, seconds, target)
        for entry, allowed in zip(entries, budgets, strict=True):
            entry["allowed"] = allowed
        if oracle is not None:
            theirs = oracle.compress(prompts, budgets)
            for entry, a, b in zip(entries, shortened, theirs, strict=True):
                entry["overlap"] = overlap(kept_words(a), kept_words(b))
        return entries

    def _measure(
        self, cell: Cell, items: Sequence[Item], shortened: Sequence[Compressed], seconds: float, target: Target
    ) -> list[Entry]:
        texts = [one.text for one in shortened]
        entries: list[Entry] = [
            {
                "method": cell.key[0],
                "budget": cell.key[1],
                "id": item.id,
                "tokens": self._count(text),
                "whole_tokens": self._count(full_text(item.prompt)),
                "compressor_seconds": round(seconds, 6),
                "text": text,
            }
            for item, text in zip(items, texts, strict=True)
        ]
        if self.settings.score:
            scored = [i for i, item in enumerate(items) if item.gold]
            scores = target.score([texts[i] for i in scored], [items[i].gold for i in scored])
            for i, score in zip(scored, scores, strict=True):
                entries[i] |= {"nats": score.nats, "gold_tokens": score.tokens}
        if self.settings.generate:
            began = time.perf_counter()
            answers = target.generate(texts, max_new_tokens=self.suite.max_new_tokens, stop=self.suite.stop)
            spent = (time.perf_counter() - began) / len(items)
            for entry, item, answer in zip(entries, items, answers, strict=True):
                entry |= {"answer": answer, "target_seconds": round(spent, 6)}
                if self.suite.right is not None and item.answers:
                    entry["right"] = self.suite.right(answer, item)
        if self.suite.kept is not None:
            for entry, item in zip(entries, items, strict=True):
                entry["answer_kept"] = self.suite.kept(entry["text"], item)
        return entries

    def _fingerprint(self) -> str:
        """Of what must not change under a journal: the questions, the target, and what is measured."""
        settings = self.settings
        digest = blake2b(digest_size=16)
        told = [
            settings.target.model,
            settings.target.base_url,
            settings.target.dtype,
            settings.model,
            settings.dtype,
            settings.counter,
        ]
        told += [str(flag) for flag in (settings.score, settings.generate, settings.oracle, settings.seed)]
        for item in self.items:
            told += [item.id, item.gold, full_text(item.prompt, "\x1f"), *item.answers]
        for text in told:
            digest.update(text.encode() + b"\x00")
        return digest.hexdigest()


def cells_without_budget(cells: Sequence[Cell]) -> list[Cell]:
    """The references."""
    return [cell for cell in cells if cell.budget is None]


def _no_counter(text: str) -> int:
    raise AssertionError("tokens are counted before there is a target")
