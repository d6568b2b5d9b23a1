"""The tables of docs/results.md that local models can make: GSM8K and BIG-Bench Hard, every method, every budget.

    python benchmarks/evaluate_paper.py --data FOLDER --out OUT --target gemma3-270m --target smollm2-135m \\
        --llmlingua ~/.cache/terselm/peers/llmlingua-0.2.2/bin/python

FOLDER holds gsm8k/train.jsonl, gsm8k/test.jsonl, bbh/tasks and bbh/cot_prompts. Every suite and target is shared out
among processes by kind of method; with `--at-once 14` they use one GPU together. All tokens are counted by the small
LM's tokenizer. A run that was killed goes on when it is started again. `--target NAME=FOLDER` and `--small NAME=FOLDER`
name models whose weights lie elsewhere; `--aligned NAME=FOLDER` adds a small LM that was aligned to the first target.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from paper_tables.against_llmlingua import measure_peer
from paper_tables.plan import (
    ALIGNMENT,
    BUDGETS,
    MATCHED,
    PEER,
    REFERENCES,
    alignment_pairs,
    journal_for,
    methods_of,
    name_of,
    settings_of,
)
from paper_tables.tables import report

from terselm.evaluate.run import Evaluation


def main() -> None:
    options = parse()
    if options.shard:
        measure(options)
        return
    began = time.perf_counter()
    shards = ["ours", "ablated", "baselines", *(["peer"] if options.llmlingua else [])]
    first = [(suite, target, REFERENCES) for suite in options.suites for target in options.target]
    jobs = [
        (suite, target, shard) for shard in reversed(shards) for suite in options.suites for target in options.target
    ]
    jobs = [job for job in jobs if job[2] != "peer" or job[1] == options.target[0]]  # it shortens for all targets
    if options.aligned:
        jobs = [*((suite, options.target[0], ALIGNMENT) for suite in options.suites), *jobs]
    with ThreadPoolExecutor(options.at_once) as pool:
        list(pool.map(lambda job: run_shard(options, *job), first))  # where one fails, its shards measure these again
        states = list(pool.map(lambda job: run_shard(options, *job), jobs))
    failed = [job for job, state in zip(jobs, states, strict=True) if state]
    for job in failed:
        print(f"failed: {job}; see {log_of(options, *job)}", file=sys.stderr)
    for suite in options.suites:
        first_target = options.target[0]
        for target in options.target:
            whose = {"peer": first_target}  # it measures for all
            done = [shard for shard in shards if (suite, whose.get(shard, target), shard) not in failed]
            report(options, suite, target, done, [m for shard in done for m in methods_of(options, target, shard)])
            if "peer" in done:
                report(options, suite, target, ["peer"], [*MATCHED, PEER], "as_long_as_llmlingua")
        if options.aligned and (suite, first_target, ALIGNMENT) not in failed:
            for name, pair in alignment_pairs(options).items():
                report(options, suite, first_target, [ALIGNMENT], pair, f"alignment_{name}")
    print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)
    sys.exit(bool(failed))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--target", action="append", required=True, metavar="NAME[=FOLDER]")
    parser.add_argument("--small", default="smollm2-135m", metavar="NAME[=FOLDER]")
    parser.add_argument("--aligned", metavar="NAME=FOLDER", help="a small LM that was aligned to the first target")
    parser.add_argument("--llmlingua", type=Path, help="interpreter or folder with llmlingua")
    parser.add_argument("--suites", nargs="+", choices=("gsm8k", "bbh"), default=["gsm8k", "bbh"])
    parser.add_argument("--questions", type=int, default=200, help="of GSM8K")
    parser.add_argument("--sets", type=int, default=10, help="demonstration sets of GSM8K")
    parser.add_argument("--bbh-questions", type=int, default=11, help="of each task")
    parser.add_argument("--bbh-tasks", default="", help="with commas; default: all")
    parser.add_argument("--budgets", default=",".join(BUDGETS))
    parser.add_argument("--methods", help="instead of all of ours, separated by blanks")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", help="of target and small LM; bfloat16 is faster on some CPUs")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--at-once", type=int, default=1, help="processes that share the machine; default 1")
    parser.add_argument("--shard", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_shard(options: argparse.Namespace, *job: str) -> int:
    """A shard in a process of its own; its exit status."""
    log = log_of(options, *job)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        command = [sys.executable, *sys.argv, "--shard", *job]
        return subprocess.run(command, stdout=file, stderr=file).returncode


def log_of(options: argparse.Namespace, *job: str) -> Path:
    return Path(options.out) / "logs" / f"{'-'.join(map(name_of, job))}.log"


def measure(options: argparse.Namespace) -> None:
    """One shard, in a process of its own."""
    suite, target, shard = options.shard
    if shard != "peer":
        settings = settings_of(options, suite, target, methods_of(options, target, shard))
        Evaluation(settings, journal_for(options, suite, target, shard)).measure()
        return
    measure_peer(options, suite, shard)


if __name__ == "__main__":
    main()
