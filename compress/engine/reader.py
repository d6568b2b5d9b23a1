"""Has the small LM read what the stages ask for: each thing once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from terselm.compress.engine.surprisal import SurprisalEngine
from terselm.compress.itpc import IterativeCompression, ScoreRequest
from terselm.compress.layout import Floats32, Layout
from terselm.compress.prompt import Part
from terselm.errors import ModelError
from terselm.models.memory import in_halves, text_too_large

if TYPE_CHECKING:
    import torch

    from terselm.compress.utility import UtilityWindow
    from terselm.statistics import Ints

Item = TypeVar("Item")

_NOTHING = np.zeros(0, dtype=np.int64)
_UTILITY = b"utility"
_ENTRY = 200  # bytes that a key and its place in the table take


@dataclass(kw_only=True)
class Reading:
    """The demonstrations of one prompt, each read by itself.

    Attributes:
        surprisals: by number of the demonstration, ``(n_tokens,)`` float32, nats.
        tokens_read: tokens that the model read for it; tokens_cached: those that were known.
    """

    surprisals: dict[int, Floats32]
    tokens_read: int = 0
    tokens_cached: int = 0


@dataclass(frozen=True, kw_only=True)
class ReadingAfter:
    """Texts, each read after another.

    Attributes:
        nats: of each, ``(n_tokens,)`` float32, its surprisals.
        counts: of each, tokens that the model read for it, what stands before included, and tokens that were known.
    """

    nats: list[Floats32]
    counts: list[tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class UnitReading:
    """Windows whose units the utility head has scored.

    Attributes:
        scores: of each, ``(n_units,)`` float32, the higher the better.
        counts: of each, tokens that the model read for it, and tokens that were known.
    """

    scores: list[Floats32]
    counts: list[tuple[int, int]]


class ScoreReader:
    """Answers from the cache what was read before, and has the engine read the rest.

    Args:
        cache_bytes: bound on the memory that surprisals of earlier prompts may take.
    """

    def __init__(self, engine: SurprisalEngine, cache_bytes: int) -> None:
        self._engine = engine
        self._cache = ScoreCache(cache_bytes)

    def read_demonstrations(self, layouts: Sequence[Layout]) -> list[Reading]:
        """Surprisals of all demonstrations of these prompts, each by itself; each distinct text once."""
        texts = [
            [
                (layout.pieces[n].index, layout.pieces[n].text, layout.piece_ids(n))
                for n in layout.numbers(Part.DEMONSTRATION)
            ]
            for layout in layouts
        ]
        ids_of = {text: ids for prompt in texts for _, text, ids in prompt}
        keys = {text: ScoreCache.key(_NOTHING, ids) for text, ids in ids_of.items()}
        known = {text: values for text, key in keys.items() if (values := self._cache.get(key)) is not None}
        unread = [text for text in ids_of if text not in known]
        for text, values in zip(unread, self._engine.score_texts([ids_of[text] for text in unread]), strict=True):
            known[text] = values
            self._cache.put(keys[text], values)
        new = set(unread)
        readings = []
        for prompt in texts:
            reading = Reading(surprisals={index: known[text] for index, text, _ in prompt})
            for _, text, ids in prompt:
                if text in new:
                    reading.tokens_read += 1 + len(ids)
                    new.discard(text)
                else:
                    reading.tokens_cached += len(ids)
            readings.append(reading)
        return readings

    @property
    def window(self) -> int:
        return self._engine.window

    @property
    def device(self) -> torch.device:
        return self._engine.device

    def read_alone(self, texts: Sequence[Ints]) -> ReadingAfter:
        """Surprisals of texts that each stand alone; one longer than the window is read in pieces."""
        return self._read(
            [(_NOTHING, text) for text in texts], lambda pairs: self._engine.score_texts([b for _, b in pairs])
        )

    def read_after(self, pairs: Sequence[tuple[Ints, Ints]]) -> ReadingAfter:
        """Surprisals of the second text of each pair after the first; both together fit into the window."""
        return self._read(pairs, self._engine.score_after)

    def read_units(self, windows: Sequence[UtilityWindow]) -> UnitReading:
        """Scores of units by the utility head.

        Raises:
            ModelError: the model has no such head.
        """
        keys = [ScoreCache.key(window.ends, window.ids, kind=_UTILITY) for window in windows]
        scores, read = self._look_up(keys, windows, self._engine.score_units)
        lengths = [len(window.ids) for window in windows]
        counts = [(1 + size, 0) if new else (0, size) for size, new in zip(lengths, read, strict=True)]
        return UnitReading(scores=scores, counts=counts)

    def _read(
        self, pairs: Sequence[tuple[Ints, Ints]], score: Callable[[Sequence[tuple[Ints, Ints]]], list[Floats32]]
    ) -> ReadingAfter:
        nats, read = self._look_up([ScoreCache.key(*pair) for pair in pairs], pairs, score)
        counts = [
            (1 + len(before) + len(text), 0) if new else (0, len(text))
            for (before, text), new in zip(pairs, read, strict=True)
        ]
        return ReadingAfter(nats=nats, counts=counts)

    def _look_up(
        self, keys: Sequence[bytes], items: Sequence[Item], score: Callable[[Sequence[Item]], list[Floats32]]
    ) -> tuple[list[Floats32], list[bool]]:
        """The values of all items, and for which of them the model read: what is not in the cache, each thing once."""
        known = {key: values for key in keys if (values := self._cache.get(key)) is not None}
        unread = {key: item for key, item in zip(keys, items, strict=True) if key not in known}
        new = dict(zip(unread, score(list(unread.values())) if unread else [], strict=True))
        for key, values in new.items():
            self._cache.put(key, values)
        read = []
        charged = set(known)
        for key in keys:
            read.append(key not in charged)
            charged.add(key)
        known |= new
        return [known[key] for key in keys], read

    def run_stage_two(self, stages: Sequence[IterativeCompression]) -> None:
        """Take all prompts through Stage 2: together, but for those that may outgrow the window."""
        window = self._engine.window
        left = sorted(stages, key=lambda stage: -stage.longest)
        while left:
            longest = left[0].longest
            rows = 1 if longest > window or len(left) == 1 else self._engine.rows_at_once(longest)
            in_halves(self._advance, left[:rows], self._too_large, self._engine.give_back_memory)
            left = left[rows:]

    def _too_large(self, stage: IterativeCompression) -> ModelError:
        return text_too_large(self._engine.lm, min(stage.longest, self._engine.window))

    def _advance(self, together: Sequence[IterativeCompression]) -> list[IterativeCompression]:
        """Take these prompts to the end of Stage 2 in one session; give them back."""
        stages = list(together)
        for stage in stages:
            stage.forget()  # what a session that ran out of memory had read
        session = self._engine.session(len(stages))
        while stages:
            asked = [self._next_unread(stage) for stage in stages]
            going = [row for row, request in enumerate(asked) if request is not None]
            requests = [request for request in asked if request is not None]
            if going and len(going) < len(stages):
                session.select(going)
            stages = [stages[row] for row in going]
            if not stages:
                break
            for stage, request, values in zip(stages, requests, session.step(requests), strict=True):
                self._cache.put(_key(request), values)
                stage.receive(values)
        return list(together)

    def _next_unread(self, stage: IterativeCompression) -> ScoreRequest | None:
        """The next segment that is not in the cache; those before it are answered."""
        while (request := stage.request()) is not None:
            values = self._cache.get(_key(request))
            if values is None:
                return request
            stage.receive(values, from_model=False)
        return None


class ScoreCache:
    """Surprisals, or scores of units, that were computed before: one set of demonstrations, a thousand questions.

    An entry is exact: its key is every token that its values depend on. The least recently used entries leave once
    ``max_bytes`` are reached. A cache belongs to one model.

    Args:
        max_bytes: bound on keys and values together; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[bytes, Floats32] = OrderedDict()
        self.bytes = 0

    @staticmethod
    def key(prefix: Ints, segment: Ints, *, kind: bytes = b"") -> bytes:
        """Identifies tokens read after a prefix (which starts with BOS, not counted in it).

        Args:
            kind: keeps scores of another kind apart; their ``prefix`` may then be what else they depend on.
        """
        digest = blake2b(len(prefix).to_bytes(8, "little"), digest_size=16, person=kind)
        digest.update(prefix.tobytes())
        digest.update(segment.tobytes())
        return digest.digest()

    def get(self, key: bytes) -> Floats32 | None:
        values = self._entries.get(key)
        if values is not None:
            self._entries.move_to_end(key)
        return values

    def put(self, key: bytes, values: Floats32) -> None:
        size = values.nbytes + _ENTRY
        if key in self._entries or size > self._max_bytes:
            return
        self._entries[key] = values
        self.bytes += size
        while self.bytes > self._max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self.bytes -= oldest.nbytes + _ENTRY


def _key(request: ScoreRequest) -> bytes:
    return ScoreCache.key(request.prefix, request.segment)
