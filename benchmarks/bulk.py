"""Bulk compression as a user runs it: a file of prompts, killed on the way, resumed, checked.

    python benchmarks/bulk.py --gsm8k train.jsonl --prompts 10000 --kills 2 --out FILE.json
    python benchmarks/bulk.py --gsm8k train.jsonl --prompts 10000 --processes 1 2 --out FILE.json

`terselm compress-file` runs in a process of its own (or in several, under `accelerate launch`). With --kills it is
killed (SIGKILL, all its processes) when about equal shares of the rows are committed, and started again. The output
is then checked against the source: every row once, in order, within its budget.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from against_llmlingua.prompts import PromptMaker, bundled, gsm8k

from terselm.data.rows import read_objects
from terselm.errors import TerseLMError
from terselm.files import atomic_file
from terselm.models import load_tokenizer
from terselm.train.hardware import describe_hardware
from terselm.train.provenance import git_commit

_COMMAND = "from terselm.cli import main; main()"
_CONFIG = Path(__file__).parents[1] / "configs" / "compress" / "paper.yaml"


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "prompts.jsonl"
        tokens = write_prompts(source, options)
        runs = []
        for processes in options.processes:
            out = Path(scratch) / f"out-{processes}.jsonl"
            runs.append(run(source, out, processes, options) | check(source, out, options.budget))
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git_commit(),
        "versions": {name: version(name) for name in ("terselm", "torch", "transformers")},
        "hardware": describe_hardware(),
        "model": Path(options.model).name,
        "prompts": options.prompts,
        "prompt_tokens": tokens,
        "budget": options.budget,
        "batch_size": options.batch_size,
        "runs": runs,
    }
    print(json.dumps(result, indent=2))
    if options.out:
        with atomic_file(options.out) as file:
            json.dump(result, file, indent=2)
            file.write("\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--gsm8k", type=Path, metavar="FILE", help="GSM8K's train.jsonl, to make the prompts of")
    parser.add_argument("--prompts", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=600, help="of a prompt; default 600")
    parser.add_argument("--budget", type=int, default=120)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--processes", type=int, nargs="+", default=[1], help="one run for each number")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file to write")
    return parser.parse_args()


def write_prompts(path: Path, options: argparse.Namespace) -> int:
    """Prompts of which no two are alike; returns their tokens."""
    tokenizer = load_tokenizer(options.model)

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    maker = PromptMaker(gsm8k(options.gsm8k) if options.gsm8k else bundled(), options.tokens, count)
    total = 0
    with path.open("w", encoding="utf-8") as file:
        for number in range(options.prompts):
            prompt = maker.prompt()
            total += sum(map(count, [prompt["instruction"], *prompt["demonstrations"], prompt["question"]]))
            file.write(json.dumps({"id": number, **prompt}) + "\n")
    return total


def run(source: Path, out: Path, processes: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run the command to its end, killing it on the way as often as asked."""
    command: Sequence[str | Path] = [sys.executable, "-c", _COMMAND, "compress-file", source, out]
    if processes > 1:
        launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes), "--no_python"]
        command = [sys.executable, *launcher, *command]
    command = [*command, "--budget", str(options.budget), "--model", options.model, "--config", _CONFIG]
    command = [*command, "--batch-size", str(options.batch_size)]
    attempts = []
    for kill in range(options.kills + 1):
        enough = options.prompts * (kill + 1) // (options.kills + 1) if kill < options.kills else None
        started = time.perf_counter()
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        while process.poll() is None and (enough is None or committed(out) < enough):
            time.sleep(0.2)
        if enough is not None:
            os.killpg(process.pid, signal.SIGKILL)
        said = process.communicate()[1].decode()
        attempts.append(
            {
                "seconds": round(time.perf_counter() - started, 2),
                "killed": enough is not None,
                "committed": committed(out),
                "status": process.returncode,
            }
        )
        if enough is None and process.returncode:
            raise TerseLMError(f"the run failed: {said[-2000:]}")
    seconds = sum(attempt["seconds"] for attempt in attempts)
    return {
        "processes": processes,
        "attempts": attempts,
        "seconds": round(seconds, 2),
        "prompts_per_second": round(options.prompts / seconds, 1),
        "said": said.strip().splitlines()[-1:],
    }


def committed(out: Path) -> int:
    """Rows in the journals, each of which begins with a line of its own."""
    return sum(path.read_bytes().count(b"\n") - 1 for path in out.parent.glob(f"{out.name}.journal*"))


def check(source: Path, out: Path, budget: int) -> dict[str, Any]:
    """Compare the output with the source.

    Raises:
        TerseLMError: a row is missing, doubled, out of order or over its budget.
    """
    asked = [row["id"] for _, row in read_objects(source)]
    rows = [row for _, row in read_objects(out)]
    if [row["id"] for row in rows] != asked:
        raise TerseLMError(f"the output has {len(rows)} rows, not the {len(asked)} of the source in their order")
    if over := [row["id"] for row in rows if row["compressed_tokens"] > budget or not row["compressed"]]:
        raise TerseLMError(f"rows over the budget or empty: {over[:10]}")
    if left := [path.name for path in out.parent.glob(f"{out.name}.*")]:
        raise TerseLMError(f"left behind: {left}")
    shares = sorted(row["compressed_tokens"] / budget for row in rows)
    return {"rows": len(rows), "in_order": True, "least_of_budget_used": shares[0], "median": shares[len(shares) // 2]}


if __name__ == "__main__":
    main()
