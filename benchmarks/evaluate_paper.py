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
import gzip
import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from terselm.compress.counter import Count, resolve_counter
from terselm.compress.evaluation.figures import Figuring
from terselm.compress.evaluation.methods import Compressed, Method, parse_method
from terselm.compress.evaluation.report import as_json, markdown, plain
from terselm.compress.evaluation.runner import JOURNAL, Run
from terselm.compress.evaluation.settings import EvaluateSettings, SuiteName, SuiteSettings, TargetSettings
from terselm.compress.prompt import Prompt
from terselm.train.hardware import describe_hardware
from terselm.train.provenance import git_commit

THINNED = "anchor=0"  # the question whole, demonstrations token by token
OURS = [
    "terselm",
    "terselm:paper",
    f"terselm:{THINNED}",
    *(f"terselm:{THINNED},{more}" for more in (
        "k=1.5",
        "k=1.2",
        "k=1",
        "unit=word",
        "unit=sentence",
        "unit=line",
        "unit=demonstration",
        "segment_size=400",
    )),
    *(f"terselm:anchor={more}" for more in (
        "0.3",
        "0.5",
        "0.5,unit=line",
        "0.5,unit=sentence",
        "0.7",
        "1,anchor_by=last",
        "1,unit=demonstration",
    )),
]  # fmt: skip
ABLATED = [
    "no-budget-controller",
    "no-iteration",
    "no-perplexity-selection",
    "uniform-rates",
    "random-tokens",
    "next-token",
]
BASELINES = [
    "truncate",
    "truncate-end",
    "random-words",
    "demonstrations-random",
    "demonstrations-last",
    "demonstrations-perplexity",
    "demonstrations-similar",
    "sentences-random",
    "selective-context",
    "selective-sentences",
]
PEER = "llmlingua"
MATCHED = {  # llmlingua does not keep to a budget: these may be as long as what it makes of the same prompt
    f"{name}, as long as llmlingua": name for name in ("terselm", "truncate")
}
ALIGNMENT = "alignment"
REFERENCES = "references"  # the bare question and the whole prompt, which all are compared with
BUDGETS = ["1-shot", "half-shot", "quarter-shot"]


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
        for target in options.target:
            done = [shard for shard in shards if (suite, target, shard) not in failed]
            report(options, suite, target, done, [m for shard in done for m in methods_of(options, target, shard)])
        first = options.target[0]
        if options.aligned and (suite, first, ALIGNMENT) not in failed:
            for name, pair in alignment_pairs(options).items():
                report(options, suite, first, [ALIGNMENT], pair, f"alignment_{name}")
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


def folder_of(options: argparse.Namespace, *job: str) -> Path:
    return Path(options.out) / "-".join(map(name_of, job))


def name_of(model: str) -> str:
    return model.partition("=")[0]


def weights_of(model: str) -> str:
    return model.partition("=")[2] or model


def journal_for(options: argparse.Namespace, suite: str, target: str, shard: str) -> Path:
    """The folder of a shard, whose journal begins with what every shard needs and one has measured."""
    folder = folder_of(options, suite, target, shard)
    known = folder_of(options, suite, target, REFERENCES) / JOURNAL
    if shard not in (REFERENCES, ALIGNMENT) and known.exists() and not (folder / JOURNAL).exists():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(known, folder / JOURNAL)
    return folder


def alignment_pairs(options: argparse.Namespace) -> dict[str, list[str]]:
    """By granularity: the small LM as it was, and aligned."""
    models = options.small, options.aligned
    return {
        name: [f"terselm:model={weights_of(model)},{THINNED}{k}" for model in models]
        for name, k in (("k2", ""), ("k1.2", ",k=1.2"))
    }


def methods_of(options: argparse.Namespace, target: str, shard: str) -> list[str]:
    if shard == REFERENCES:
        return ["truncate"]
    if shard == "ours":
        ours = options.methods.split() if options.methods else list(OURS)
        if target != options.small:  # else it has compressed already
            ours += [f"terselm:model={weights_of(target)},{THINNED}{k}" for k in ("", ",k=1.2")]
        return ours
    if shard == ALIGNMENT:
        return [method for pair in alignment_pairs(options).values() for method in pair]
    if shard == "ablated":
        return [f"terselm:{part}" for part in ABLATED] + ["terselm:paper,next-token"]
    return BASELINES if shard == "baselines" else [PEER, *MATCHED]


def settings_of(options: argparse.Namespace, suite: str, target: str, methods: Sequence[str]) -> EvaluateSettings:
    data = options.data
    suites = {
        "gsm8k": SuiteSettings(
            name=SuiteName.GSM8K,
            questions=options.questions,
            sets=options.sets,
            data=data / "gsm8k" / "test.jsonl",
            train=data / "gsm8k" / "train.jsonl",
        ),
        "bbh": SuiteSettings(
            name=SuiteName.BBH,
            questions=options.bbh_questions,
            tasks=[task for task in options.bbh_tasks.split(",") if task],
            data=data / "bbh" / "tasks",
            prompt=data / "bbh" / "cot_prompts",
        ),
    }
    return EvaluateSettings(
        suite=suites[suite],
        target=TargetSettings(model=weights_of(target), device=options.device, dtype=options.dtype),
        methods=list(methods),
        budgets=options.budgets.split(","),
        counter=weights_of(options.small),
        model=weights_of(options.small),
        device=options.device,
        dtype=options.dtype,
        llmlingua=options.llmlingua,
        oracle=bool(options.aligned) and set(methods) <= set(methods_of(options, target, ALIGNMENT)),
        batch=options.batch,
    )


class Remembering:
    """llmlingua, asked once for each prompt and budget, whichever target then reads the answer."""

    def __init__(self, peer: Any) -> None:
        self._peer = peer
        self._known: dict[tuple[str, int], Compressed] = {}

    def recall(self, run: Run) -> None:
        """What it said before the run was stopped."""
        journal = run.folder / JOURNAL
        if not journal.exists():
            return
        prompts = {item.id: item.prompt for item in run.items}
        for line in journal.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            if entry.get("method") == PEER:
                self._known[repr(prompts[entry["id"]]), entry["allowed"]] = Compressed(text=entry["text"])

    def compress(self, prompts: Sequence[Prompt], budgets: Sequence[int]) -> list[Compressed]:
        shortened = []
        for prompt, budget in zip(prompts, budgets, strict=True):
            key = repr(prompt), budget
            if key not in self._known:
                self._known[key] = self._peer.compress([prompt], [budget])[0]
            shortened.append(self._known[key])
        return shortened


class AsLong:
    """A method that may use as many tokens as llmlingua does."""

    def __init__(self, method: Method, peer: Method, count: Count) -> None:
        self._method = method
        self._peer = peer
        self._count = count

    def compress(self, prompts: Sequence[Prompt], budgets: Sequence[int]) -> list[Compressed]:
        lengths = [self._count(one.text) for one in self._peer.compress(prompts, budgets)]
        return self._method.compress(prompts, lengths)


def measure(options: argparse.Namespace) -> None:
    """One shard, in a process of its own."""
    suite, target, shard = options.shard
    if shard != "peer":
        settings = settings_of(options, suite, target, methods_of(options, target, shard))
        Run(settings, journal_for(options, suite, target, shard)).measure()
        return
    measure_peer(options, suite, shard)


def measure_peer(options: argparse.Namespace, suite: str, shard: str) -> None:
    """llmlingua for all targets, and ours as long as it."""
    from terselm.compress.evaluation.opening import Workshop, open_target
    from terselm.compress.evaluation.peer import Llmlingua

    first = settings_of(options, suite, options.target[0], [PEER])
    count = resolve_counter(first.counter)
    assert count is not None
    peer = Llmlingua(first.llmlingua, first.model, options.device)
    remembering = Remembering(peer)
    try:
        for each in options.target:
            settings = settings_of(options, suite, each, methods_of(options, each, shard))
            folder = journal_for(options, suite, each, shard)
            remembering.recall(Run(settings, folder, methods=dict.fromkeys(MATCHED, remembering)))
            target = open_target(settings.target, folder)
            workshop = Workshop(settings, target, count, {})
            ready: dict[str, Method] = {PEER: remembering}
            with ExitStack() as stack:
                for name, ours in MATCHED.items():
                    method = stack.enter_context(workshop.method(parse_method(ours)))
                    ready[name] = AsLong(method, remembering, count)
                Run(settings, folder, target, ready).measure()
    finally:
        peer.close()


def report(
    options: argparse.Namespace,
    suite: str,
    target: str,
    shards: Sequence[str],
    methods: Sequence[str],
    kind: str = "evaluate",
) -> None:
    """The figures of some methods of these shards together; the journals are kept packed."""
    entries: list[Any] = []
    for shard in shards:
        journal = folder_of(options, suite, target, shard) / JOURNAL
        if not journal.exists():
            continue
        lines = journal.read_text(encoding="utf-8").splitlines()
        entries += [json.loads(line) for line in lines[1:]]
        with journal.open("rb") as source, gzip.open(journal.with_suffix(".jsonl.gz"), "wb") as packed:
            shutil.copyfileobj(source, packed)
    settings = settings_of(options, suite, target, whole(methods, entries, options.budgets.split(",")))
    loaded = Run(settings, options.out, methods={name: Remembering(None) for name in MATCHED}).suite
    figures = Figuring(settings, loaded, entries).all()
    table = without_folders(options, markdown(settings, loaded, figures))
    result = {
        "command": "python benchmarks/evaluate_paper.py " + " ".join(sys.argv[1:]),
        "commit": git_commit(),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": describe_hardware(),
        **as_json(settings, loaded, figures),
    }
    stem = options.out / f"{kind}_{suite}_{name_of(target)}"
    text = without_folders(options, json.dumps(plain(result), indent=1, ensure_ascii=False))
    Path(f"{stem}.json").write_text(text + "\n", encoding="utf-8")
    Path(f"{stem}.md").write_text(table + "\n", encoding="utf-8")
    print(table)


def whole(methods: Sequence[str], entries: Sequence[Any], budgets: Sequence[str]) -> list[str]:
    """Those that were measured to the end: as often at every budget as any method was."""
    counts = Counter(
        (entry["method"], entry["budget"]) for entry in {cell_of(entry): entry for entry in entries}.values()
    )
    found = [name for name in methods if all(counts[name, budget] == max(counts.values()) for budget in budgets)]
    for name in [name for name in methods if name not in found]:
        print(f"left out, since it was not measured to the end: {name}", file=sys.stderr)
    return found


def cell_of(entry: Any) -> tuple[str, str, str]:
    return entry["method"], entry["budget"], entry["id"]


def without_folders(options: argparse.Namespace, text: str) -> str:
    """Models by name; where their weights lay matters to nobody else."""
    for model in [*options.target, options.small, *([options.aligned] if options.aligned else [])]:
        text = text.replace(model, name_of(model)).replace(weights_of(model), name_of(model))
    return text.replace(str(options.data), "FOLDER").replace(str(options.out), "OUT").replace(str(Path.home()), "~")


if __name__ == "__main__":
    main()
