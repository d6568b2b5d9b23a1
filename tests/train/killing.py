"""Kill alignment runs again and again, and say whether their adapters are those of a run that was left alone.

Run as a script: it imports everything once and forks each run, which calls align.py's `main` in a process of its own
and is killed with SIGKILL. So the time goes into killing, not into importing.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import time
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


def run(command: list[str], log: Path, processes: int, kill_after: float | None, draw: random.Random) -> bool:
    """Run until it ends, or until it is killed; whether it was killed."""
    port = free_port() if processes > 1 else 0
    alive = [fork(command, log, rank, processes, port) for rank in range(processes)]
    started = time.monotonic()
    while alive:
        for pid in alive[:]:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                alive.remove(pid)
                if status != 0:
                    sys.exit(f"a run ended with status {status}:\n{log.read_text()}")
        if alive and kill_after is not None and time.monotonic() - started >= kill_after:
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


if __name__ == "__main__":
    config, root, kills, processes, seed = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:6])
    overrides = sys.argv[6:]
    draw = random.Random(seed)

    def command(folder: Path) -> list[str]:
        return ["--config", config, f"run_dir={folder}", *overrides]

    began = time.monotonic()
    run(command(root / "alone"), root / "log", processes, None, draw)
    whole = time.monotonic() - began
    expected = adapter(root / "alone")
    done: list[Path] = []
    at: list[int] = []
    while len(at) < kills:
        folder = root / f"killed-{len(done)}"
        killed = True
        while killed:
            limit = draw.uniform(0.1, 1.0) * whole if len(at) < kills else None
            killed = run(command(folder), root / "log", processes, limit, draw)
            if killed:
                at.append(steps(folder))
        done.append(folder)
    same = [adapter(folder) == expected for folder in done]
    print(json.dumps({"kills": len(at), "steps_at_kill": at, "runs": len(done), "same": same, "alone": whole}))
