"""The tables of docs/results.md that local models can make: GSM8K, BIG-Bench Hard, NQ, tool output, dialogues.

    python benchmarks/evaluate_paper.py --data FOLDER --out OUT --target gemma3-270m --target smollm2-135m \\
        --llmlingua ~/.cache/terselm/peers/llmlingua-0.2.2/bin/python
    python benchmarks/evaluate_paper.py --data FOLDER --out OUT --target qwen2.5-coder-1.5b --suites nq --generate

FOLDER holds gsm8k/train.jsonl, gsm8k/test.jsonl, bbh/tasks, bbh/cot_prompts and nq_open/oracle.jsonl. A prompt of NQ
has 20 documents: the one with the answer, and those that BM25 finds nearest. A target with a chat template reads
prompts through it (`--chat`); with `--generate` its answers are judged, too. Every suite and target is shared out among
processes by kind of method; with `--at-once 14` they use one GPU together. All tokens are counted by the small LM's
tokenizer. A run that was killed goes on when it is started again. `--target NAME=FOLDER` and `--small NAME=FOLDER` name
models whose weights lie elsewhere; `--aligned NAME=FOLDER` adds a small LM that was aligned to the first target.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import frame
from paper_tables.against_llmlingua import measure_peer
from paper_tables.plan import (
    ALIGNMENT,
    PEER,
    REFERENCES,
    SHARDS,
    alignment_pairs,
    journal_for,
    matched,
    methods_of,
    name_of,
    peer_of,
    settings_of,
    shards_of,
)
from paper_tables.tables import report

from terselm.evaluate.run import Evaluation

SUITES = ("gsm8k", "bbh", "nq", "tools", "dialogue")


def main() -> int:
    options = parse()
    if options.shard:
        measure(options)
        return 0
    began = time.perf_counter()
    jobs = [
        (suite, target, shard)
        for shard in (ALIGNMENT, *reversed(SHARDS))
        for suite in options.suites
        for target in options.target
        if shard in shards_of(options, suite) and (shard not in (PEER, ALIGNMENT) or target == options.target[0])
    ]  # the peer shortens for all targets
    first = [(suite, target, REFERENCES) for suite in options.suites for target in options.target]
    with ThreadPoolExecutor(options.at_once) as pool:
        list(pool.map(lambda job: run_shard(options, *job), first))  # where one fails, its shards measure these again
        states = list(pool.map(lambda job: run_shard(options, *job), jobs))
    failed = [job for job, state in zip(jobs, states, strict=True) if state]
    for job in failed:
        print(f"failed: {job}; see {log_of(options, *job)}", file=sys.stderr)
    for suite in options.suites:
        for target in options.target:
            report_all(options, suite, target, failed)
    print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)
    return int(bool(failed))


def report_all(options: argparse.Namespace, suite: str, target: str, failed: Sequence[tuple[str, str, str]]) -> None:
    """The tables of one suite and target, of the shards that did not fail."""
    first = options.target[0]
    done = [
        shard
        for shard in SHARDS
        if shard in shards_of(options, suite) and (suite, first if shard == PEER else target, shard) not in failed
    ]
    if not done:
        return
    report(options, suite, target, done, [name for shard in done for name in methods_of(options, suite, target, shard)])
    if PEER in done:
        report(options, suite, target, [PEER], [*matched(suite), peer_of(suite)], "as_long_as_llmlingua")
    if options.aligned and target == first and (suite, first, ALIGNMENT) not in failed:
        for name, pair in alignment_pairs(options).items():
            report(options, suite, first, [ALIGNMENT], pair, f"alignment_{name}")


def parse() -> argparse.Namespace:
    parser = frame.parser(__doc__, required=True, what="folder of journals, tables and logs")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--target", action="append", required=True, metavar="NAME[=FOLDER]")
    parser.add_argument("--small", default="smollm2-135m", metavar="NAME[=FOLDER]")
    parser.add_argument("--aligned", metavar="NAME=FOLDER", help="a small LM that was aligned to the first target")
    parser.add_argument("--llmlingua", type=Path, help="interpreter or folder with llmlingua")
    parser.add_argument(
        "--suites", nargs="+", choices=("gsm8k", "bbh", "nq", "tools", "dialogue"), default=["gsm8k", "bbh"]
    )
    parser.add_argument("--questions", type=int, default=200, help="of GSM8K")
    parser.add_argument("--sets", type=int, default=10, help="demonstration sets of GSM8K")
    parser.add_argument("--bbh-questions", type=int, default=11, help="of each task")
    parser.add_argument("--bbh-tasks", default="", help="with commas; default: all")
    parser.add_argument("--nq-questions", type=int, default=300)
    parser.add_argument("--tool-questions", type=int, default=24, help="of each of six kinds; as many conversations")
    parser.add_argument("--peers", type=int, default=1, help="processes of llmlingua that share the prompts")
    parser.add_argument("--budgets", help="with commas; default: the paper's, of NQ shares of the tokens")
    parser.add_argument("--chat", choices=("auto", "always", "never"), default="auto", help="how targets read prompts")
    parser.add_argument("--generate", action="store_true", help="targets answer, too")
    parser.add_argument("--answers-only", action="store_true", help="targets answer, and do not score the gold text")
    parser.add_argument("--methods", help="instead of all of ours, separated by blanks")
    parser.add_argument("--baselines", help="instead of all baselines, separated by blanks")
    parser.add_argument("--shards", nargs="+", choices=(*SHARDS, ALIGNMENT), help="default: all")
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
    if shard != PEER:
        settings = settings_of(options, suite, target, methods_of(options, suite, target, shard))
        Evaluation(settings, journal_for(options, suite, target, shard)).measure()
        return
    measure_peer(options, suite, shard)


if __name__ == "__main__":
    frame.run(main)
