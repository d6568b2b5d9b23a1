"""Kill alignment runs again and again, and say whether their adapters are those of a run that was left alone.

Run as a script: it imports everything once and forks each run, which calls align.py's `main` in a process of its own
and is killed with SIGKILL. So the time goes into killing, not into importing.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import terselm.train.alignment  # noqa: F401 (so that the forks need not)
from terselm.train.align import main

POLL = 0.005  # seconds


def fork(command: list[str], log: Path, rank: int, processes: int, port: int) -> int:
    """The id of a process that runs the command."""
    pid = os.fork()
    if pid:
        return pid
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if processes > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        os.environ.update({name: str(value) for name, value in place.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
    try:
        status = main(command)
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    sys.stderr.flush()
    os._exit(status)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def run(command: list[str], log: Path, processes: int, kill_now: Callable[[], bool], draw: random.Random) -> bool:
    """Run until it ends, or until it is killed; whether it was killed."""
    port = free_port() if processes > 1 else 0
    alive = [fork(command, log, rank, processes, port) for rank in range(processes)]
    while alive:
        for pid in alive[:]:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                alive.remove(pid)
                if status != 0:
                    sys.exit(f"a run ended with status {status}:\n{log.read_text()}")
        if alive and kill_now():
            draw.shuffle(alive)  # one dies first; the others notice, or not, as under a launcher
            for pid in alive:
                os.kill(pid, signal.SIGKILL)
                time.sleep(draw.choice([0, 0.05]))
            for pid in alive:
                os.waitpid(pid, 0)
            return True
        time.sleep(POLL)
    return False


def adapter(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def steps(folder: Path) -> int:
    found = [int(path.parent.name.split("-")[1]) for path in folder.glob("checkpoints/*/whole.json")]
    return max(found, default=0)


def moment(folder: Path, whole: float, last: int, draw: random.Random) -> Callable[[], bool]:
    """Whether the time to kill has come: some time after now, or soon after one of the steps still to come.

    Times alone would not do: on a busy machine they may all fall on the same few steps.
    """
    due = time.monotonic() + draw.uniform(0.1, 1.0) * whole
    if draw.random() < 0.3:
        return lambda: time.monotonic() >= due
    step = draw.randint(min(steps(folder) + 1, last), last)
    delay = draw.uniform(0, whole / last)
    due = math.inf

    def come() -> bool:
        nonlocal due
        if due == math.inf and steps(folder) >= step:
            due = time.monotonic() + delay
        return time.monotonic() >= due

    return come


def never() -> bool:
    return False


if __name__ == "__main__":
    config, root, kills, processes, seed = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:6])
    overrides = sys.argv[6:]
    draw = random.Random(seed)

    def command(folder: Path) -> list[str]:
        return ["--config", config, f"run_dir={folder}", *overrides]

    began = time.monotonic()
    run(command(root / "alone"), root / "log", processes, never, draw)
    whole, last = time.monotonic() - began, steps(root / "alone")
    expected = adapter(root / "alone")
    done: list[Path] = []
    at: list[int] = []
    while len(at) < kills:
        folder = root / f"killed-{len(done)}"
        killed = True
        while killed:
            kill_now = moment(folder, whole, last, draw) if len(at) < kills else never
            killed = run(command(folder), root / "log", processes, kill_now, draw)
            if killed:
                at.append(steps(folder))
        done.append(folder)
    same = [adapter(folder) == expected for folder in done]
    print(json.dumps({"kills": len(at), "steps_at_kill": at, "runs": len(done), "same": same, "alone": whole}))
