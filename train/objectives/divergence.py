"""Divergence from the target's own distribution, as far as it is known: its likeliest tokens, and all others as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from terselm.train.examples import Example
from terselm.train.objectives.base import Read

_LEAST = 1e-7  # probability of the tail; keeps its logarithm finite


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
