"""Training speed on one GPU beside TRL's: real tokens per second, same data, same LoRA, at three model shapes.

    python benchmarks/train_vs_trl.py --records FILE.jsonl --tokenizer FOLDER --out benchmarks/results/train_vs_trl.json

Each measurement is a process of its own, which reads the data while the one before it still has the GPU. ``--trl-path``
is a folder with TRL (and Liger), if it is not installed: ``pip install --no-deps --target FOLDER trl==1.16.0
liger-kernel``. Weights are random, which changes no speed. TRL is tried in several stock settings (rows at once,
Liger's layer kernels); its best counts. Its packing ``wrapped`` is shown besides: it cuts records anywhere and lets
them attend to each other, so it trains something else.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import frame
from training_speed.shapes import SHAPES

HERE = Path(__file__).parent / "training_speed"
Flags = list[str]

OURS: dict[str, list[Flags]] = {
    "135m": [["--rows", "64", "--compile", "--steps", "40"]],
    "1.1b": [["--rows", "16", "--compile", "--steps", "30"]],
    "7b": [["--rows", "8", "--compile", "--steps", "20"]],
    "tiny": [["--rows", "2", "--length", "256", "--steps", "10"]],
}
THEIRS: dict[str, list[Flags]] = {  # the one that is likely the best comes first
    "135m": [
        ["--rows", "4", "--liger"],
        ["--rows", "2", "--liger"],
        ["--rows", "8", "--liger"],
        ["--rows", "16", "--liger", "--packing", "wrapped"],
    ],
    "1.1b": [["--rows", "4", "--liger"], ["--rows", "2", "--liger"]],
    "7b": [["--rows", "4", "--liger"], ["--rows", "2", "--liger"]],
    "tiny": [["--rows", "2", "--length", "256", "--steps", "6", "--device", "cpu"]],
}


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One process to be."""

    side: str
    shape: str
    flags: Flags


def plan(shapes: list[str], sides: list[str]) -> list[Measurement]:
    """Everything once before anything is tried in other settings."""
    flags = {"ours": OURS, "TRL": THEIRS}
    found = [
        (place, Measurement(side=side, shape=shape, flags=some))
        for shape in shapes
        for side in sides
        for place, some in enumerate(flags[side][shape])
    ]
    return [measurement for _, measurement in sorted(found, key=lambda pair: pair[0] > 0)]


def main() -> None:
    parser = frame.parser(__doc__, out=frame.RESULTS / "train_vs_trl.json")
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a fast tokenizer")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["135m", "1.1b", "7b"])
    parser.add_argument("--sides", nargs="+", choices=["ours", "TRL"], default=["ours", "TRL"])
    parser.add_argument("--trl-path", type=Path)
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no further measurement begins")
    options = parser.parse_args()
    runs: list[dict[str, Any]] = []
    deadline = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as scratch:
        todo = plan(options.shapes, options.sides)
        waiting = Process(todo[0], Path(scratch), options)
        for following in [*todo[1:], None]:
            current = waiting
            if following is not None:
                waiting = Process(following, Path(scratch), options)
            if time.monotonic() < deadline:
                runs.append(current.finish())
                save(runs, options)
            else:
                current.stop()
    print_table(runs)


class Process:
    """A measurement that waits for its turn on the GPU."""

    def __init__(self, measurement: Measurement, scratch: Path, options: argparse.Namespace) -> None:
        self._measurement = measurement
        name = "-".join([measurement.side, measurement.shape, *measurement.flags]).replace("--", "")
        self._out = scratch / f"{name}.json"
        self._log = scratch / f"{name}.log"
        script = "ours.py" if measurement.side == "ours" else "theirs.py"
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if measurement.side == "TRL" and options.trl_path is not None:
            environment["PYTHONPATH"] = os.pathsep.join([str(options.trl_path), environment.get("PYTHONPATH", "")])
        command = [sys.executable, str(HERE / script), "--records", str(options.records)]
        command += ["--tokenizer", str(options.tokenizer), "--shape", measurement.shape, "--out", str(self._out)]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [*command, *measurement.flags], env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log
            )

    def finish(self) -> dict[str, Any]:
        """Its result; what went wrong is a result too."""
        known = asdict(self._measurement)
        print(" ".join([known["shape"], known["side"], *known["flags"]]), end=": ", file=sys.stderr, flush=True)
        started = time.monotonic()
        try:
            self._process.communicate(b"go\n", timeout=240)
        except subprocess.TimeoutExpired:
            self.stop()
        if self._out.is_file():
            found: dict[str, Any] = json.loads(self._out.read_text(encoding="utf-8"))
            outcome = f"{found['tokens_per_second']:,.0f} tokens/s"
        else:
            found = {"error": self._log.read_text(encoding="utf-8", errors="replace")[-2000:]}
            outcome = f"failed: {found['error'][-500:]}"
        print(f"{outcome} ({time.monotonic() - started:.0f} s)", file=sys.stderr, flush=True)
        return {**known, **found}

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()


def best(runs: list[dict[str, Any]], shape: str, side: str) -> dict[str, Any] | None:
    found = [run for run in runs if (run["shape"], run["side"]) == (shape, side) and "error" not in run]
    found = [run for run in found if "wrapped" not in run["flags"]]
    return max(found, key=lambda run: float(run["tokens_per_second"]), default=None)


def save(runs: list[dict[str, Any]], options: argparse.Namespace) -> None:
    import importlib.metadata

    about = frame.circumstances()
    for package in ("trl", "liger-kernel"):
        path = [str(options.trl_path)] if options.trl_path else None
        found = importlib.metadata.distributions(name=package, **({"path": path} if path else {}))
        about["versions"][package] = next((distribution.version for distribution in found), "not found")
    result = {
        "command": f"python benchmarks/train_vs_trl.py --records {options.records.name}",
        "data": options.records.name,
        "lora": {"rank": 16, "alpha": 32, "target_modules": "all-linear"},
        "mfu": "4N FLOPs a token (LoRA) over the dense bfloat16 peak of the data sheet",
        **about,
        "runs": runs,
    }
    frame.write_result(options.out, result)


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
        for run in runs:
            if run["shape"] == shape and "wrapped" in run["flags"] and "error" not in run:
                print(f"{shape}: TRL with packing across records: {run['tokens_per_second']:,.0f} tokens/s")


if __name__ == "__main__":
    frame.run(main)
