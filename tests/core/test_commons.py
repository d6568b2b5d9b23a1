"""What every room uses: missing packages, reasons in one line, and how far a task is."""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path

import pytest

from terselm import progress
from terselm.errors import ConfigError
from terselm.extras import first_line, need
from terselm.progress import Progress, duration, say


def test_a_package_that_is_there_is_imported() -> None:
    assert need("numpy.linalg", "train") is sys.modules["numpy.linalg"]


def test_a_missing_package_is_named_with_what_brings_it() -> None:
    with pytest.raises(ConfigError) as caught:
        need("no_such_package.part", "collect")
    assert str(caught.value) == "no-such-package is not installed; run: pip install 'terselm[collect]'"


@pytest.mark.parametrize("code", ["import no_such_module", "raise ImportError('no libfoo.so:')"])
def test_a_broken_package_is_not_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    (tmp_path / "a_broken_package.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"a_broken_package cannot be imported: no .*|No module .*; install it again"):
        need("a_broken_package", "collect")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError(""), "ValueError"),
        (ValueError("\n\n  \nlate"), "late"),
        (ValueError(":\nthe reason"), "the reason"),
        (ValueError("Error while loading:\n  the reason\nmore"), "Error while loading: the reason"),
        (ValueError("nothing after:"), "nothing after"),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), "No such file or directory"),
        (OSError("made by a library"), "made by a library"),
        (KeyError("x"), "'x'"),
    ],
)
def test_the_reason_in_one_line(error: BaseException, line: str) -> None:
    assert first_line(error) == line


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (8.6, "9 s"), (185, "3 min 05 s"), (3599.6, "1 h 00 min"), (7800, "2 h 10 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


def test_lines_now_and_then(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    caplog.set_level(logging.INFO)
    with Progress(3000, "compressing", "prompt", done=1000) as bar:
        clock.now += 10
        bar.update(500)
        assert not caplog.messages
        clock.now += 90
        bar.update(500, "3 failed")
        bar.update(1)  # not again so soon
    assert caplog.messages == ["2,000 of 3,000 prompts, 3 failed, 10.0 prompts/s, 1 min 40 s left"]


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(4, "asking", "answer", done=1) as bar:
        assert bar._bar is not None
        bar._bar.delay = 0
        bar.update(2, "1 failed")
    assert "asking:  75%" in terminal.getvalue()
    assert "1 failed" in terminal.getvalue()


def test_a_line_for_the_user_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    say("hello")
    assert capsys.readouterr() == ("", "hello\n")
