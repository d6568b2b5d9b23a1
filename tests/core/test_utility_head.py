"""The head that scores units: what it computes, and what of a file it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from terselm.errors import CheckpointError
from terselm.models.utility_head import HEAD_WEIGHTS, UtilityHead


def test_it_is_a_linear_map_in_float32() -> None:
    head = UtilityHead(3)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([1.0, -2.0, 0.5]))
        head.bias.fill_(0.25)
    states = torch.tensor([[1.0, 1.0, 1.0], [0.0, -3.0, 2.0]])
    for given in (states, states.bfloat16()):
        scores = head(given)
        assert scores.dtype == torch.float32
        assert scores.tolist() == [-0.25, 7.25]


def test_a_score_does_not_depend_on_the_others_nor_on_autocast() -> None:
    head, states = UtilityHead(64), torch.randn(20, 64, generator=torch.Generator().manual_seed(1))
    scores = head(states)
    assert torch.equal(torch.cat([head(state[None]) for state in states]), scores)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(states), scores)


def test_first_weights_are_the_same_for_a_seed() -> None:
    assert torch.equal(UtilityHead(16, seed=3).weight, UtilityHead(16, seed=3).weight)
    assert not torch.equal(UtilityHead(16, seed=3).weight, UtilityHead(16, seed=4).weight)
    assert UtilityHead(16).bias.item() == 0


def test_equal_heads_are_equal_files(tmp_path: Path) -> None:
    facts = {"base": "a", "target": "b", "for": "c", "and": "d"}
    for name in "one", "two", "three":
        (tmp_path / name).mkdir()
        UtilityHead(8).save(tmp_path / name, facts)
    assert len({path.read_bytes() for path in tmp_path.glob(f"*/{HEAD_WEIGHTS}")}) == 1


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    head = UtilityHead(16, seed=5)
    head.save(tmp_path, {"base": "smollm2-135m", "target": "qwen"})
    found = UtilityHead.load(tmp_path, 16, base="smollm2-135m")
    assert torch.equal(found.weight, head.weight)
    assert torch.equal(found.bias, head.bias)
    assert found.facts == {"base": "smollm2-135m", "target": "qwen"}
    assert set(load_file(tmp_path / HEAD_WEIGHTS)) == {"weight", "bias"}
    assert UtilityHead.load(tmp_path, 16, base="/elsewhere/smollm2-135m").facts == found.facts


def spoil(folder: Path, weights: dict[str, Any]) -> None:
    save_file(weights, folder / HEAD_WEIGHTS)


def test_what_is_not_its_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is missing: this checkpoint was not aligned for use"):
        UtilityHead.load(tmp_path, 16)
    UtilityHead(16).save(tmp_path, {"base": "one/small-lm"})
    with pytest.raises(CheckpointError, match="states of 16 numbers, but the model's have 32: it is the head of"):
        UtilityHead.load(tmp_path, 32)
    with pytest.raises(CheckpointError, match="with the base 'one/small-lm', but the model here is made from 'other'"):
        UtilityHead.load(tmp_path, 16, base="other")
    spoil(tmp_path, {"weight": torch.ones(1, 16), "bias": torch.zeros(())})
    with pytest.raises(CheckpointError, match="expected a weight of one dimension"):
        UtilityHead.load(tmp_path, 16)
    spoil(tmp_path, {"weight": torch.full((16,), torch.nan), "bias": torch.zeros(())})
    with pytest.raises(CheckpointError, match="not finite"):
        UtilityHead.load(tmp_path, 16)
    (tmp_path / HEAD_WEIGHTS).write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match=r"cannot be read .* damaged"):
        UtilityHead.load(tmp_path, 16)


@pytest.mark.parametrize("facts", ["{", "7", "[1]"])
def test_facts_that_are_none_are_damage(tmp_path: Path, facts: str) -> None:
    weights = {"weight": torch.zeros(16), "bias": torch.zeros(())}
    save_file(weights, tmp_path / HEAD_WEIGHTS, metadata={"terselm": facts})
    with pytest.raises(CheckpointError, match="damaged"):
        UtilityHead.load(tmp_path, 16)
