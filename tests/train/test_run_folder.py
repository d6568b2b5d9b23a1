"""What a run folder allows: going on, standing still, and refusing to overwrite."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from terselm.errors import CheckpointError, ConfigError
from terselm.train.run_folder import RunFolder, run_key


def save(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_text("weights")


def checkpoint(folder: RunFolder, step: int, *, whole: bool) -> Path:
    path = folder.checkpoints / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "optimizer.pt").write_text("half")
    if whole:
        folder.mark_whole(step)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run", "key")


def test_the_key_changes_with_the_config_and_the_data() -> None:
    assert len({run_key("a: 1", "x"), run_key("a: 2", "x"), run_key("a: 1", "y")}) == 3


def test_a_new_folder_begins_at_the_start(folder: RunFolder) -> None:
    assert not folder.is_finished()
    assert folder.begin("a: 1\n") is None
    assert (folder.path / "config.yaml").read_text() == "a: 1\n"


def test_a_finished_run_is_known(folder: RunFolder) -> None:
    folder.begin("")
    folder.finish({"x": 1}, save)
    assert folder.is_finished()
    assert json.loads(folder.metrics.read_text()) == {"run_key": "key", "x": 1}


def test_another_run_is_refused(folder: RunFolder) -> None:
    folder.begin("")
    folder.finish({}, save)
    with pytest.raises(ConfigError, match="holds a finished run with other settings or data; set another run_dir"):
        RunFolder(folder.path, "other").is_finished()


def test_an_unfinished_other_run_is_refused(folder: RunFolder) -> None:
    checkpoint(folder, 5, whole=True)
    with pytest.raises(ConfigError, match="unfinished run"):
        RunFolder(folder.path, "other").is_finished()


def test_another_run_without_a_whole_checkpoint_is_no_loss(folder: RunFolder) -> None:
    torn = checkpoint(folder, 5, whole=False)
    other = RunFolder(folder.path, "other")
    assert not other.is_finished()
    assert other.begin("") is None
    assert not torn.exists()


def test_it_goes_on_from_the_last_whole_checkpoint(folder: RunFolder) -> None:
    older, newer = checkpoint(folder, 5, whole=True), checkpoint(folder, 10, whole=True)
    torn = checkpoint(folder, 15, whole=False)
    assert folder.begin("") == newer
    assert older.exists()
    assert not torn.exists()


@pytest.mark.parametrize("fault", ["cut", "changed", "gone"])
def test_a_checkpoint_that_was_damaged_later_is_passed_over(folder: RunFolder, fault: str) -> None:
    older, newer = checkpoint(folder, 5, whole=True), checkpoint(folder, 10, whole=True)
    file = newer / "optimizer.pt"
    file.unlink() if fault == "gone" else file.write_text("hal" if fault == "cut" else "HALF")
    assert folder.begin("") == older
    assert not newer.exists()


def test_a_run_can_begin_anew(folder: RunFolder) -> None:
    checkpoint(folder, 5, whole=True)
    folder.note_rows_per_pass(2)
    assert folder.noted_rows_per_pass() == 2
    assert folder.begin("", resume=False) is None
    assert list(folder.checkpoints.iterdir()) == []
    assert folder.noted_rows_per_pass() is None


def test_a_fault_while_saving_leaves_no_adapter(folder: RunFolder) -> None:
    def fail(partial: Path) -> None:
        save(partial)
        raise OSError(errno.ENOSPC, "No space left on device")

    folder.begin("")
    with pytest.raises(CheckpointError, match="no space left on device; the result could not be written; the check"):
        folder.finish({}, fail)
    assert not folder.result.exists()
    assert not folder.is_finished()


def test_an_adapter_without_metrics_is_damaged(folder: RunFolder) -> None:
    folder.result.mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"metrics\.json is missing or damaged"):
        folder.is_finished()


def test_a_file_in_its_place_is_refused(folder: RunFolder) -> None:
    folder.path.write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        folder.is_finished()
