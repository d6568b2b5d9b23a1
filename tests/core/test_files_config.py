"""Writers that die leave nothing under the final name; configuration says what is wrong with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import pytest

from terselm.config import dump_config, load_config, refuse
from terselm.errors import ConfigError, DataFormatError
from terselm.evaluate.settings import EvaluateSettings, SuiteName, SuiteSettings
from terselm.files import atomic_file, atomic_folder, read_json, remove_partials


def run_writer(code: str, path: Path) -> subprocess.Popen[str]:
    """A process that runs ``code`` with ``path`` bound to the given path."""
    setup = "import os, sys, time\nfrom pathlib import Path\nfrom terselm.files import *\npath = Path(sys.argv[1])\n"
    return subprocess.Popen([sys.executable, "-c", setup + code, str(path)], stdout=subprocess.PIPE, text=True)


def kill_when_ready(writer: subprocess.Popen[str]) -> None:
    assert writer.stdout is not None
    assert writer.stdout.readline() == "written\n"
    os.kill(writer.pid, signal.SIGKILL)
    assert writer.wait(timeout=30) == -signal.SIGKILL
    writer.stdout.close()


def test_folder_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run"
    with atomic_folder(path) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a.txt").write_text("a")
        assert not path.exists()
    assert (path / "sub" / "a.txt").read_text() == "a"
    assert [entry.name for entry in path.parent.iterdir()] == ["run"]


def test_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("mine")
    with pytest.raises(FileExistsError), atomic_folder(tmp_path / "run"):
        pytest.fail("the block must not run")
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]
    assert (tmp_path / "run" / "mine").read_text() == "mine"


def test_folder_whose_writer_fails_leaves_nothing(tmp_path: Path) -> None:
    def write() -> None:
        with atomic_folder(tmp_path / "run") as folder:
            (folder / "a").write_text("a")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert list(tmp_path.iterdir()) == []


def test_folder_of_a_killed_writer_never_bears_its_name(tmp_path: Path) -> None:
    path = tmp_path / "run"
    code = (
        "with atomic_folder(path) as folder:\n"
        "    (folder / 'config.json').write_text('{}')\n"
        "    print('written', flush=True)\n"
        "    time.sleep(60)\n"
    )
    kill_when_ready(run_writer(code, path))
    assert not path.exists()
    assert len(list(tmp_path.iterdir())) == 1  # what the dead writer left
    with atomic_folder(path) as folder:  # which does not stop the next one
        (folder / "config.json").write_text("{}")
    assert path.is_dir()
    remove_partials(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def test_file_of_a_killed_writer_is_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("old\n")
    code = (
        "with atomic_file(path) as file:\n"
        "    file.write('new\\n' * 10_000)\n"
        "    file.flush()\n"
        "    print('written', flush=True)\n"
        "    time.sleep(60)\n"
    )
    kill_when_ready(run_writer(code, path))
    assert path.read_text() == "old\n"
    remove_partials(path)
    assert list(tmp_path.iterdir()) == [path]


def test_killed_at_any_moment_the_file_is_old_or_new(tmp_path: Path) -> None:
    path = tmp_path / "counter"
    code = (
        "print('written', flush=True)\n"
        "for number in range(10**9):\n"
        "    with atomic_file(path) as file:\n"
        "        file.write(f'{number}\\n' * 5000)\n"
    )
    for moment in (0.02, 0.05, 0.11):
        writer = run_writer(code, path)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(moment)
        writer.kill()
        writer.wait(timeout=30)
        writer.stdout.close()
        if path.exists():
            lines = path.read_text().splitlines()
            assert len(lines) == 5000
            assert len(set(lines)) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_full_disk_leaves_the_old_and_no_half(tmp_path: Path, kind: str) -> None:
    """A write beyond the process's limit on file size fails as on a full disk, halfway through a file."""
    path = tmp_path / "out"
    if kind == "file":
        path.write_text("old")
    limit = (
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
    )
    write = {
        "file": "with atomic_file(path) as file:\n    file.write('x' * 100_000)\n",
        "folder": "with atomic_folder(path) as folder:\n    (folder / 'big').write_text('x' * 100_000)\n",
    }[kind]
    body = "".join(f"    {line}\n" for line in write.splitlines())
    code = limit + "try:\n" + body + "except OSError as error:\n    print(type(error).__name__, error.errno)\n"
    writer = run_writer(code, path)
    output, _ = writer.communicate(timeout=60)
    assert output == "OSError 27\n"  # EFBIG
    assert [entry.name for entry in tmp_path.iterdir()] == (["out"] if kind == "file" else [])
    if kind == "file":
        assert path.read_text() == "old"


def test_file_is_replaced_and_readable_as_the_umask_says(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    path.write_text("old")
    with atomic_file(path) as file:
        file.write("new\nlines 日本\n")
        assert path.read_text() == "old"
    assert path.read_bytes() == "new\nlines 日本\n".encode()
    plain = tmp_path / "plain"
    plain.write_text("")
    assert path.stat().st_mode == plain.stat().st_mode


def test_a_file_of_bytes_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "out.bin"
    with atomic_file(path, binary=True) as file:
        file.write(b"old")
    with pytest.raises(KeyError), atomic_file(path, binary=True) as file:
        file.write(b"new")
        raise KeyError
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1,\n "b" 2}', "a.json:2: broken JSON at character 6: "),
        (b'"\xff"', "a.json: not UTF-8 (byte 2)"),
        (b"[" * 100_000, "a.json: broken JSON: "),
        (None, "a.json: cannot be read: No such file or directory"),
    ],
)
def test_json_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataFormatError) as caught:
        read_json(path)
    assert message in str(caught.value)


def test_json_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": ["\xc3\xa9"]}')
    assert read_json(tmp_path / "a.json") == {"a": ["é"]}


def test_all_faults_are_refused_together() -> None:
    refuse([])
    with pytest.raises(ConfigError, match=r"^a is 1; b is 2$"):
        refuse(f"{name} is {value}" for name, value in (("a", 1), ("b", 2)))


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True, kw_only=True)
class Inner:
    learning_rate: float = 1e-4
    steps: int = 10

    def __post_init__(self) -> None:
        if self.steps <= 0:
            raise ConfigError(f"steps is {self.steps}; expected at least 1")


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str = "run"
    colour: Colour = Colour.RED
    seed: int | None = None
    targets: list[str] = field(default_factory=lambda: ["q_proj"])
    train: Inner = field(default_factory=Inner)


def write_yaml(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def test_defaults_then_file_then_overrides(tmp_path: Path) -> None:
    path = write_yaml(tmp_path, "# run it with: …\nname: from file\ntrain:\n  steps: 20\n  learning_rate: 1e-3\n")
    config = load_config(Outer, path, ["train.steps=30", "colour=blue", "targets=[a,b]"])
    assert config == Outer(
        name="from file", colour=Colour.BLUE, targets=["a", "b"], train=Inner(steps=30, learning_rate=1e-3)
    )
    assert isinstance(config.train, Inner)
    assert load_config(Outer) == Outer()


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load_config(Outer, write_yaml(tmp_path, "# nothing but a comment\n")) == Outer()


def test_a_resolved_config_is_what_a_user_would_write(tmp_path: Path) -> None:
    settings = EvaluateSettings(suite=SuiteSettings(name=SuiteName.BBH, data=tmp_path / "tasks"), budgets=["300"])
    written = dump_config(settings)
    assert "  name: bbh\n  questions: 200\n" in written
    assert f"  data: {tmp_path / 'tasks'}\n" in written
    assert load_config(EvaluateSettings, write_yaml(tmp_path, written)) == settings


def test_resolved_config_reads_back(tmp_path: Path) -> None:
    config = load_config(Outer, None, ["train.steps=7", "seed=3", "name='a: b'"])
    assert load_config(Outer, write_yaml(tmp_path, dump_config(config))) == config


@pytest.mark.parametrize(
    ("text", "overrides", "parts"),
    [
        ("train:\n  stesp: 5\n", [], ["train.stesp", "did you mean train.steps"]),
        ("", ["train.learning_rat=1"], ["train.learning_rat", "did you mean train.learning_rate"]),
        ("collour: blue\n", [], ["collour", "did you mean colour"]),
        ("zzz: 1\n", [], ["zzz", "name, colour, seed, targets, train"]),
        ("1: 2\n", [], ["1"]),
        ("", ["train.steps=many"], ["train.steps", "many"]),
        ("", ["train.steps=1.5"], ["train.steps", "1.5"]),
        ("colour: green\n", [], ["colour", "green", "red", "blue"]),
        ("seed: [1]\n", [], ["seed"]),
        ("targets: q_proj\n", [], ["targets"]),
        ("train: 5\n", [], ["train"]),
        ("train:\n  steps: 0\n", [], ["steps is 0"]),
        ("", ["train.steps=-1"], ["steps is -1"]),
        ("", ["steps"], ["'steps'", "key=value"]),
        ("- a\n- b\n", [], ["mapping"]),
        ("just text\n", [], ["just text"]),
        ("name: [1, 2\n", [], ["config.yaml", "line 2"]),
        ("name: a\nname: b\n", [], ["config.yaml", "duplicate key name", "line 2"]),
        ("", ["name=[1,"], ["name=[1,"]),
        ("name: ${nowhere}\n", [], ["nowhere"]),
    ],
)
def test_what_is_wrong_is_named_in_one_sentence(
    tmp_path: Path, text: str, overrides: list[str], parts: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Outer, write_yaml(tmp_path, text), overrides)
    message = str(caught.value)
    assert "\n" not in message
    named = message.replace(str(tmp_path), "")  # the folder bears this test's name
    for part in parts:
        assert part in named


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config file at .*missing\.yaml"):
        load_config(Outer, tmp_path / "missing.yaml")


def test_a_folder_is_not_a_config_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="directory"):
        load_config(Outer, tmp_path)


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"\xff\xfe\x00name: a")
    with pytest.raises(ConfigError):
        load_config(Outer, path)
