"""Training speed on one GPU beside TRL's: real tokens per second, same data, same LoRA, at three model shapes.

    python benchmarks/train_vs_trl.py --records FILE.jsonl --tokenizer FOLDER --out benchmarks/results/train_vs_trl.json

Each measurement is a process of its own. ``--trl-path`` is a folder with TRL (and Liger), if it is not installed:
``pip install --no-deps --target FOLDER trl==1.16.0 liger-kernel``. Weights are random, which changes no speed. TRL is
tried in several stock settings (packing, Liger's layer kernels, rows at once); its best counts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from training_speed.corpus import examples, write
from training_speed.shapes import SHAPES

from terselm.files import atomic_file
from terselm.train.hardware import describe_hardware, describe_versions

HERE = Path(__file__).parent / "training_speed"
Flags = list[str]

OURS: dict[str, list[Flags]] = {
    "135m": [["--rows", "32", "--compile", "--steps", "40"], ["--rows", "32"]],
    "1.1b": [["--rows", "16", "--compile", "--steps", "30"]],
    "7b": [["--rows", "8", "--compile", "--steps", "20"]],
    "tiny": [["--rows", "2", "--length", "256", "--steps", "10"]],
}
THEIRS: dict[str, list[Flags]] = {
    "135m": [
        ["--rows", "8", "--liger"],
        ["--rows", "16", "--liger"],
        ["--rows", "32", "--liger"],
        ["--rows", "16"],
        ["--rows", "64", "--packing", "none", "--liger"],
    ],
    "1.1b": [["--rows", "4", "--liger"], ["--rows", "8", "--liger"], ["--rows", "16", "--liger"]],
    "7b": [["--rows", "4", "--liger"], ["--rows", "2", "--liger"], ["--rows", "4", "--liger", "--checkpointing"]],
    "tiny": [["--rows", "2", "--length", "256", "--steps", "5", "--device", "cpu"]],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a fast tokenizer")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/train_vs_trl.json"))
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["135m", "1.1b", "7b"])
    parser.add_argument("--sides", nargs="+", choices=["ours", "TRL"], default=["ours", "TRL"])
    parser.add_argument("--trl-path", type=Path)
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no further measurement begins")
    options = parser.parse_args()
    runs: list[dict[str, Any]] = []
    deadline = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as scratch:
        for shape in options.shapes:
            prepared = prepare(Path(scratch), shape, options)
            for side, all_flags in (("ours", OURS[shape]), ("TRL", THEIRS[shape])):
                for flags in all_flags if side in options.sides else []:
                    if time.monotonic() < deadline:
                        runs.append(measure(side, shape, flags, prepared, options))
            save(runs, options)
    print_table(runs)


def prepare(scratch: Path, shape: str, options: argparse.Namespace) -> Path:
    """A folder with the token ids and the tokenizer, for TRL's side."""
    from transformers import AutoTokenizer

    folder = scratch / shape
    folder.mkdir()
    length = 256 if shape == "tiny" else 1024
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    found = examples(options.records, tokenizer, row_length=length, vocabulary=SHAPES[shape]["vocab_size"])
    write(folder / "examples.jsonl", found)
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder


def measure(side: str, shape: str, flags: Flags, prepared: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One process; what went wrong in it is part of the result."""
    out = prepared / "result.json"
    out.unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if side == "ours":
        command = ["ours.py", "--records", str(options.records), "--tokenizer", str(options.tokenizer)]
    else:
        command = ["theirs.py", "--examples", str(prepared / "examples.jsonl")]
        if options.trl_path is not None:
            environment["PYTHONPATH"] = os.pathsep.join([str(options.trl_path), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(HERE / command[0]), *command[1:], "--shape", shape, "--out", str(out), *flags]
    print(f"{shape}, {side} {' '.join(flags)}:", file=sys.stderr, flush=True)
    started = time.monotonic()
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
        problem = done.stderr[-2000:]
    except subprocess.TimeoutExpired:
        problem = "took longer than four minutes"
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {"error": problem}
    rate = f"{found['tokens_per_second']:,.0f} tokens/s" if "error" not in found else f"failed: {problem[-500:]}"
    print(f"  {rate} ({time.monotonic() - started:.0f} s)", file=sys.stderr, flush=True)
    return {"shape": shape, "side": side, "flags": flags, **found}


def best(runs: list[dict[str, Any]], shape: str, side: str) -> dict[str, Any] | None:
    found = [run for run in runs if (run["shape"], run["side"]) == (shape, side) and "error" not in run]
    return max(found, key=lambda run: float(run["tokens_per_second"]), default=None)


def save(runs: list[dict[str, Any]], options: argparse.Namespace) -> None:
    import importlib.metadata

    versions = describe_versions()
    for package in ("trl", "liger-kernel"):
        path = [str(options.trl_path)] if options.trl_path else None
        found = importlib.metadata.distributions(name=package, **({"path": path} if path else {}))
        versions[package] = next((distribution.version for distribution in found), "not found")
    result = {
        "command": f"python benchmarks/train_vs_trl.py --records {options.records.name}",
        "data": options.records.name,
        "lora": {"rank": 16, "alpha": 32, "target_modules": "all-linear"},
        "mfu": "4N FLOPs a token (LoRA) over the dense bfloat16 peak of the data sheet",
        "versions": versions,
        "hardware": describe_hardware(),
        "runs": runs,
    }
    with atomic_file(options.out) as file:
        json.dump(result, file, indent=2)
        file.write("\n")


def print_table(runs: list[dict[str, Any]]) -> None:
    print(
        "| shape | TerseLM tokens/s | MFU (4N) | memory | TRL tokens/s, its best | memory | times |\n"
        + "|---" * 7
        + "|"
    )
    for shape in dict.fromkeys(run["shape"] for run in runs):
        ours, theirs = best(runs, shape, "ours"), best(runs, shape, "TRL")
        cells = [shape]
        cells.append(f"{ours['tokens_per_second']:,.0f}" if ours else "failed")
        cells.append(f"{ours['mfu']:.1%}" if ours and ours["mfu"] else "")
        cells.append(f"{ours['memory_gib']:.0f} GiB" if ours and ours["memory_gib"] else "")
        cells.append(f"{theirs['tokens_per_second']:,.0f} ({' '.join(theirs['flags'])})" if theirs else "failed")
        cells.append(f"{theirs['memory_gib']:.0f} GiB" if theirs and theirs["memory_gib"] else "")
        cells.append(f"{ours['tokens_per_second'] / theirs['tokens_per_second']:.1f}" if ours and theirs else "")
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
