"""The loss: equal to a float64 reference, in chunks or whole, over any number of passes."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from tiny_training import IGNORED, example, labels, make_model, surprisals
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from terselm.errors import ModelError
from terselm.models import load_causal_lm
from terselm.models.reading import LogitTransform
from terselm.train import surprisals as module
from terselm.train.attention import PACKED_ATTENTION
from terselm.train.model import add_adapter
from terselm.train.packing import collate
from terselm.train.settings import LoraSettings
from terselm.train.surprisals import give_surprisals

BATCH = collate([[example(40, 1), example(20, 2)], [example(33, 3)]], pad_id=0)


def reference(lm: Any, batch: dict[str, Tensor]) -> Tensor:
    """−log softmax in float64, one example at a time, from the plain model."""
    lm = copy.deepcopy(lm).double()
    values = []
    for ids, positions, tokens in zip(batch["input_ids"], batch["position_ids"], labels(batch), strict=True):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        for start, end in itertools.pairwise(starts):
            logits = lm(input_ids=ids[None, start:end]).logits[0].double()
            for place in range(end - start):
                if tokens[start + place] != IGNORED:
                    values.append(-torch.log_softmax(logits[place], -1)[tokens[start + place]])
    return torch.stack(values)


@pytest.mark.parametrize("chunk", [7, 1024])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_it_equals_the_float64_reference(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, chunk: int, cap: float | None
) -> None:
    lm = make_model(len(tokenizer))
    monkeypatch.setitem(module._LOGITS_AT_ONCE, "cpu", chunk * len(tokenizer))
    if cap is not None:
        lm = with_soft_cap(lm, cap)
    with torch.no_grad():
        expected = reference(lm, BATCH)
        give_surprisals(lm, autocast=None)
        # Gemma 2 caps its attention too, which ours does not; it keeps its own.
        assert (lm.config._attn_implementation == PACKED_ATTENTION) == (cap is None)
        torch.testing.assert_close(surprisals(lm, BATCH).double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("chunk", [7, 1024])
@pytest.mark.parametrize("frozen_head", [False, True])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_its_gradient_equals_the_reference(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, chunk: int, frozen_head: bool, cap: float | None
) -> None:
    lm = make_model(len(tokenizer))
    monkeypatch.setitem(module._LOGITS_AT_ONCE, "cpu", chunk * len(tokenizer))
    lm = lm if cap is None else with_soft_cap(lm, cap)
    lm.get_output_embeddings().weight.requires_grad_(not frozen_head)
    plain = copy.deepcopy(lm).double()
    reference_loss(plain).backward()
    give_surprisals(lm, autocast=None)
    surprisals(lm, BATCH).sum().backward()
    for (name, ours), theirs in zip(lm.named_parameters(), plain.parameters(), strict=True):
        if ours.requires_grad:
            torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("frozen_head", [False, True])
@pytest.mark.parametrize(("family", "scale"), [("granite", {"logits_scaling": 4.0}), ("cohere", {"logit_scale": 0.3})])
def test_models_that_scale_their_logits(
    tokenizer: Any, family: str, scale: dict[str, float], frozen_head: bool
) -> None:
    sizes = make_model(len(tokenizer)).config.to_dict()
    del sizes["model_type"]
    config = AutoConfig.for_model(family, **{**sizes, "tie_word_embeddings": False, **scale})
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config).float().eval()
    lm.get_output_embeddings().weight.requires_grad_(not frozen_head)
    plain = copy.deepcopy(lm).double()
    with torch.no_grad():
        expected = reference(lm, BATCH)
    reference_loss(plain).backward()
    give_surprisals(lm, autocast=None)
    found = surprisals(lm, BATCH)
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=0)
    found.sum().backward()
    for (name, ours), theirs in zip(lm.named_parameters(), plain.parameters(), strict=True):
        if ours.requires_grad:
            torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=1e-3, rtol=1e-3, msg=name)


@pytest.mark.parametrize("chunk", [7, 1024])
@pytest.mark.parametrize("kind", ["frozen", "trained", "module", "capped", "scaled", "biased"])
def test_several_tokens_a_position(tokenizer: Any, monkeypatch: pytest.MonkeyPatch, chunk: int, kind: str) -> None:
    """Values and gradients of any wanted tokens, against float64 log-softmax."""
    monkeypatch.setitem(module._LOGITS_AT_ONCE, "cpu", chunk * len(tokenizer))
    if kind in ("module", "biased"):
        monkeypatch.setattr(module, "_is_plain", lambda head: False)
    lm = make_model(len(tokenizer))
    lm = with_soft_cap(lm, 2.0) if kind == "capped" else lm
    head = lm.get_output_embeddings()
    head.weight.requires_grad_(kind != "frozen")
    torch.manual_seed(1)
    states = torch.randn(20, lm.config.hidden_size, requires_grad=True)
    wanted = torch.randint(len(tokenizer), (20, 3))
    upstream = torch.randn(20, 3)
    if kind == "biased":
        head.bias = torch.nn.Parameter(torch.randn(len(tokenizer)))
    scale = 0.3 if kind in ("scaled", "biased") else 1.0
    transform = LogitTransform(scale=scale, cap=2.0 if kind == "capped" else None)
    ours = module.surprisals(lm, states, wanted, transform)
    logits = states.double() @ head.weight.double().T
    logits = scale * (logits if head.bias is None else logits + head.bias.double())
    logits = torch.tanh(logits / 2) * 2 if kind == "capped" else logits
    expected = -torch.log_softmax(logits, -1).gather(1, wanted)
    torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=1e-5)
    inputs = [states] if kind == "frozen" else [states, head.weight]
    theirs = torch.autograd.grad(expected, inputs, upstream.double())
    for grad, wanted_grad in zip(torch.autograd.grad(ours, inputs, upstream), theirs, strict=True):
        torch.testing.assert_close(grad.double(), wanted_grad.double(), atol=1e-5, rtol=1e-4)


def test_several_tokens_a_place_are_as_one(tokenizer: Any) -> None:
    lm = make_model(len(tokenizer))
    give_surprisals(lm, autocast=None)
    tokens = labels(BATCH).flatten()
    at = (tokens != IGNORED).nonzero().flatten()
    assert at.tolist() == BATCH["at"].tolist()
    columns = torch.stack([tokens[at], tokens[at]], dim=1)
    with torch.inference_mode():
        both = surprisals(lm, {**BATCH, "wanted": columns})
        torch.testing.assert_close(both, surprisals(lm, BATCH)[:, None].expand(-1, 2))


def reference_loss(lm: Any) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for ids, positions, tokens in zip(BATCH["input_ids"], BATCH["position_ids"], labels(BATCH), strict=True):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        for start, end in itertools.pairwise(starts):
            logits = lm(input_ids=ids[None, start:end]).logits[0]
            total = total + torch.nn.functional.cross_entropy(logits, tokens[start:end], reduction="sum")
    return total


def test_bfloat16_weights_keep_a_float32_adapter_and_loss(tokenizer: Any) -> None:
    lm = make_model(len(tokenizer))
    with torch.no_grad():
        expected = reference(lm, BATCH)
    lm = lm.to(torch.bfloat16)
    give_surprisals(lm, autocast=torch.bfloat16)
    model = add_adapter(lm, LoraSettings(rank=2))
    values = surprisals(model, BATCH)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), expected, atol=0.05, rtol=0)
    values.sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in trained)
    assert any(p.grad.abs().sum() > 0 for p in trained)


@pytest.mark.model
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_rounding_is_not_taken_for_a_fault_of_the_attention(name: str, dtype: str, autocast: Any) -> None:
    lm = load_causal_lm(name, device="cpu", dtype=dtype).model
    give_surprisals(lm, autocast=autocast)
    assert lm.config._attn_implementation == PACKED_ATTENTION


@pytest.mark.model
def test_examples_that_see_each_other_are_refused_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_text(lm: Any, input_ids: Tensor, *_: Any) -> Tensor:
        states: Tensor = lm.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
        return states

    monkeypatch.setattr(module, "_last_states", one_text)
    lm = load_causal_lm("smollm2-135m", device="cpu", dtype="bfloat16").model
    with pytest.raises(ModelError, match="LlamaForCausalLM gives other probabilities"):
        give_surprisals(lm, autocast=torch.bfloat16)


def test_a_head_that_does_more_is_refused(tokenizer: Any) -> None:
    lm = make_model(len(tokenizer))
    plain = lm.forward

    def scaled(**arguments: Any) -> Any:
        output = plain(**arguments)
        output.logits = output.logits * 5
        return output

    lm.forward = scaled
    with pytest.raises(ModelError, match="LlamaForCausalLM does more to its last states"):
        give_surprisals(lm, autocast=None)


def with_soft_cap(lm: Any, cap: float) -> Any:
    """Gemma's last step."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=lm.config.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        final_logit_softcapping=cap,
        initializer_range=0.3,
    )
    return Gemma2ForCausalLM(config).eval()
