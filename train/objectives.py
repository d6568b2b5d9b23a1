"""What alignment minimises: one small class for each objective, and their weighted sum.

An objective is a sum over units (tokens, words, pairs), divided by how many there are in the whole step. The count
comes from the examples on the host, so that no process has to ask another, nor its GPU. Small LM and target are
compared by words, whatever their tokenizers, or by tokens where they share a vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from terselm.statistics import RATIOS, most_surprising
from terselm.train.examples import NO_WORD, Example
from terselm.train.settings import ObjectiveSettings

_WINDOW = 128  # words that are compared with each other; pairs grow with its square
_LEAST = 1e-7  # probability of the tail; keeps its logarithm finite

Read = Sequence[NDArray[np.bool_]]
"""By example: which of its tokens the model is asked about."""


class Mixture:
    """Σ_o w_o · total_o / units_o over the objectives o.

    Args:
        parts: weight and objective; weights above 0.
    """

    def __init__(self, parts: Sequence[tuple[float, Objective]]) -> None:
        self._weights = [weight for weight, _ in parts]
        self._parts = [part for _, part in parts]

    @classmethod
    def of(cls, settings: ObjectiveSettings) -> Mixture:
        """What the configuration asks for."""
        known: list[tuple[float, Objective]] = [
            (settings.nll, NegativeLogLikelihood()),
            (settings.matching, SurprisalMatching(settings.turning_point, settings.near_threshold)),
            (settings.ranking, KeptWordRanking()),
            (settings.divergence, TailedDivergence()),
            (settings.utility, UtilityOrder()),
        ]
        return cls([(weight, part) for weight, part in known if weight > 0])

    def reads(self, example: Example) -> NDArray[np.bool_]:
        """``(n,)``: the tokens that any objective needs."""
        return reduce(np.logical_or, [part.reads(example) for part in self._parts])

    def units(self, examples: Sequence[Example]) -> NDArray[np.float64]:
        """``(objectives,)``: the divisors of these examples."""
        rows = [[part.units(example) for part in self._parts] for example in examples]
        table: NDArray[np.float64] = np.asarray(rows, dtype=np.float64).reshape(-1, len(self._parts))
        return np.asarray(table.sum(axis=0))

    def inputs(self, examples: Sequence[Example], read: Read) -> dict[str, NDArray[np.generic]]:
        """What `loss` needs of these examples."""
        return {name: array for part in self._parts for name, array in part.inputs(examples, read).items()}

    def loss(self, surprisals: Tensor, inputs: Mapping[str, Tensor], units: Sequence[float]) -> Tensor:
        """A scalar; ``units`` are the divisors of the whole step, an objective without any adds nothing."""
        parts = zip(self._weights, self._parts, units, strict=True)
        terms = [weight / count * part.total(surprisals, inputs) for weight, part, count in parts if count > 0]
        nothing = 0.0 * surprisals.sum()  # so that every trained weight has a gradient in every pass, as DDP wants it
        if (scores := inputs.get("scores")) is not None:
            nothing = nothing + 0.0 * scores.sum()
        return sum(terms, start=nothing)


class Objective(Protocol):
    """One thing to minimise."""

    def reads(self, example: Example) -> NDArray[np.bool_]:
        """``(n,)``: the tokens whose surprisal it needs; never the first, which nothing precedes."""
        ...

    def units(self, example: Example) -> float:
        """What this example adds to the divisor."""
        ...

    def inputs(self, examples: Sequence[Example], read: Read) -> dict[str, NDArray[np.generic]]:
        """What `total` needs of these examples; rows that belong to tokens follow the tokens that are read."""
        ...

    def total(self, surprisals: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        """The sum over all units, a scalar.

        Args:
            surprisals: ``(n,)``, or ``(n, 1 + K)`` if an objective asks for other tokens besides: nats, float32.
            inputs: as `inputs` made them; of a model with a utility head also ``scores``, ``(U,)`` float32, one for
                each labelled unit.
        """
        ...


class NegativeLogLikelihood:
    """Mean over the counted tokens t of −log p(x_t | x_<t), in nats.

    Source: Eq. 8 of arXiv:2310.05736.
    """

    def reads(self, example: Example) -> NDArray[np.bool_]:
        return example.counted

    def units(self, example: Example) -> float:
        return float(example.counted.sum())

    def inputs(self, examples: Sequence[Example], read: Read) -> dict[str, NDArray[np.generic]]:
        counted = [example.counted[mask] for example, mask in zip(examples, read, strict=True)]
        return {"counted": np.concatenate(counted).astype(np.float32)}

    def total(self, surprisals: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        return (of_text(surprisals) * inputs["counted"]).sum()


class SurprisalMatching:
    """Weighted mean over words w of smooth-L1(s_w − t_w).

    s_w and t_w are the surprisals of a word under small LM and target, the sums over its tokens in nats, and
    smooth-L1(d) = d²/(2β) where |d| < β, else |d| − β/2. The weight of a word is 1 + λ · mean over the ratios r of
    exp(−|t_w − γ_r|): near a threshold γ_r an error decides whether the word is kept.

    Args:
        turning_point: β, nats.
        near_threshold: λ; 0 weighs all words the same.
    """

    def __init__(self, turning_point: float = 1.0, near_threshold: float = 0.0) -> None:
        self._turning_point = turning_point
        self._near_threshold = near_threshold

    def reads(self, example: Example) -> NDArray[np.bool_]:
        return in_words(example)

    def units(self, example: Example) -> float:
        return float(self._weights(example).sum()) if self._near_threshold else float(count_words(example))

    def inputs(self, examples: Sequence[Example], read: Read) -> dict[str, NDArray[np.generic]]:
        inputs = word_inputs(examples, read)
        if self._near_threshold:
            inputs["word_weights"] = np.concatenate([self._weights(example) for example in examples])
        return inputs

    def total(self, surprisals: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        errors = functional.smooth_l1_loss(
            by_word(surprisals, inputs), inputs["word_nats"], beta=self._turning_point, reduction="none"
        )
        return (errors * inputs["word_weights"] if self._near_threshold else errors).sum()

    def _weights(self, example: Example) -> NDArray[np.float32]:
        """``(words,)``."""
        if not count_words(example) or example.guide is None:
            return np.zeros(0, dtype=np.float32)
        nats = example.guide.nats
        nearness = [np.exp(-np.abs(nats - nats[kept_at(nats, ratio)].min())) for ratio in RATIOS]
        return np.asarray(1 + self._near_threshold * np.mean(nearness, axis=0), dtype=np.float32)


class KeptWordRanking:
    """Mean over pairs of a kept word i and a dropped word j of one example of softplus(−(s_i − s_j)).

    Kept and dropped are what the target's own surprisals say at each ratio; a pair counts once for every ratio that
    parts it. Long examples are compared in windows of 128 words.

    Source: the pairwise logistic loss of RankNet (Burges et al., Learning to Rank using Gradient Descent, 2005).
    """

    def reads(self, example: Example) -> NDArray[np.bool_]:
        return in_words(example)

    def units(self, example: Example) -> float:
        windows = [kept[i : i + _WINDOW] for kept in self._levels(example) for i in range(0, len(kept), _WINDOW)]
        return float(sum(int(kept.sum()) * int((~kept).sum()) for kept in windows))

    def inputs(self, examples: Sequence[Example], read: Read) -> dict[str, NDArray[np.generic]]:
        """``windows``: ``(M, 128)`` words, W for none; ``kept``: ``(M, ratios, 128)`` int8, −1 where there is none."""
        inputs = word_inputs(examples, read)
        total, start = len(inputs["word_nats"]), 0
        windows, kept = [], []
        for example in examples:
            levels = self._levels(example)
            count = count_words(example)
            for begin in range(0, count, _WINDOW):
                size = min(_WINDOW, count - begin)
                window = np.full(_WINDOW, total, dtype=np.int64)
                window[:size] = start + begin + np.arange(size)
                decisions = np.full((len(RATIOS), _WINDOW), -1, dtype=np.int8)
                decisions[:, :size] = [level[begin : begin + size] for level in levels]
                windows.append(window)
                kept.append(decisions)
            start += count
        inputs["windows"] = np.asarray(windows, dtype=np.int64).reshape(-1, _WINDOW)
        inputs["kept"] = np.asarray(kept, dtype=np.int8).reshape(-1, len(RATIOS), _WINDOW)
        return inputs

    def total(self, surprisals: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        words = functional.pad(by_word(surprisals, inputs), (0, 1))
        values = words[inputs["windows"]]  # (M, 128)
        above, below = (inputs["kept"] == 1).float(), (inputs["kept"] == 0).float()  # (M, ratios, 128)
        pairs = above.transpose(1, 2) @ below  # (M, 128, 128): at how many ratios i is kept and j is not
        return (functional.softplus(values[:, None, :] - values[:, :, None]) * pairs).sum()

    def _levels(self, example: Example) -> list[NDArray[np.bool_]]:
        return [] if example.guide is None else [kept_at(example.guide.nats, ratio) for ratio in RATIOS]


class TailedDivergence:
    """Mean over tokens of Σ_k p_k (log p_k − log q_k) + p_rest (log p_rest − log q_rest).

    p is the target's distribution and q the small LM's, over the target's K likeliest tokens k; p_rest = 1 − Σ_k p_k
    is the tail bucket, and q_rest likewise. It is the forward KL divergence of the distributions after all other tokens
    have been made one, so it never exceeds that of the whole distributions. Both need one vocabulary.
    """

    def reads(self, example: Example) -> NDArray[np.bool_]:
        if example.guide is None or example.guide.top_ids is None:
            return np.zeros(len(example), dtype=np.bool_)
        return np.asarray((example.guide.top_ids >= 0).any(axis=1))

    def units(self, example: Example) -> float:
        return float(self.reads(example).sum())

    def inputs(self, examples: Sequence[Example], read: Read) -> dict[str, NDArray[np.generic]]:
        """``top_ids``, ``top_logprobs``: ``(n, K)``; a token without an opinion has −inf throughout."""
        ids, logprobs = [], []
        for example, mask in zip(examples, read, strict=True):
            assert example.guide is not None
            assert example.guide.top_ids is not None
            assert example.guide.top_logprobs is not None
            ids.append(np.maximum(example.guide.top_ids[mask], 0).astype(np.int64))
            logprobs.append(example.guide.top_logprobs[mask])
        return {"top_ids": np.concatenate(ids), "top_logprobs": np.concatenate(logprobs)}

    def total(self, surprisals: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        log_p, log_q = inputs["top_logprobs"], -surprisals[:, 1:]  # (n, K)
        known = torch.isfinite(log_p)
        p = log_p.exp()  # 0 where unknown
        terms = torch.where(known, p * (log_p.masked_fill(~known, 0.0) - log_q), torch.zeros_like(p))
        rest_p = (1 - p.sum(1)).clamp(min=_LEAST)
        rest_q = (1 - torch.where(known, log_q.exp(), torch.zeros_like(p)).sum(1)).clamp(min=_LEAST)
        rest = rest_p * (rest_p.log() - rest_q.log())
        return (terms.sum(1) + rest)[known.any(1)].sum()


class UtilityOrder:
    """Mean over labelled prompts of an order and a size: how the scores z of its units i follow their utilities u.

    The order is the mean over pairs with u_i > u_j, weighted by u_i − u_j, of softplus(−(z_i − z_j)); the size the
    mean over units of smooth-L1(z_i − u_i) with β = 1. Utilities are standardised in each prompt, so that scores mean
    the same everywhere. Of a prompt that is read in windows, each counts by its share of the units.

    Source: the pairwise logistic loss of RankNet (Burges et al., Learning to Rank using Gradient Descent, 2005), its
    weights as in LambdaRank (Burges et al., Learning to Rank with Nonsmooth Cost Functions, 2006).
    """

    def reads(self, example: Example) -> NDArray[np.bool_]:
        return np.zeros(len(example), dtype=np.bool_)

    def units(self, example: Example) -> float:
        return 0.0 if example.labels is None else example.labels.share

    def inputs(self, examples: Sequence[Example], read: Read) -> dict[str, NDArray[np.generic]]:
        """``unit_groups``: ``(G, W)`` places in the scores of a prompt's units, U for none; ``utilities``: ``(G, W)``
        of them; ``shares``: ``(G,)`` of the prompt that each group is."""
        labels = [example.labels for example in examples if example.labels is not None]
        sizes = [len(each.values) for each in labels]
        groups = np.full((len(labels), max(sizes, default=1)), sum(sizes), dtype=np.int64)
        values = np.zeros(groups.shape, dtype=np.float32)
        start = 0
        for row, each in enumerate(labels):
            groups[row, : sizes[row]] = start + np.arange(sizes[row])
            values[row, : sizes[row]] = each.values
            start += sizes[row]
        shares = np.asarray([each.share for each in labels], dtype=np.float32)
        return {"unit_groups": groups, "utilities": values, "shares": shares}

    def total(self, surprisals: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        scores, groups, values = (inputs[name] for name in ("scores", "unit_groups", "utilities"))
        known = groups < len(scores)  # (G, W)
        found = functional.pad(scores, (0, 1))[groups]
        pairs = (values[:, :, None] - values[:, None, :]).clamp(min=0) * (known[:, :, None] & known[:, None, :])
        losses = functional.softplus(found[:, None, :] - found[:, :, None]) * pairs  # (G, W, W)
        order = losses.sum((1, 2)) / pairs.sum((1, 2)).clamp(min=_LEAST)
        errors = functional.smooth_l1_loss(found, values, reduction="none") * known
        size = errors.sum(1) / known.sum(1).clamp(min=1)
        return ((order + size) * inputs["shares"]).sum()


def of_text(surprisals: Tensor) -> Tensor:
    """``(n,)``: of the tokens of the text itself."""
    return surprisals if surprisals.dim() == 1 else surprisals[:, 0]


def in_words(example: Example) -> NDArray[np.bool_]:
    """``(n,)``: the tokens of words that the target has an opinion on."""
    if example.guide is None:
        return np.zeros(len(example), dtype=np.bool_)
    mask: NDArray[np.bool_] = example.guide.words != NO_WORD
    return mask


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
        numbers = example.guide.words[mask].astype(np.int64)
        words.append(np.where(numbers == NO_WORD, total, numbers + start))
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
