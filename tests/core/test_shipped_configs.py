"""Every file under configs/ loads with the code that reads it, and opens with the command that uses it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from package_tree import ROOT

from terselm.compress.settings import CompressionSettings, paper_settings
from terselm.config import load_config
from terselm.evaluate.opening import parse_method

CONFIGS = sorted(path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*") if path.is_file())


def align(path: Path) -> Any:
    from terselm.train.config import AlignConfig

    return load_config(AlignConfig, path)


def accelerate(path: Path) -> Any:
    from accelerate.commands.config.config_args import load_config_from_file

    return load_config_from_file(str(path))


def compress(path: Path) -> Any:
    return load_config(CompressionSettings, path)


def deepspeed(path: Path) -> Any:
    """As the accelerate configuration that names it passes it on."""
    from accelerate.utils import DeepSpeedPlugin

    (launch,) = [
        file for file in (ROOT / "configs/accelerate").iterdir() if str(path.relative_to(ROOT)) in file.read_text()
    ]
    assert accelerate(launch).deepspeed_config["deepspeed_config_file"] == str(path.relative_to(ROOT))
    return DeepSpeedPlugin(hf_ds_config=str(path)).zero_stage == int(path.stem.removeprefix("zero"))


def collect(path: Path) -> Any:
    from terselm.data.collection.settings import CollectSettings

    return load_config(CollectSettings, path)


def evaluate(path: Path) -> Any:
    from terselm.evaluate.opening import parse_method
    from terselm.evaluate.settings import EvaluateSettings, parse_budget

    settings = load_config(EvaluateSettings, path)
    return [parse_method(name) for name in settings.methods] + [parse_budget(name) for name in settings.budgets]


def prices(path: Path) -> Any:
    import yaml

    from terselm.data.collection.money import read_price

    return [read_price(path, model) for model in yaml.safe_load(path.read_text(encoding="utf-8"))]


READERS: dict[str, Callable[[Path], Any]] = {
    "align": align,
    "accelerate": accelerate,
    "collect": collect,
    "compress": compress,
    "deepspeed": deepspeed,
    "evaluate": evaluate,
    "prices": prices,
}


def test_each_reader_has_something_to_read() -> None:
    assert {path.parts[1] for path in CONFIGS} == READERS.keys()


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_it_loads(path: Path) -> None:
    assert READERS[path.parts[1]](ROOT / path)


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.suffix != ".json"], ids=str)
def test_it_opens_with_the_command_that_uses_it(path: Path) -> None:
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    opening = []
    for line in lines:
        if not line.startswith("#"):
            break
        opening.append(line)
    commands = [line for line in opening if path.as_posix() in line]
    assert commands, f"{path} opens with no comment that holds a command with {path.as_posix()}"
    assert any(word in line for line in commands for word in ("accelerate launch", "terselm "))


def test_the_settings_of_the_paper_and_the_defaults_are_what_their_files_say() -> None:
    folder = ROOT / "configs" / "compress"
    assert load_config(CompressionSettings, folder / "paper.yaml") == paper_settings()
    assert parse_method("terselm:paper").settings == paper_settings()
    assert load_config(CompressionSettings, folder / "default.yaml") == CompressionSettings()
