"""Publishing to a hub through the real client: everything in one commit, or nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from fake_hub import TOKEN, Hub, serve
from tiny_training import Script

from terselm.errors import CheckpointError, ConfigError
from terselm.models.utility_head import UtilityHead
from terselm.train.provenance import combined_sha256
from terselm.train.publish import Form, HubPlace, publish, publish_to_hub, upload
from terselm.train.verify import verify

PLACE = HubPlace(repo="org/small")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve() as server:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # the server speaks LFS
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # between its retries
        yield server


@pytest.fixture(scope="module")
def folder(finished: Script, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish(finished.run, tmp_path_factory.mktemp("published") / "small", Form(adapter_only=True)).path


def test_the_command_publishes_and_the_download_verifies(hub: Hub, finished: Script, tmp_path: Path) -> None:
    """The real command in its own process; then what it put there is downloaded, verified and loaded."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "cache")}
    code = "from terselm.cli import main; main()"
    command = [sys.executable, "-c", code, "publish", str(finished.run), "--to", "hub:org/small", "--tag", "v1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    repository = hub.repositories["org/small"]
    assert done.stdout.strip() == f"{hub.url}/org/small/commit/{repository.head}"
    assert repository.private
    assert len(repository.commits) == 2  # the empty one that every repository begins with, and ours
    assert repository.tags == {"v1": repository.head}
    assert 'PromptCompressor.from_pretrained("org/small")' in repository.commits[-1]["README.md"].decode()
    code = "import sys, huggingface_hub as h; h.snapshot_download('org/small', revision='v1', local_dir=sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "copy")], env=environment, check=True)
    assert verify(tmp_path / "copy") < 1e-4


def test_a_head_is_loaded_from_the_hub(hub: Hub, tiny_model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "with_head"
    shutil.copytree(tiny_model, copy)
    hidden_size = int(json.loads((tiny_model / "config.json").read_text())["hidden_size"])
    UtilityHead(hidden_size, seed=3).save(copy, {"target": "some-target"})
    upload(copy, HubPlace(repo="org/useful"), default_tag="v1")
    upload(tiny_model, HubPlace(repo="org/plain"), default_tag="v1")
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "cache")}
    code = (
        "from terselm.models import load_causal_lm as load\n"
        "print(load('org/useful', device='cpu').utility.facts, load('org/plain', device='cpu').utility)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "{'target': 'some-target'} None"


def test_a_tag_comes_from_what_was_trained(hub: Hub, finished: Script, tmp_path: Path) -> None:
    publish_to_hub(finished.run, PLACE, Form(adapter_only=True))
    files = hub.repositories["org/small"].commits[-1]
    assert "model.safetensors" not in files
    adapter = finished.run / "adapter" / "adapter_model.safetensors"
    assert files["adapter_model.safetensors"] == adapter.read_bytes()
    assert list(hub.repositories["org/small"].tags) == [f"run-{combined_sha256(adapter.parent)[:12]}"]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert verify(tmp_path) < 1e-4


def test_a_later_version_replaces_every_file(hub: Hub, folder: Path) -> None:
    upload(folder, PLACE, default_tag="v1")
    repository = hub.repositories["org/small"]
    repository.commits[-1] = {**repository.commits[-1], "old.txt": b"", ".gitattributes": b"*.safetensors"}
    upload(folder, PLACE, default_tag="v2")
    assert len(repository.commits) == 3
    assert "old.txt" not in repository.commits[-1]
    assert ".gitattributes" in repository.commits[-1]
    assert repository.tags["v2"] == repository.head


def test_the_same_tag_is_not_moved(hub: Hub, folder: Path) -> None:
    upload(folder, PLACE, default_tag="v1")
    with pytest.raises(CheckpointError, match="org/small has a tag v1 already: this was published before"):
        upload(folder, PLACE, default_tag="v1")
    assert len(hub.repositories["org/small"].commits) == 2


@pytest.mark.parametrize("word", ["preupload", "objects/batch", "lfs-objects", "/commit/"])
def test_a_server_error_in_the_middle_publishes_nothing(hub: Hub, folder: Path, word: str) -> None:
    hub.faults[word] = 503
    with pytest.raises(CheckpointError) as raised:
        upload(folder, PLACE, default_tag="v1")
    assert "org/small was left as it was" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert any(word in asked for asked in hub.asked)
    assert hub.repositories["org/small"].commits == [{}]
    assert hub.repositories["org/small"].tags == {}


def test_a_server_error_at_the_tag_says_what_is_there(hub: Hub, folder: Path) -> None:
    hub.faults["/tag/"] = 500
    with pytest.raises(CheckpointError, match=r"holds the files in commit 0+2, but without the tag v1"):
        upload(folder, PLACE, default_tag="v1")


def test_an_unreachable_hub_is_found_before_the_work(
    finished: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with serve() as server:
        gone = server.url  # nobody listens there any more
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", gone)
    work: list[Any] = []
    monkeypatch.setattr("terselm.train.publish.publish", lambda *a: work.append(a))
    with pytest.raises(CheckpointError, match=r"cannot be reached \(.*\); cannot publish to org/small$"):
        publish_to_hub(finished.run, PLACE)
    assert not work


def test_a_token_that_is_refused(hub: Hub, finished: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    with pytest.raises(CheckpointError, match=r"the hub refused the token \(401\)"):
        publish_to_hub(finished.run, PLACE)
    assert hub.repositories == {}


def test_no_token(finished: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ConfigError, match="needs a token that may write; set HF_TOKEN"):
        publish_to_hub(finished.run, PLACE)


@pytest.mark.parametrize("name", ["small", "org/small/extra", "org/..", ""])
def test_names_that_the_hub_would_not_take(name: str) -> None:
    with pytest.raises(ConfigError, match="expected hub:ORGANISATION/NAME"):
        HubPlace(repo=name)
