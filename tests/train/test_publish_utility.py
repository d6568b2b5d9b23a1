"""A utility head goes wherever its weights go, and nowhere else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import Script

from terselm import CompressionSettings, PromptCompressor
from terselm.errors import CheckpointError
from terselm.models import load_causal_lm
from terselm.models.utility_head import HEAD_WEIGHTS, UtilityHead
from terselm.train.provenance import file_sha256
from terselm.train.publish import Form, publish
from terselm.train.settings import Precision
from terselm.train.verify import KEPT_REFERENCE, PROVENANCE, verify

DEMONSTRATIONS = ["red green blue one two. three red blue.", "one one two green. blue blue red two one."]


@pytest.fixture(scope="module")
def hidden_size(tiny_model: Path) -> int:
    return int(json.loads((tiny_model / "config.json").read_text())["hidden_size"])


@pytest.fixture(scope="module")
def run(finished: Script, model_name: str, hidden_size: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that has trained a head."""
    folder = tmp_path_factory.mktemp("with_head") / "run"
    shutil.copytree(finished.run, folder)
    UtilityHead(hidden_size, seed=7).save(folder / "adapter", {"base": model_name, "target": "some-target"})
    return folder


@pytest.fixture(scope="module")
def published(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish(run, tmp_path_factory.mktemp("published") / "tiny-useful").path


def test_every_folder_gives_the_same_result(run: Path, published: Path, tmp_path: Path) -> None:
    adapter_only = publish(run, tmp_path / "adapter-only", Form(adapter_only=True)).path
    settings = CompressionSettings(rank_by="utility")
    texts = set()
    for folder in (run, run / "adapter", published, adapter_only):
        compressor = PromptCompressor.from_pretrained(folder, device="cpu", settings=settings)
        assert compressor.lm.utility is not None
        assert compressor.lm.utility.facts["target"] == "some-target"
        texts.add(compressor.compress(demonstrations=DEMONSTRATIONS, question="green one?", rate=0.5).text)
    assert len(texts) == 1


def test_it_is_verified(published: Path, run: Path, hidden_size: int, tmp_path: Path) -> None:
    verify(published)
    weights = json.loads((published / PROVENANCE).read_text())["weights"]
    assert weights["utility_difference"] < 1e-3
    assert file_sha256(published / HEAD_WEIGHTS) == file_sha256(run / "adapter" / HEAD_WEIGHTS)
    assert load_file(published / KEPT_REFERENCE)["utility"].shape == (2, 64)
    copy = tmp_path / "copy"
    shutil.copytree(published, copy)
    UtilityHead(hidden_size, seed=8).save(copy, {})
    with pytest.raises(CheckpointError, match=f"these files differ: {HEAD_WEIGHTS}"):
        verify(copy)
    provenance = json.loads((copy / PROVENANCE).read_text())
    provenance["sha256"][HEAD_WEIGHTS] = file_sha256(copy / HEAD_WEIGHTS)  # as one who means to deceive would write
    (copy / PROVENANCE).write_text(json.dumps(provenance))
    with pytest.raises(CheckpointError, match=r"the utility head in .* changes its scores"):
        verify(copy)


def test_in_bfloat16_it_stays_float32(run: Path, tmp_path: Path) -> None:
    folder = publish(run, tmp_path / "half", Form(dtype=Precision.BFLOAT16)).path
    assert load_file(folder / HEAD_WEIGHTS)["weight"].dtype == torch.float32
    verify(folder)


def test_the_card_says_what_it_is_for(published: Path, finished: Script, tmp_path: Path) -> None:
    card = (published / "README.md").read_text()
    assert "Aligned for use: utility of each sentence or line of a prompt for the answers of `some-target`." in card
    assert "- utility\n" in card
    without = publish(finished.run, tmp_path / "plain").path
    assert "utility" not in (without / "README.md").read_text()
    assert not (without / HEAD_WEIGHTS).exists()
    assert load_causal_lm(without, device="cpu").utility is None


def test_a_head_of_the_base_is_not_the_adapters(run: Path, tiny_model: Path, tmp_path: Path, hidden_size: int) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    UtilityHead(hidden_size).save(base, {})
    assert load_causal_lm(base, device="cpu").utility is not None
    adapter = tmp_path / "adapter"
    shutil.copytree(run / "adapter", adapter)
    (adapter / HEAD_WEIGHTS).unlink()
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(base)}))
    assert load_causal_lm(adapter, device="cpu").utility is None


@pytest.mark.parametrize(
    ("size", "facts", "message"),
    [(3, {}, "it is the head of another small LM"), (None, {"base": "other"}, "was trained with the base 'other'")],
)
def test_a_head_of_another_model_is_refused(
    size: int | None,
    facts: dict[str, str],
    message: str,
    run: Path,
    published: Path,
    hidden_size: int,
    tmp_path: Path,
) -> None:
    for name, source in (("run", run), ("published", published)):
        copy = tmp_path / name
        shutil.copytree(source, copy)
        UtilityHead(size or hidden_size).save(copy / "adapter" if name == "run" else copy, facts)
        with pytest.raises(CheckpointError, match=message):
            load_causal_lm(copy, device="cpu")
    with pytest.raises(CheckpointError, match=message):
        publish(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()
