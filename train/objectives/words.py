"""Surprisals by word, which is where small LM and target can be compared whatever their tokenizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from terselm.statistics import most_surprising
from terselm.train.examples import Example
from terselm.train.guidance import NO_WORD
from terselm.train.objectives.base import Read, of_text

Ints = NDArray[np.int64]


def in_words(example: Example) -> NDArray[np.bool_]:
    """``(n,)``: the tokens of words that the target has an opinion on."""
    if example.guide is None:
        return np.zeros(len(example), dtype=np.bool_)
    found: NDArray[np.bool_] = example.guide.words != NO_WORD
    return found


def count_words(example: Example) -> int:
    return 0 if example.guide is None else len(example.guide.nats)


def word_inputs(examples: Sequence[Example], read: Read) -> dict[str, NDArray[np.generic]]:
    """``word_of``: ``(n,)`` the word of each token that is read, W for none; ``word_nats``: ``(W,)`` the target's."""
    total = sum(count_words(example) for example in examples)
    words, nats = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.float32)]
    start = 0
    for example, mask in zip(examples, read, strict=True):
        if example.guide is None:
            words.append(np.full(mask.sum(), total, dtype=np.int64))
            continue
        found = example.guide.words[mask].astype(np.int64)
        words.append(np.where(found == NO_WORD, total, found + start))
        nats.append(example.guide.nats)
        start += len(example.guide.nats)
    return {"word_of": np.concatenate(words), "word_nats": np.concatenate(nats)}


def by_word(surprisals: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """``(W,)`` float32: the small LM's surprisal of each word, the sum over its tokens."""
    values = of_text(surprisals)
    sums = values.new_zeros(len(inputs["word_nats"]) + 1).index_add(0, inputs["word_of"], values)
    return sums[:-1]


def kept_at(nats: NDArray[np.float32], ratio: float) -> NDArray[np.bool_]:
    """``(words,)``: those that the target, used as the compressor, would keep at this ratio."""
    kept = np.zeros(len(nats), dtype=np.bool_)
    if len(nats):
        kept[most_surprising(nats, 1 / ratio)] = True
    return kept
