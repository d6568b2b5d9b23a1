"""Which words a compression keeps, and how many of them another one keeps too."""

from __future__ import annotations

from terselm.evaluate.methods import Compressed
from terselm.statistics import word_spans

Word = tuple[str, int, int]  # part, index of the demonstration, number of the word


def kept_words(compressed: Compressed) -> set[Word]:
    """The words of which more than half of the characters are kept."""
    assert compressed.result is not None
    texts: dict[tuple[str, int], list[str]] = {}
    kept: dict[tuple[str, int], list[bool]] = {}
    for token in compressed.result.tokens:
        place = token.part.value, token.index
        texts.setdefault(place, []).append(token.text)
        kept.setdefault(place, []).extend([token.kept] * len(token.text))
    return {
        (*place, number)
        for place, parts in texts.items()
        for number, (start, end) in enumerate(word_spans("".join(parts)).tolist())
        if 2 * sum(kept[place][start:end]) > end - start
    }


def overlap(a: set[Word], b: set[Word]) -> float:
    """Dice's coefficient, 2 |A ∩ B| / (|A| + |B|): the share of words in common, whichever keeps a few more."""
    return 2 * len(a & b) / (len(a) + len(b)) if a or b else 1.0
