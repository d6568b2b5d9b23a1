"""Bulk runs that are killed, starved of disk, or shared by processes: nothing is lost and nothing comes twice."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from bulk_runs import compressor, names, read_rows, rows_of, settings, write_rows

from terselm.compress.bulk import compress_file
from terselm.errors import TerseLMError
from terselm.files import remove_partials

pytestmark = pytest.mark.slow

PATHS = [str(folder) for folder in Path(__file__).parents[:2]]
ROWS = 800
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["test_bulk_faults"])

SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[3:]
from bulk_runs import compressor, settings
from terselm.compress.bulk import compress_file
compress_file(Path(sys.argv[1]), Path(sys.argv[2]), compressor, settings())
"""


def child(source: Path, out: Path, rank: int, processes: int, most_bytes: int, said: Connection | None) -> None:
    """A run in a process of its own; an error of the user's is said and ends it with status 2."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(processes))
    torch.set_num_threads(1)
    if most_bytes >= 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    try:
        compress_file(source, out, compressor, settings(batch_size=4))
    except TerseLMError as error:
        if said is not None:
            said.send(str(error))
        sys.exit(2)


def start(
    source: Path,
    out: Path,
    *,
    rank: int = 0,
    processes: int = 1,
    most_bytes: int = -1,
    said: Connection | None = None,
) -> ForkServerProcess:
    process = FORKS.Process(target=child, args=(source, out, rank, processes, most_bytes, said))
    process.start()
    return process


def end(process: ForkServerProcess, timeout: float = 120) -> int | None:
    process.join(timeout)
    return process.exitcode


def with_bad_rows(path: Path) -> Path:
    rows = rows_of(ROWS)
    for n in range(0, ROWS, 97):
        rows[n]["budget"] = 0
    return write_rows(path, rows)


def committed(folder: Path) -> list[int]:
    """Lines of the source that are in a journal."""
    lines = [line for path in folder.glob("out.*.journal*") for line in path.read_bytes().split(b"\n")[1:-1]]
    return [int(line.split(b'"line": ')[1].split(b",")[0]) for line in lines]


def compress_all(source: Path, out: Path) -> None:
    """Kill a run when all rows are in its journal, before it writes them out."""
    process = start(source, out)
    while len(committed(out.parent)) < ROWS:
        time.sleep(0.001)
    process.kill()
    end(process)
    out.with_name(f".{out.name}.journal.lock").unlink()
    remove_partials(out)
    out.with_name("out.rejected.jsonl").unlink(missing_ok=True)
    assert names(out.parent) == [f"{out.name}.journal"]


def check_complete(source: Path, folder: Path, whole: Path) -> None:
    """The output is that of an uninterrupted run, and nothing else is left."""
    out = folder / "out.jsonl"
    assert out.read_bytes() == (whole / "out.jsonl").read_bytes()
    assert (folder / "out.rejected.jsonl").read_bytes() == (whole / "out.rejected.jsonl").read_bytes()
    assert [row["id"] for row in read_rows(out)] == [f"r{n}" for n in range(ROWS) if n % 97]
    assert names(folder) == ["out.jsonl", "out.rejected.jsonl"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_bad_rows(tmp_path_factory.mktemp("source") / "in.jsonl")


@pytest.fixture(scope="module")
def whole(source: Path) -> Path:
    """The outputs of a run that nothing happens to."""
    folder = source.parent / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(PATHS))  # where the server that forks finds what it loads
        assert end(start(source, folder / "out.jsonl")) == 0
    return folder


def test_after_many_kills_the_output_is_whole(tmp_path: Path, source: Path, whole: Path) -> None:
    chance = random.Random(3)
    out = tmp_path / "out.jsonl"
    done: list[int] = []
    for _ in range(12):
        process = start(source, out)
        until = len(done) + chance.randrange(4, 50)
        while len(now := committed(tmp_path)) < until:
            assert process.is_alive(), "ended before it could be killed; give it more rows"
            time.sleep(0.002)
        time.sleep(chance.random() * 0.02)
        process.kill()
        assert end(process) == -signal.SIGKILL
        now = committed(tmp_path)
        assert now[: len(done)] == done
        done = now
        assert not out.exists()
        with (tmp_path / "out.jsonl.journal").open("ab") as file:  # as if the kill had come in the middle of a write
            file.write(b'{"line": 800,  "result": {"compressed"'[: chance.randrange(1, 38)])
    assert len(done) == len(set(done))
    assert end(start(source, out)) == 0
    check_complete(source, tmp_path, whole)


def test_kills_while_the_output_is_written(tmp_path: Path, source: Path, whole: Path) -> None:
    """All rows are in the journal; each run gets a little farther with the last steps."""
    out, journal, lock = (tmp_path / name for name in ("out.jsonl", "out.jsonl.journal", ".out.jsonl.journal.lock"))
    compress_all(source, out)
    seen = set()
    for step in range(200):
        lock.unlink(missing_ok=True)
        process = start(source, out)
        while not lock.exists() and process.is_alive():
            time.sleep(0.0005)
        time.sleep(0.002 * step)
        process.kill()
        end(process)
        if not journal.exists():
            break
        seen.add(tuple(names(tmp_path)))
        if out.exists():
            assert out.read_bytes() == (whole / "out.jsonl").read_bytes()
        else:
            assert sorted(committed(tmp_path)) == list(range(1, ROWS + 1))
    assert len(seen) > 2, "no kill met the last steps"
    lock.unlink(missing_ok=True)
    check_complete(source, tmp_path, whole)


def test_two_processes_and_kills(tmp_path: Path, source: Path, whole: Path) -> None:
    """Either may be killed at any time; at last one process alone finishes what two began."""
    chance = random.Random(5)
    out = tmp_path / "out.jsonl"
    for _ in range(6):
        both = [start(source, out, rank=rank, processes=2) for rank in range(2)]
        until = len(committed(tmp_path)) + chance.randrange(10, 80)
        while len(committed(tmp_path)) < until:
            assert both[0].is_alive(), "ended before it could be killed; give it more rows"
            time.sleep(0.002)
        for process in chance.sample(both, 2):
            process.kill()
            assert end(process) == -signal.SIGKILL
        assert not out.exists()
    assert {path.name for path in tmp_path.glob("out*")} == {"out.jsonl.journal", "out.jsonl.journal-1"}
    done = committed(tmp_path)
    assert len(done) == len(set(done)) < ROWS
    assert end(start(source, out)) == 0
    check_complete(source, tmp_path, whole)


def test_two_processes_at_once(tmp_path: Path, source: Path, whole: Path) -> None:
    out = tmp_path / "out.jsonl"
    both = [start(source, out, rank=rank, processes=2) for rank in range(2)]
    assert [end(process) for process in both] == [0, 0]
    check_complete(source, tmp_path, whole)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_full_disk_loses_nothing(tmp_path: Path, source: Path, whole: Path, ending: str) -> None:
    """A limit on the size of a file stands for the disk; it grows from run to run, as if room were made."""
    out, journal = tmp_path / f"out.{ending}", tmp_path / f"out.{ending}.journal"
    end_of_child, said = FORKS.Pipe(duplex=False)
    done: list[int] = []
    for most in (0, 1, 100, 5_000, 20_001, 40_000, 40_000, 40_111):
        assert end(start(source, out, most_bytes=most, said=said)) == 2
        assert re.search(r"cannot write .*File too large; nothing that is done is lost", end_of_child.recv())
        now = committed(tmp_path)
        assert now[: len(done)] == done
        done = now
        assert names(tmp_path) == [journal.name]
    assert ROWS / 10 < len(done) == len(set(done)) < ROWS
    compress_all(source, out)
    for most, there in ((0, []), (1000, []), (10_000, ["out.rejected.jsonl"])):  # now it fails at the outputs
        assert end(start(source, out, most_bytes=most, said=said)) == 2
        assert re.search(r"cannot write .*File too large; nothing that is done is lost", end_of_child.recv())
        assert names(tmp_path) == [journal.name, *there]
    assert end(start(source, out)) == 0
    if ending == "jsonl":
        check_complete(source, tmp_path, whole)
    else:
        assert pq.read_table(out).to_pylist() == read_rows(whole / "out.jsonl")


def test_accelerate_launch(tmp_path: Path, source: Path, whole: Path) -> None:
    """The launcher that users have, with two processes on the CPU."""
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    out = tmp_path / "done" / "out.jsonl"
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    subprocess.run(
        [sys.executable, "-m", *launch, str(script), str(source), str(out), *PATHS],
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        check=True,
        timeout=300,
    )
    check_complete(source, out.parent, whole)
