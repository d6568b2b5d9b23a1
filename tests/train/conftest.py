"""The tiny model, its tokenizer and its records on disk, and a finished run of the real script."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_training import TINY_RUN, WORDS, Script, make_model, make_tokenizer


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tokenised texts of tests stay out of the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TERSELM_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_model(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def records_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty prompts with one to three answers each; answers repeat a word of the prompt, which can be learnt."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("records") / "records.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for index in range(40):
            prompt = " ".join(draw.choices(WORDS, k=draw.randint(2, 12))) + f" {index}"
            for _ in range(draw.randint(1, 3)):
                answer = " ".join(draw.choices(WORDS[:6], k=draw.randint(1, 9)))
                file.write(json.dumps({"prompt": prompt, "completion": answer}) + "\n")
    return path


@pytest.fixture(scope="session")
def model_name(tiny_model: Path) -> str:
    """The folder, written as only a user would write it."""
    return f"{tiny_model.parent}/./{tiny_model.name}"


@pytest.fixture(scope="session")
def make_script(model_name: str, records_file: Path) -> Callable[[Path], Script]:
    def make(folder: Path) -> Script:
        config = folder / "align.yaml"
        config.write_text(TINY_RUN.format(records=records_file, model=model_name, run=folder / "run"), encoding="utf-8")
        return Script(config, folder / "run")

    return make


@pytest.fixture(scope="session")
def finished(make_script: Callable[[Path], Script], tmp_path_factory: pytest.TempPathFactory) -> Script:
    """A run that was left to finish."""
    script = make_script(tmp_path_factory.mktemp("finished"))
    done = script()
    assert done.returncode == 0, done.stderr
    return script
