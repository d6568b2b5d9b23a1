"""Kinds of adapters, and all weights: what is saved gives the logits of what was trained."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import Script, make_model

from terselm.compress.engine.surprisal import SurprisalEngine
from terselm.errors import ConfigError
from terselm.models import load_causal_lm
from terselm.train.choices import Initialisation, Method
from terselm.train.config import AlignConfig, LoraSettings
from terselm.train.gathering import gather_trained
from terselm.train.lora import add_adapter, save_adapter
from terselm.train.publish import publish
from terselm.train.small_lm import load_small_lm
from terselm.train.verify import verify

IDS = torch.arange(2, 42)[None]

VARIANTS = {
    "plain": LoraSettings(rank=4, alpha=8),
    "rank-stabilised": LoraSettings(rank=4, alpha=8, rank_stabilised=True),
    "DoRA": LoraSettings(rank=4, alpha=8, weight_decomposed=True),
    "gaussian": LoraSettings(rank=4, alpha=8, initialisation=Initialisation.GAUSSIAN),
    "orthogonal": LoraSettings(rank=4, alpha=8, initialisation=Initialisation.ORTHOGONAL),
    "PiSSA": LoraSettings(rank=4, alpha=8, initialisation=Initialisation.PISSA),
    "PiSSA, rank-stabilised": LoraSettings(rank=4, alpha=8, initialisation=Initialisation.PISSA, rank_stabilised=True),
    "OLoRA": LoraSettings(rank=4, alpha=8, initialisation=Initialisation.OLORA),
}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_a_saved_adapter_gives_the_logits_that_were_trained(
    tiny_model: Path, tokenizer: Any, tmp_path: Path, settings: LoraSettings
) -> None:
    base = make_model(len(tokenizer))
    before = logits(base)
    torch.manual_seed(1)
    model = add_adapter(copy.deepcopy(base), settings)
    torch.testing.assert_close(logits(model), before, atol=1e-4, rtol=0)  # it begins as its base
    draw = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.requires_grad:  # as if it had been trained
            weight.data += 0.05 * torch.randn(weight.shape, generator=draw)
    trained = logits(model)
    assert (trained - before).abs().max() > 1e-2
    (tmp_path / "adapter").mkdir()
    save_adapter(model, tmp_path / "adapter", base=str(tiny_model), weights=gather_trained(model))
    loaded = load_causal_lm(tmp_path / "adapter", device="cpu", dtype="float32")
    torch.testing.assert_close(logits(loaded.model), trained, atol=1e-4, rtol=0)


def test_a_rank_beyond_the_weights_takes_one_sentence(tokenizer: Any) -> None:
    settings = LoraSettings(rank=200, initialisation=Initialisation.PISSA)
    with pytest.raises(ConfigError, match=r"lora\.rank is 200; lora\.initialisation=pissa gives .* at most 16"):
        add_adapter(make_model(len(tokenizer)), settings)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LoraSettings(weight_decomposed=True, initialisation=Initialisation.PISSA),
        lambda: AlignConfig(method=Method.QLORA, lora=LoraSettings(initialisation=Initialisation.OLORA)),
    ],
)
def test_what_does_not_go_together_is_refused(make: Callable[[], object]) -> None:
    with pytest.raises(ConfigError, match="initialisation"):
        make()


def test_without_bitsandbytes_4_bits_take_one_sentence(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = AlignConfig(model=str(tiny_model), method=Method.QLORA)
    with pytest.raises(ConfigError, match=r"method=qlora needs bitsandbytes; run: pip install 'terselm\[qlora\]'"):
        load_small_lm(config, torch.device("cpu"), torch.float32)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(ConfigError, match="method=qlora needs a GPU, and there is none"):
        load_small_lm(config, torch.device("cpu"), torch.float32)


def test_all_weights_are_trained_published_and_loaded(make_script: Callable[[Path], Script], tmp_path: Path) -> None:
    script = make_script(tmp_path)
    done = script("method=full", "optimisation.learning_rate=2e-3")
    assert done.returncode == 0, done.stderr
    held_out = script.metrics()["held_out"]
    assert held_out["after"]["bits_per_byte"] < held_out["before"]["bits_per_byte"]
    trained = load_causal_lm(script.run, device="cpu")
    assert SurprisalEngine(trained).score_texts([IDS[0].numpy()])[0].shape == (40,)
    assert "nothing to do" in script("method=full", "optimisation.learning_rate=2e-3").stderr
    published = publish(script.run, tmp_path / "published").path
    verify(published)
    torch.testing.assert_close(logits(load_causal_lm(published, device="cpu").model), logits(trained.model))
