"""Stage 2: iterative token-level prompt compression (docs/algorithm.md, §2).

The choices for one prompt, segment by segment. It asks for surprisals and knows nothing of models, so that an engine
can advance many prompts together.

Source: Algorithm 2, Eq. 5–7 of arXiv:2310.05736.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from terselm.compress.layout import Floats32, Layout, Mask
from terselm.errors import ContextLengthError

if TYPE_CHECKING:
    from terselm.statistics import Floats, Ints


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Neighbouring units that are scored together. Units are numbered as in the `Layout`."""

    units: Ints
    part: int


@dataclass(frozen=True, kw_only=True)
class ScoreRequest:
    """What the model has to read next for one prompt.

    Attributes:
        restart: forget all that was read before.
        prefix: all that stands before the segment, without BOS; read: how many of these tokens the model has read.
        segment: tokens to score after the prefix.
    """

    restart: bool
    prefix: Ints
    read: int
    segment: Ints


class IterativeCompression:
    """Stage 2 of one prompt.

    After each `request`, hand the surprisals of its segment to `receive`; when `request` gives None, `kept`,
    `margin`, `segment_of` and `surprisal` (all ``(n_units,)``) are final, as are `tokens_read`, the tokens that the
    model has read, and `tokens_cached`, those whose surprisals came from elsewhere.

    Args:
        parts: the units that take part, by part (instruction, demonstrations, question), in source order.
        budgets: free tokens to keep in each part.
        segment_size: tokens in a segment.
        window: the model's window, tokens.
        one_pass: drop nothing before a part has been scored to its end (an ablation).
        next_token: score each token by the surprisal of the one after it (an ablation).
        weights: ``(n_units,)``, whole numbers in proportion to which a part's budget is spread over its tokens; evenly
            where there are none.
    """

    def __init__(
        self,
        layout: Layout,
        parts: Sequence[Ints],
        budgets: Sequence[int],
        *,
        segment_size: int,
        window: int,
        one_pass: bool = False,
        next_token: bool = False,
        weights: Ints | None = None,
    ) -> None:
        self._layout = layout
        self._parts = parts
        self._budgets = budgets
        self._window = window
        self._one_pass = one_pass
        self._next_token = next_token
        self._segments = [
            Segment(units=units, part=number)
            for number, part in enumerate(parts)
            for units in _cut_segments(part, layout.cost, segment_size)
        ]
        self._weighted = layout.cost if weights is None else layout.cost * weights
        free = np.where(layout.protected, 0, self._weighted)
        self._free = [int(free[part].sum()) for part in parts]
        self._seen = [0] * len(parts)
        self._spent = [0] * len(parts)
        self._next = 0
        self._last: int | None = None  # piece of the last kept unit
        self._prefix: Ints = np.zeros(0, dtype=np.int64)  # kept so far, without BOS
        self._read = 0  # tokens of the prefix that the model has read
        self._restart = False
        self._scored: Mask = np.zeros(0, dtype=bool)
        size = len(layout)
        self.tokens_read = 0
        self.tokens_cached = 0
        self.kept: Mask = np.zeros(size, dtype=bool)
        self.margin: Floats = np.full(size, np.nan)
        self.surprisal: Floats = np.full(size, np.nan)
        self.segment_of: Ints = np.full(size, -1, dtype=np.int64)

    @property
    def longest(self) -> int:
        """An upper bound on the tokens that the model will have to hold at once, BOS and separators included."""
        units = sum(len(segment.units) for segment in self._segments)
        tokens = sum(int(self._layout.cost[segment.units].sum()) for segment in self._segments)
        return 1 + tokens + min(units, len(self._layout.pieces)) * len(self._layout.separator_ids)

    @property
    def has_free_units(self) -> bool:
        """Whether there is anything to choose."""
        return any(not self._layout.protected[part].all() for part in self._parts)

    def request(self) -> ScoreRequest | None:
        """The next segment to score, or None at the end.

        Raises:
            ContextLengthError: the segment alone does not fit into the model's window.
        """
        if self._next == len(self._segments):
            return None
        tokens, self._scored = self._join(self._segments[self._next].units)
        room = self._window - 1 - len(tokens)
        if room < 0:
            raise ContextLengthError(
                f"a segment of {len(tokens)} tokens does not fit into the model's window of {self._window}; "
                "choose a smaller segment_size or unit"
            )
        if len(self._prefix) > room:
            self._prefix = self._prefix[len(self._prefix) - min(self._window // 2, room) :]
            self.forget()
        return ScoreRequest(restart=self._restart, prefix=self._prefix, read=self._read, segment=tokens)

    def forget(self) -> None:
        """Have the model read the prefix anew: its cache is gone."""
        self._read = 0
        self._restart = True

    def receive(self, surprisals: Floats32, *, from_model: bool = True) -> None:
        """Choose among the units of the segment just scored.

        Args:
            surprisals: one per token of the request, nats.
            from_model: whether the model has read the request's prefix to answer it.
        """
        if from_model:
            self.tokens_read += len(self._prefix) - self._read + len(surprisals)
            self._read = len(self._prefix)
            self._restart = False
        else:
            self.tokens_cached += len(surprisals)
        if self._next_token:
            surprisals = np.append(surprisals[1:], surprisals[-1])
        segment = self._segments[self._next]
        cost = self._layout.cost[segment.units]
        self.surprisal[segment.units] = np.add.reduceat(
            surprisals[self._scored].astype(np.float64), np.cumsum(cost) - cost
        )
        self.segment_of[segment.units] = self._next
        self._next += 1
        if not self._one_pass:
            self._settle(segment.part, segment.units)
            self._grow(segment.units[self.kept[segment.units]])
            return
        self._grow(segment.units)
        if self._next == len(self._segments) or self._segments[self._next].part != segment.part:
            self._settle(segment.part, self._parts[segment.part])

    def _settle(self, part: int, units: Ints) -> None:
        """Choose among neighbouring units that have been scored."""
        score = self.surprisal[units] / self._layout.cost[units]
        free = np.flatnonzero(~self._layout.protected[units])
        self._seen[part] += int(self._weighted[units[free]].sum())
        chosen = free[self._choose(part, score[free], self._layout.cost[units[free]])]
        self.kept[units] = self._layout.protected[units]
        self.kept[units[chosen]] = True
        if len(free):
            threshold = score[chosen].min() if len(chosen) else score[free].max()
            self.margin[units[free]] = score[free] - threshold

    def _choose(self, part: int, score: Floats, cost: Ints) -> Ints:
        """Indices of the most surprising units that fit into n_j tokens (ties: the earlier first)."""
        if not len(score) or not self._free[part]:
            return np.zeros(0, dtype=np.int64)
        room = self._budgets[part] * self._seen[part] // self._free[part] - self._spent[part]
        order = np.argsort(-score, kind="stable")
        spent = np.cumsum(cost[order])
        count = int(np.searchsorted(spent, room, side="right"))
        self._spent[part] += int(spent[count - 1]) if count else 0
        return order[:count]

    def _grow(self, units: Ints) -> None:
        if len(units):
            self._prefix = np.concatenate([self._prefix, self._join(units)[0]])
            self._last = int(self._layout.piece_of[units[-1]])

    def _join(self, units: Ints) -> tuple[Ints, Mask]:
        """The tokens of ``units`` with separators between pieces, and which of them belong to units."""
        layout = self._layout
        pieces = layout.piece_of[units]
        cuts = np.flatnonzero(np.diff(pieces)) + 1
        tokens: list[Ints] = []
        own: list[Mask] = []
        last = self._last
        for run in np.split(units, cuts):
            piece = int(layout.piece_of[run[0]])
            if last is not None and piece != last:
                tokens.append(layout.separator_ids)
                own.append(np.zeros(len(layout.separator_ids), dtype=bool))
            tokens.append(_tokens_of(layout, run))
            own.append(np.ones(len(tokens[-1]), dtype=bool))
            last = piece
        return np.concatenate(tokens), np.concatenate(own)


def _tokens_of(layout: Layout, units: Ints) -> Ints:
    if units[-1] - units[0] + 1 == len(units):  # neighbours
        return layout.ids[layout.first[units[0]] : layout.first[units[-1] + 1]]
    if (layout.cost[units] == 1).all():
        return layout.ids[layout.first[units]]
    return np.concatenate([layout.ids[layout.first[u] : layout.first[u + 1]] for u in units])


def _cut_segments(units: Ints, cost: Ints, size: int) -> Iterator[Ints]:
    """Runs of units of at most ``size`` tokens; a wider unit is a run of its own."""
    ends = np.cumsum(cost[units])
    begin = 0
    while begin < len(units):
        spent = ends[begin - 1] if begin else 0
        end = max(begin + 1, int(np.searchsorted(ends, spent + size, side="right")))
        yield units[begin:end]
        begin = end
