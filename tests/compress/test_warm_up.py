"""What comes before the first prompt, and int8."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fakes import random_lm
from real_prompts import WORKED

from terselm import Prompt, PromptCompressor
from terselm.compress.engine.surprisal import SurprisalEngine
from terselm.errors import ConfigError, ModelError
from terselm.models import load_causal_lm

PROMPT = Prompt(demonstrations=["One apple a day.", "Two pears a week, and a plum."], question="How many plums?")


def test_warming_up_leaves_no_trace() -> None:
    compressor = PromptCompressor(random_lm())
    assert compressor.warm_up([PROMPT], rate=0.5) > 0
    assert compressor.compress_batch([PROMPT], rate=0.5)[0].tokens_cached == 0
    assert compressor.compress_batch([PROMPT], rate=0.5)[0].tokens_read == 0


def test_warming_up_with_the_bundled_prompt() -> None:
    assert PromptCompressor(random_lm()).warm_up() > 0


@pytest.mark.model
def test_int8_is_close_to_float32() -> None:
    full, small = (load_causal_lm("smollm2-135m", device="cpu", dtype=dtype) for dtype in ("float32", "int8"))
    ids = np.array(full.tokenizer("\n\n".join(WORKED[:3]))["input_ids"])
    exact, rounded = (SurprisalEngine(lm).score_texts([ids])[0] for lm in (full, small))
    assert 0 < np.abs(exact - rounded).mean() < 0.8
    assert np.corrcoef(exact, rounded)[0, 1] > 0.9
    left = [name for name, module in small.model.named_modules() if type(module) is torch.nn.Linear]
    assert 0 < len(left) < 30  # of 7 * 30: those with large activations
    result = PromptCompressor(small).compress_batch([PROMPT], rate=0.5)[0]
    assert result.compressed_tokens <= result.budget


def test_int8_is_for_the_cpu() -> None:
    with pytest.raises(ConfigError, match="int8 is for the CPU"):
        load_causal_lm("no-such-model", device="meta", dtype="int8")


def test_without_int8_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from terselm.models import quantise

    monkeypatch.setattr(type(torch.backends.quantized), "supported_engines", property(lambda _: ["none"]))
    with pytest.raises(ModelError, match="no int8 kernels"):
        quantise.quantise_linear_layers(random_lm().model, random_lm().tokenizer)
