"""Scores of units by the utility head: one pass over each window, without logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from terselm.compress.layout import Floats32
from terselm.compress.utility import UtilityWindow
from terselm.models import CausalLM
from terselm.models.memory import in_halves, text_too_large
from terselm.models.scoring import batches_for, on_device, read_rows
from terselm.models.utility_head import UtilityHead

if TYPE_CHECKING:
    from terselm.statistics import Ints


class UtilityScorer:
    """Scores units with one model and its head, windows of similar length together.

    Args:
        lm: the model.
        head: of that model, on its device.
        states_of: see `RowScorer`.
        give_back: called after the memory was exhausted.
    """

    def __init__(
        self,
        lm: CausalLM,
        head: UtilityHead,
        *,
        states_of: Callable[[Ints], Tensor | None] | None = None,
        give_back: Callable[[], None] = torch.cuda.empty_cache,
    ) -> None:
        self._lm = lm
        self._head = head
        self._states_of = states_of
        self._give_back = give_back

    def score(self, windows: Sequence[UtilityWindow]) -> list[Floats32]:
        """Of each window the scores of its units, ``(n,)`` float32.

        Raises:
            ModelError: the memory is too small for one window.
        """
        scores: dict[int, Floats32] = {}
        for batch in batches_for(self._lm.model.device, [len(window.ids) for window in windows]):
            some = [windows[number] for number in batch]
            scores |= zip(batch, in_halves(self._read, some, self._too_large, self._give_back), strict=True)
        return [scores[number] for number in range(len(windows))]

    def _too_large(self, window: UtilityWindow) -> Exception:
        return text_too_large(self._lm, len(window.ids))

    @torch.inference_mode()
    def _read(self, windows: Sequence[UtilityWindow]) -> list[Floats32]:
        states = read_rows(self._lm, [window.ids for window in windows], self._states_of)
        width = states.shape[1]
        where = np.concatenate([row * width + 1 + window.ends for row, window in enumerate(windows)])
        values = self._head(states.flatten(0, 1)[on_device(where, states.device)]).cpu().numpy()
        return np.split(values, np.cumsum([len(window.ends) for window in windows])[:-1])
