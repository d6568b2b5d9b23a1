"""Log-probabilities from hidden states, against float64, for every way in which models make their logits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fakes import random_lm
from transformers import AutoConfig, AutoModelForCausalLM

from terselm.errors import ModelError
from terselm.models import reading
from terselm.models.reading import LogitTransform, OutputHead, last_states, logit_transform
from terselm.models.surprisal_kernel import nll, nll_and_slopes

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, tuple[dict[str, Any], LogitTransform]] = {
    "llama": ({}, LogitTransform()),
    "granite": ({"logits_scaling": 4.0}, LogitTransform(scale=0.25)),
    "cohere": ({"logit_scale": 0.3}, LogitTransform(scale=0.3)),
    "hyperclovax": ({"logits_scaling": 0.3}, LogitTransform(scale=0.3)),
    "falcon_h1": (
        {"lm_head_multiplier": 0.05, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
        LogitTransform(scale=0.05),
    ),
    "gemma2": ({"final_logit_softcapping": 2.0}, LogitTransform(cap=2.0)),
}


def made(family: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, **FAMILIES[family][0])).float().eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [3, 256])
def test_every_familys_log_probabilities(family: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(reading._ROWS_AT_ONCE, "cpu", rows)
    model = made(family)
    assert logit_transform(model) == FAMILIES[family][1]
    torch.manual_seed(1)
    ids = torch.randint(3, 300, (2, 21))
    with torch.no_grad():
        expected = model(input_ids=ids).logits[:, :-1].double().log_softmax(-1).flatten(0, 1)
        states = last_states(model, ids)[:, :-1].flatten(0, 1)
    wanted = ids[:, 1:].flatten()
    head = OutputHead(model)
    found = head.nll(states, wanted)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), -expected.gather(1, wanted[:, None])[:, 0], atol=1e-4, rtol=0)
    nats, top, tokens = head.nll_and_likeliest(states, wanted, 5)
    assert torch.equal(nats, found)
    torch.testing.assert_close(top.double(), expected.topk(5).values, atol=1e-4, rtol=0)
    torch.testing.assert_close(top.double(), expected.gather(1, tokens), atol=1e-4, rtol=0)


def test_more_likeliest_tokens_than_there_are() -> None:
    model = made("llama")
    _, top, tokens = OutputHead(model).nll_and_likeliest(torch.randn(2, 32), torch.zeros(2, dtype=torch.long), 1000)
    assert top.shape == tokens.shape == (2, 300)


@pytest.mark.parametrize("kind", ["logits", "states"])
def test_a_model_that_does_more_is_refused(kind: str) -> None:
    model = copy.deepcopy(random_lm("llama").model)
    if kind == "logits":
        plain = model.forward

        def forward(**arguments: Any) -> Any:
            output = plain(**arguments)
            output.logits = output.logits.clamp(min=0)
            return output

        model.forward = forward
    else:
        model.lm_head.register_forward_pre_hook(lambda _module, inputs: (2 * inputs[0],))
    with pytest.raises(ModelError, match="LlamaForCausalLM does more to its last states than an output head"):
        OutputHead(model)


def test_logits_that_are_no_numbers() -> None:
    model = made("llama")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"LlamaForCausalLM gives logits that are no numbers \(NaN\) in torch.float32"):
        OutputHead(model)


@pytest.mark.parametrize("in_cache", [1, 1000, 1 << 19])
@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_surprisals_and_slopes(
    in_cache: int, cap: float | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("terselm.models.surprisal_kernel._IN_CACHE", in_cache)
    torch.manual_seed(0)
    logits = (torch.randn(17, 301) * 4).to(dtype)
    wanted = torch.randint(0, 301, (17,))
    exact = logits.double().requires_grad_()
    shown = exact if cap is None else torch.tanh(exact / cap) * cap
    expected = torch.nn.functional.cross_entropy(shown, wanted, reduction="none")
    (slopes,) = torch.autograd.grad(expected.sum(), exact)
    nats, found = nll_and_slopes(logits.clone(), wanted, cap)
    torch.testing.assert_close(nats.double(), expected.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.double(), slopes, atol=1e-6, rtol=1e-5 if dtype == torch.float32 else 1e-2)
    if cap is None:
        kept = logits.clone()
        torch.testing.assert_close(nll(logits, wanted).double(), expected.detach(), atol=1e-5, rtol=1e-5)
        assert torch.equal(logits, kept)


def test_nothing_to_score() -> None:
    model = made("llama")
    nothing = torch.zeros(0, dtype=torch.long)
    assert OutputHead(model).nll(torch.zeros(0, 32), nothing).shape == (0,)
    assert nll(torch.zeros(0, 300), nothing).shape == (0,)
