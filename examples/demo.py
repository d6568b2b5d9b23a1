"""The whole idea on real weights: align a small LM to a target LLM's output, publish it, compress a prompt with it.

Each step is a command that you could type yourself, shown before it runs. A second run reuses what the first one left
in runs/ and in the model cache; remove runs/demo and runs/demo-checkpoint to start again.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil  # which accelerate brings

ROOT = Path(__file__).resolve().parents[1]
MODEL = "smollm2-135m"
THREADS = os.environ.get("OMP_NUM_THREADS") or str(psutil.cpu_count(logical=False) or 1)  # unsaid, accelerate warns
LAUNCH = [
    *("accelerate", "launch", "--config_file", Path("configs/accelerate/cpu.yaml")),
    *("--num_cpu_threads_per_process", THREADS, "train/align.py"),
]
CONFIG = Path("configs/align/smollm2-135m.yaml")
RUN = Path("runs/demo")
CHECKPOINT = Path("runs/demo-checkpoint")
TOKENS = Path("configs/compress/tokens.yaml")
PROMPT = Path("data/sample/prompts/few_shot_maths.json")
BUDGET = 300  # tokens


def main() -> None:
    os.chdir(ROOT)
    seconds: dict[str, float] = {}
    for title, command in (
        ("Prepare the small LM", ["terselm", "convert", MODEL]),
        ("Align it to the target", [*LAUNCH, "--config", CONFIG, f"run_dir={RUN}"]),
        ("Publish the checkpoint", ["terselm", "publish", RUN, "--to", CHECKPOINT]),
    ):
        heading(title, len(seconds) + 1)
        start = time.monotonic()
        if "publish" in command and is_published():
            print(f"{CHECKPOINT} holds this run already.")
        else:
            run(command)
        seconds[title] = time.monotonic() - start
    title = "Compress a prompt"
    heading(title, len(seconds) + 1)
    start = time.monotonic()
    compress = ["terselm", "compress", "--model", CHECKPOINT, "--config", TOKENS, "--prompt", PROMPT]
    result = json.loads(run([*compress, "--budget", BUDGET, "--json"], capture=True))
    seconds[title] = time.monotonic() - start
    print_summary(json.loads((RUN / "metrics.json").read_text(encoding="utf-8")), result, seconds)


def heading(title: str, number: int) -> None:
    print(f"\n=== {number}. {title}", flush=True)


def run(command: list[Any], *, capture: bool = False) -> str:
    """Show a command and run it; its standard output if ``capture``, else that goes to the terminal.

    Raises:
        SystemExit: the command failed; with its exit status.
    """
    words = [str(word) for word in command]
    print(f"$ {shlex.join(words)}", flush=True)
    # The commands installed beside this interpreter, whether or not its environment is active.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    program = shutil.which(words[0], path=path)
    if program is None:
        raise SystemExit(f"demo: there is no command {words[0]!r} beside {sys.executable}; run `make demo`")
    done = subprocess.run(
        [program, *words[1:]],
        stdout=subprocess.PIPE if capture else None,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PATH": path},
    )
    if done.returncode != 0:
        print(
            f"demo: the command above failed with exit status {done.returncode}; the demo stops here", file=sys.stderr
        )
        raise SystemExit(done.returncode if done.returncode > 0 else 128 - done.returncode)
    return done.stdout or ""


def is_published() -> bool:
    """Whether the checkpoint is there and was made from the run as it is; one of an earlier run is removed."""
    if not CHECKPOINT.exists():
        return False
    trained = max(file.stat().st_mtime for file in (RUN / "adapter").iterdir())
    if CHECKPOINT.stat().st_mtime > trained:
        return True
    print(f"{CHECKPOINT} is of an earlier run.\n$ rm -r {CHECKPOINT}")
    shutil.rmtree(CHECKPOINT)
    return False


def print_summary(metrics: dict[str, Any], result: dict[str, Any], seconds: dict[str, float]) -> None:
    held_out = metrics["held_out"]
    before, after = (held_out[name]["bits_per_byte"] for name in ("before", "after"))
    change = held_out["difference"]["bits_per_byte"]
    low, high = held_out["difference"]["bits_per_byte_interval"]
    rows = [
        ("held-out bits per byte, before", f"{before:.4f}"),
        ("held-out bits per byte, after", f"{after:.4f}"),
        ("change, 95% interval", f"{change:+.4f} [{low:+.4f}, {high:+.4f}]"),
        ("prompt tokens, before", f"{result['original_tokens']}"),
        (
            "prompt tokens, after",
            f"{result['compressed_tokens']} of {BUDGET} allowed: {result['ratio']:.1f} times fewer",
        ),
        ("checkpoint", f"{CHECKPOINT}"),
        *((f"time: {title.lower()}", f"{spent:.0f} s") for title, spent in seconds.items()),
        ("time: all", f"{sum(seconds.values()):.0f} s"),
    ]
    width = max(len(name) for name, _ in rows)
    print(f"\n=== The compressed prompt ({PROMPT})\n{result['text']}\n\n=== Summary")
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
