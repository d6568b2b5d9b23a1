"""What must not be asked: near duplicates, and whatever overlaps with the benchmarks of an evaluation."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from terselm.data.instructions import Instruction
from terselm.data.jsonl import read_objects
from terselm.errors import ConfigError, DataFormatError

OVERLAP = 13
"""Words in a row; as in GPT-3's appendix C (arXiv:2005.14165)."""
_LEAST_OVERLAP = 8  # a benchmark's text of fewer words than OVERLAP, but so many, counts as a whole
_SHINGLE = 3  # words
_PERMUTATIONS = 128


def without_near_duplicates(instructions: Sequence[Instruction], threshold: float) -> tuple[list[Instruction], int]:
    """Leave out instructions much like an earlier one; return what stays, and how many went.

    Two are much alike if the Jaccard similarity of their sets of three-word runs, as MinHash estimates it (Broder,
    1997), is at least ``threshold``. The longer a few-shot prompt's common examples, the more alike its questions
    look: give such prompts a high threshold, or none.

    Raises:
        ConfigError: the threshold is out of range, or datasketch is missing.
    """
    if not 0 < threshold < 1:
        raise ConfigError(f"near_duplicates is {threshold}; expected a similarity above 0 and below 1")
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError:
        raise ConfigError("finding near duplicates needs datasketch; run: pip install 'terselm[collect]'") from None
    # Rather look at too many than at too few: what it finds is compared below.
    index = MinHashLSH(threshold=threshold, num_perm=_PERMUTATIONS, weights=(0.1, 0.9))
    hashes: dict[str, Any] = {}
    kept = []
    for instruction in instructions:
        sketch = MinHash(num_perm=_PERMUTATIONS, seed=1)
        sketch.update_batch([" ".join(run).encode() for run in _runs(_words(instruction), _SHINGLE)])
        near = index.query(sketch)
        if any(sketch.jaccard(hashes[name]) >= threshold for name in near):
            continue
        hashes[instruction.id] = sketch
        index.insert(instruction.id, sketch)
        kept.append(instruction)
    return kept, len(instructions) - len(kept)


def without_overlap(instructions: Sequence[Instruction], benchmarks: Iterable[Path]) -> tuple[list[Instruction], int]:
    """Leave out instructions that share thirteen words in a row with a benchmark; return what stays, and how many went.

    Args:
        benchmarks: JSON Lines, JSON, or any other text; every string in them counts.

    Raises:
        DataFormatError: a benchmark cannot be read, or holds no text of eight words.
    """
    runs: set[tuple[str, ...]] = set()
    for path in benchmarks:
        before = len(runs)
        for text in _strings(path):
            words = _split(text)
            if len(words) >= _LEAST_OVERLAP:
                runs.update(_runs(words, OVERLAP))
        if len(runs) == before:
            raise DataFormatError(path, None, f"holds no text of {_LEAST_OVERLAP} words that is not known already")
    lengths = {len(run) for run in runs}
    kept = [
        instruction
        for instruction in instructions
        if runs.isdisjoint(run for length in lengths for run in _runs(_words(instruction), length))
    ]
    return kept, len(instructions) - len(kept)


def _strings(path: Path) -> Iterator[str]:
    try:
        if path.suffix == ".jsonl":
            for _, value in read_objects(path):
                yield from _inside(value)
            return
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataFormatError(path, None, f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        yield from _inside(json.loads(text) if path.suffix == ".json" else text)
    except ValueError as error:
        raise DataFormatError(path, None, f"broken JSON: {error}") from None


def _inside(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _inside(item)


def _words(instruction: Instruction) -> list[str]:
    return _split("\n".join(message.content for message in instruction.messages))


def _split(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _runs(words: Sequence[str], length: int) -> Iterator[tuple[str, ...]]:
    """All runs of so many words; the whole where there are fewer."""
    for start in range(max(1, len(words) - length + 1)):
        yield tuple(words[start : start + length])
