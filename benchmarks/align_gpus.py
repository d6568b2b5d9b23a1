"""Alignment on one GPU and on two with DDP, the same steps on both: loss by step, and real tokens per second.

    python benchmarks/align_gpus.py --model smollm2-135m --records FILE.jsonl --out benchmarks/results/align_gpus.json

Needs two GPUs. The global batch is the same, so the losses must agree; they differ by the order of bfloat16 sums alone.
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

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "align" / "smollm2-135m-gpu.yaml"
DDP = ROOT / "configs" / "accelerate" / "ddp-2.yaml"
LAUNCHERS = {
    "one GPU": ([sys.executable], {"CUDA_VISIBLE_DEVICES": "0"}),
    "two GPUs, DDP": ([sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(DDP)], {}),
}


def main() -> None:
    parser = frame.parser(__doc__, out=frame.RESULTS / "align_gpus.json")
    parser.add_argument("--model", default="smollm2-135m", help="alias, folder or hub id")
    parser.add_argument("--records", type=Path, required=True, help="JSON Lines file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the alignment")
    options = parser.parse_args()
    settings = [f"model={options.model}", f"data.records={options.records.absolute()}", *options.overrides]
    about = frame.circumstances()
    with tempfile.TemporaryDirectory() as scratch:
        runs = {name: run(name, settings, Path(scratch) / name.replace(" ", "-")) for name in LAUNCHERS}
    one, two = runs.values()
    result = {
        "command": f"python benchmarks/align_gpus.py --model {options.model} --records {options.records.name}",
        "settings": options.overrides,
        "data": {**one["data"], "records": options.records.name},
        "speedup": steady_rate(two) / steady_rate(one),
        "largest_loss_difference": largest_loss_difference(one, two),
        **about,
        "versions": two["versions"],
        "hardware": two["hardware"],
        "runs": {name: summary(metrics) for name, metrics in runs.items()},
    }
    frame.write_result(options.out, result)
    print_table(result)


def run(name: str, settings: list[str], folder: Path) -> dict[str, Any]:
    """The metrics of one alignment."""
    launcher, environment = LAUNCHERS[name]
    script = [str(ROOT / "train" / "align.py"), "--config", str(CONFIG)]
    print(f"{name}:", file=sys.stderr, flush=True)
    subprocess.run(
        [*launcher, *script, *settings, f"run_dir={folder}", "log_every=1"],
        env={**os.environ, **environment},
        check=True,
    )
    metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return metrics


def steady_rate(metrics: dict[str, Any]) -> float:
    """Real tokens per second after the first tenth of the steps, which warms up kernels and allocator."""
    history = metrics["loss_history"]
    first, last = history[len(history) // 10], history[-1]
    return float((last["tokens"] - first["tokens"]) / (last["seconds"] - first["seconds"]))


def largest_loss_difference(one: dict[str, Any], two: dict[str, Any]) -> float:
    """Relative, over all steps."""
    pairs = zip(one["loss_history"], two["loss_history"], strict=True)
    return max(abs(a["loss"] - b["loss"]) / a["loss"] for a, b in pairs)


def summary(metrics: dict[str, Any]) -> dict[str, Any]:
    return {
        "tokens_per_second": steady_rate(metrics),
        **{name: metrics[name] for name in ("compute", "training", "held_out", "loss_history")},
    }


def print_table(result: dict[str, Any]) -> None:
    print(f"| | tokens/s | last loss | bits per byte before | after |\n{'|---' * 5}|")
    for name, metrics in result["runs"].items():
        held_out = metrics["held_out"]
        print(
            f"| {name} | {metrics['tokens_per_second']:,.0f} | {metrics['loss_history'][-1]['loss']:.4f} "
            f"| {held_out['before']['bits_per_byte']:.4f} | {held_out['after']['bits_per_byte']:.4f} |"
        )
    print(
        f"\n{result['speedup']:.2f} times the tokens/s; losses differ by at most "
        f"{result['largest_loss_difference']:.2%} at any step"
    )


if __name__ == "__main__":
    frame.run(main)
