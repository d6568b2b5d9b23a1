"""Surprisals that were computed before: one set of demonstrations, a thousand questions."""

from __future__ import annotations

from collections import OrderedDict
from hashlib import blake2b

from terselm.compress.units import Floats32, Ints

_ENTRY = 200  # bytes that a key and its place in the table take


class ScoreCache:
    """The least recently used entries leave once ``max_bytes`` are reached.

    An entry is exact: its key is every token that its surprisals depend on. A cache belongs to one model.

    Args:
        max_bytes: bound on keys and values together; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[bytes, Floats32] = OrderedDict()
        self.bytes = 0

    @staticmethod
    def key(prefix: Ints, segment: Ints) -> bytes:
        """Identifies tokens read after a prefix (which starts with BOS, not counted in it)."""
        digest = blake2b(len(prefix).to_bytes(8, "little"), digest_size=16)
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
