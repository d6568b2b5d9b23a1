"""What comes before the first prompt, and int8."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fakes import random_lm

from terselm import Prompt, PromptCompressor
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
    ids = torch.tensor([load_causal_lm("smollm2-135m").tokenizer("The capital of France is Paris.")["input_ids"]])
    full, small = (load_causal_lm("smollm2-135m", device="cpu", dtype=dtype) for dtype in ("float32", "int8"))
    with torch.inference_mode():
        logits = [lm.model(ids).logits[0].log_softmax(-1).numpy() for lm in (full, small)]
    chosen = [row[np.arange(ids.shape[1] - 1), ids[0, 1:]] for row in logits]
    assert 0 < np.abs(chosen[0] - chosen[1]).mean() < 0.5
    assert full.model.lm_head.weight.dtype == torch.float32  # the quantiser spares what it is not asked to change
    layers = [module for module in small.model.modules() if "DynamicQuantizedLinear" in type(module).__name__]
    assert len(layers) == 0 or len(layers) == 7 * 30
    assert sum(type(module) is torch.nn.Linear for module in small.model.modules()) == 1  # the head
    result = PromptCompressor(small).compress_batch([PROMPT], rate=0.5)[0]
    assert result.compressed_tokens <= result.budget


def test_int8_is_for_the_cpu() -> None:
    with pytest.raises(ConfigError, match="int8 is for the CPU"):
        load_causal_lm("no-such-model", device="meta", dtype="int8")


def test_without_int8_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from terselm.models import quantise

    monkeypatch.setattr(type(torch.backends.quantized), "supported_engines", property(lambda _: ["none"]))
    with pytest.raises(ModelError, match="no int8 kernels"):
        quantise.quantise_linear_layers(random_lm().model)
