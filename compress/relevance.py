"""What demonstrations are worth for the question of their prompt, and their sentences, lines, words or tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from terselm.compress.context import in_context, says_something
from terselm.compress.layout import Layout
from terselm.compress.prompt import Part
from terselm.compress.ranking import LONGEST_QUESTION, Ranker, Ranking, make_ranker
from terselm.compress.selection import standardised
from terselm.compress.settings import CompressionSettings, RankBy
from terselm.compress.utility import longest_question, question_before, utility_windows
from terselm.statistics import Floats, Ints

if TYPE_CHECKING:
    from terselm.compress.engine.reader import ScoreReader


@dataclass(frozen=True, kw_only=True)
class UnitScores:
    """What the units of one prompt are worth.

    Attributes:
        scores: ``(n_units,)``, the higher the better; NaN where none was asked for.
        parents: ``(n_units,)``, the unit that each belongs to, −1 for none.
        tokens_read, tokens_cached: see `Ranking`.
    """

    scores: Floats
    parents: Ints
    tokens_read: int = 0
    tokens_cached: int = 0


@dataclass(frozen=True, kw_only=True)
class UtilityScores:
    """What a utility head says of all units of the demonstrations of one prompt, read in one pass.

    Attributes:
        units: by number of the demonstration, ``(n_units,)``, the higher the better.
        demonstrations: by number, the score of its best unit; brackets and white space do not count where there is
            more.
        tokens_read, tokens_cached: see `Ranking`.
    """

    units: dict[int, Floats]
    demonstrations: dict[int, float]
    tokens_read: int
    tokens_cached: int

    def of(self, layout: Layout, pieces: Sequence[int]) -> UnitScores:
        """The scores of the units of some pieces, cut as they were scored; they have been charged already."""
        shown, _, parents = _shown(layout, pieces)
        known = np.full(len(layout), np.nan)
        for n in pieces:
            known[layout.edges[n] : layout.edges[n + 1]] = self.units[layout.pieces[n].index]
        scores = np.full(len(layout), np.nan)
        scores[shown] = known[shown]
        return UnitScores(scores=scores, parents=parents)


class Relevance:
    """Ranks for questions, or by use, under one set of settings.

    Args:
        tokenise: texts into tokens of the small LM.
        reader: has the small LM read.
    """

    def __init__(
        self, settings: CompressionSettings, tokenise: Callable[[Sequence[str]], list[Ints]], reader: ScoreReader
    ) -> None:
        self._settings = settings
        self._tokenise = tokenise
        self._reader = reader

    def of_demonstrations(self, asked: Sequence[tuple[str, Layout]]) -> list[tuple[dict[int, float], Ranking]]:
        """The demonstrations of each prompt: scores by number of the demonstration."""
        pieces = [[layout.pieces[n] for n in layout.numbers(Part.DEMONSTRATION)] for _, layout in asked]
        texts = [(question, [piece.text for piece in some]) for (question, _), some in zip(asked, pieces, strict=True)]
        rankings = self._ranker.rank(texts, whole=True)
        return [
            ({piece.index: score for piece, score in zip(some, ranking.scores.tolist(), strict=True)}, ranking)
            for some, ranking in zip(pieces, rankings, strict=True)
        ]

    def of_units(self, asked: Sequence[tuple[str, Layout, Sequence[int], dict[int, float]]]) -> list[UnitScores]:
        """Sentences or lines, as they read after what they belong to, together with their demonstrations.

        The score is the standardised score of the unit plus the standardised score of its demonstration. Units of
        nothing but brackets and white space have none.

        Args:
            asked: question, layout, numbers of the pieces whose units are scored, scores of demonstrations by number.
        """
        shown = [_shown(layout, pieces) for _, layout, pieces, _ in asked]
        texts = [(question, some) for (question, *_), (_, some, _) in zip(asked, shown, strict=True)]
        scored = []
        for (_, layout, _, whole), (units, _, parents), ranking in zip(
            asked, shown, self._ranker.rank(texts, whole=False), strict=True
        ):
            scores = np.full(len(layout), np.nan)
            mine = [whole.get(layout.pieces[n].index, 0.0) for n in layout.piece_of[units]]
            scores[units] = standardised(ranking.scores) + standardised(np.array(mine))
            scored.append(
                UnitScores(
                    scores=scores,
                    parents=parents,
                    tokens_read=ranking.tokens_read,
                    tokens_cached=ranking.tokens_cached,
                )
            )
        return scored

    def by_utility(self, asked: Sequence[tuple[str, Layout]]) -> list[UtilityScores]:
        """All demonstrations of each prompt and their units, by the small LM's utility head.

        Args:
            asked: question, which may be empty, and layout, whose demonstrations are cut into sentences or lines.

        Raises:
            ContextLengthError: a question that leaves less than half of the model's window.
        """
        questions = self._tokenise([question_before(question) for question, _ in asked])
        if self._settings.rank_by is RankBy.AUTO:
            longest = min(LONGEST_QUESTION, longest_question(self._reader.window))
            questions = [ids[max(0, len(ids) - longest) :] for ids in questions]
        windows = [
            utility_windows(ids, *_with_ends(layout), layout.separator_ids, self._reader.window)
            for ids, (_, layout) in zip(questions, asked, strict=True)
        ]
        reading = self._reader.read_units([window for some in windows for window in some])
        scores, counts = iter(reading.scores), iter(reading.counts)
        utilities = []
        for some, (_, layout) in zip(windows, asked, strict=True):
            values = np.zeros(len(layout.units_of(layout.numbers(Part.DEMONSTRATION))))
            read = np.zeros(2, dtype=np.int64)
            for window in some:
                values[window.units] = next(scores)
                read += next(counts)
            utilities.append(_utility_scores(layout, values, read))
        return utilities

    def contrast(self, asked: Sequence[tuple[str, Layout, Sequence[int]]]) -> list[UnitScores]:
        """log p(x | question, before) − log p(x | before), the mean over a unit's tokens.

        A demonstration that does not fit into the window after the question is read in pieces.

        Args:
            asked: question, layout, numbers of the pieces whose units are scored.

        Source: Eq. 4 of arXiv:2310.06839.
        """
        questions = self._tokenise([f"{question}{layout.separator}" for question, layout, _ in asked])
        pairs: list[tuple[Ints, Ints]] = []
        owners: list[int] = []
        for number, (ids, (_, layout, pieces)) in enumerate(zip(questions, asked, strict=True)):
            room = max(1, self._reader.window - 1 - len(ids))
            ids = ids[-(self._reader.window // 2) :] if room == 1 else ids
            for tokens in (layout.piece_ids(n) for n in pieces):
                pairs += [(ids, tokens[begin : begin + room]) for begin in range(0, len(tokens), room)]
            owners += [number] * (len(pairs) - len(owners))
        alone = self._reader.read_alone([text for _, text in pairs])
        after = self._reader.read_after(pairs)
        gains: list[list[Floats]] = [[] for _ in asked]
        read = np.zeros((len(asked), 2), dtype=np.int64)
        for number, before, given, *counts in zip(
            owners, alone.nats, after.nats, alone.counts, after.counts, strict=True
        ):
            gains[number].append(before.astype(np.float64) - given)
            read[number] += np.sum(counts, axis=0)
        return [
            _per_unit(layout, pieces, np.concatenate(some), counts)
            for (_, layout, pieces), some, counts in zip(asked, gains, read, strict=True)
        ]

    @cached_property
    def _ranker(self) -> Ranker:
        return make_ranker(self._settings.rank_by, self._settings.ranker, self._tokenise, self._reader)


def _with_ends(layout: Layout) -> tuple[list[Ints], list[Ints]]:
    """The tokens of each demonstration, and the places in them of the last token of each of its units."""
    numbers = layout.numbers(Part.DEMONSTRATION)
    firsts = [layout.first[layout.edges[n] : layout.edges[n + 1] + 1] for n in numbers]
    return [layout.piece_ids(n) for n in numbers], [first[1:] - first[0] - 1 for first in firsts]


def _utility_scores(layout: Layout, values: Floats, counts: Ints) -> UtilityScores:
    """``values``: of the units of all demonstrations, one demonstration after the other."""
    units, best = {}, {}
    begin = 0
    for n in layout.numbers(Part.DEMONSTRATION):
        piece, cut = layout.pieces[n], slice(layout.edges[n], layout.edges[n + 1])
        mine = values[begin : begin + cut.stop - cut.start]
        begin += len(mine)
        spans = zip(layout.starts[cut].tolist(), layout.ends[cut].tolist(), strict=True)
        speaks = np.array([says_something(piece.text[start:end]) for start, end in spans])
        units[piece.index] = mine
        best[piece.index] = float(mine[speaks].max() if speaks.any() else mine.max())
    read, known = counts.tolist()
    return UtilityScores(units=units, demonstrations=best, tokens_read=read, tokens_cached=known)


def _shown(layout: Layout, pieces: Sequence[int]) -> tuple[Ints, list[str], Ints]:
    """The units of some pieces that say something, how each reads, and ``(n_units,)`` what each belongs to."""
    parents = np.full(len(layout), -1, dtype=np.int64)
    units: list[int] = []
    texts: list[str] = []
    for n in pieces:
        first, end = int(layout.edges[n]), int(layout.edges[n + 1])
        text = layout.pieces[n].text
        cut = [text[a:b] for a, b in zip(layout.starts[first:end], layout.ends[first:end], strict=True)]
        for offset, seen in enumerate(in_context(text, cut)):
            if seen.says_something:
                units.append(first + offset)
                texts.append(seen.text)
            if seen.parent is not None:
                parents[first + offset] = first + seen.parent
    return np.array(units, dtype=np.int64), texts, parents


def _per_unit(layout: Layout, pieces: Sequence[int], gains: Floats, counts: Ints) -> UnitScores:
    """Means over the tokens of each unit. ``gains``: of the tokens of the pieces, one piece after the other."""
    scores = np.full(len(layout), np.nan)
    units = layout.units_of(pieces)
    cost = layout.cost[units]
    scores[units] = np.add.reduceat(gains, np.cumsum(cost) - cost) / cost
    return UnitScores(
        scores=scores,
        parents=np.full(len(layout), -1, dtype=np.int64),
        tokens_read=int(counts[0]),
        tokens_cached=int(counts[1]),
    )
