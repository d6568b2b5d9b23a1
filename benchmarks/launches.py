"""Whether every way to launch reaches the loss of DDP and publishes an adapter whose merged logits match.

    python benchmarks/launches.py --config configs/align/smollm2-135m-gpu.yaml --out benchmarks/results/launches.json

Needs two GPUs, and DeepSpeed for ZeRO; ``ACCELERATE_USE_CPU=true`` before it tries DDP and ZeRO on a CPU. Each launch
trains the same steps from the same configuration; `one` is a single process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import frame

from terselm.train.publish import publish

ROOT = Path(__file__).parents[1]
LAUNCHES = {"one": "one-gpu", "ddp-2": "ddp-2", "fsdp2": "fsdp2", "zero2": "zero2", "zero3": "zero3"}


def main() -> int:
    parser = frame.parser(__doc__, required=True)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--launches", nargs="+", choices=LAUNCHES, default=list(LAUNCHES))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the runs")
    options = parser.parse_args()
    about = frame.circumstances() | {"overrides": options.overrides}
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.launches:
            results[name] = measure(name, options.config, options.overrides, Path(scratch))
            print(json.dumps({name: results[name]}), file=sys.stderr)
    print_table(results)
    frame.write_result(options.out, {"launches": results, **about})
    return int(any("error" in result for result in results.values()))


def measure(name: str, config: Path, overrides: list[str], scratch: Path) -> dict[str, Any]:
    """One run and its publication."""
    run = scratch / name
    launch = ["--config_file", f"configs/accelerate/{LAUNCHES[name]}.yaml", "--main_process_port", "0"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch, "train/align.py", "--config", str(config)]
    done = subprocess.run(
        [*command, f"run_dir={run}", "tracker=none", *overrides],
        cwd=ROOT,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        return {"error": done.stderr[-2000:]}
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    checkpoint = publish(run, scratch / f"{name}-published")
    return {
        "processes": metrics["compute"]["processes"],
        "steps": metrics["training"]["steps"],
        "last_loss": metrics["loss_history"][-1]["loss"],
        "bits_per_byte": metrics["held_out"]["after"]["bits_per_byte"],
        "tokens_per_second": metrics["training"]["tokens_per_second"],
        "logit_difference": checkpoint.logit_difference,
    }


def print_table(results: dict[str, dict[str, Any]]) -> None:
    reference = results.get("ddp-2", {}).get("last_loss")
    print("| launch | processes | last loss | from DDP's | tokens/s | logits after publishing |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, result in results.items():
        if "error" in result:
            print(f"| {name} | failed: {result['error'].strip().splitlines()[-1]} | | | | |")
            continue
        far = f"{result['last_loss'] / reference - 1:+.1e}" if reference else ""
        print(
            f"| {name} | {result['processes']} | {result['last_loss']:.4f} | {far} | "
            f"{result['tokens_per_second']:,.0f} | {result['logit_difference']:.1e} |"
        )


if __name__ == "__main__":
    frame.run(main)
