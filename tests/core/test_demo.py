"""The parts of the demo that a smooth run does not show."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
from package_tree import ROOT


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The demo as a module, in an empty folder."""
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    return module


def test_a_command_is_shown_and_its_output_returned(demo: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.run(["python", "-c", "print('é')"], capture=True) == "é\n"
    assert capsys.readouterr().out == "$ python -c 'print('\"'\"'é'\"'\"')'\n"


def test_commands_beside_the_interpreter_come_first(demo: ModuleType) -> None:
    shown = demo.run(["python", "-c", "import sys; print(sys.prefix)"], capture=True)
    assert shown.strip() == sys.prefix


@pytest.mark.parametrize(("code", "status"), [("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 9)", 137)])
def test_a_failing_command_stops_it(
    demo: ModuleType, code: str, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        demo.run(["python", "-c", code])
    assert stopped.value.code == status
    assert "the demo stops here" in capsys.readouterr().err


def test_a_missing_command_is_named(demo: ModuleType) -> None:
    with pytest.raises(SystemExit, match="no command 'no-such-command'"):
        demo.run(["no-such-command"])


def test_a_checkpoint_of_an_earlier_run_is_made_again(demo: ModuleType) -> None:
    assert not demo.is_published()
    weights = demo.RUN / "adapter" / "adapter_model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"")
    demo.CHECKPOINT.mkdir()
    os.utime(weights, (1, 1))
    assert demo.is_published()
    os.utime(demo.CHECKPOINT, (0, 0))
    assert not demo.is_published()
    assert not demo.CHECKPOINT.exists()
