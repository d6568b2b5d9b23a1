"""The figures of several shards together, as JSON and Markdown."""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import frame

from paper_tables.plan import budgets_of, folder_of, name_of, settings_of, weights_of
from terselm.evaluate.figures import Figuring
from terselm.evaluate.measurements import JOURNAL, Measurement
from terselm.evaluate.report import as_json, markdown, plain
from terselm.evaluate.suites import load_suite


def report(
    options: argparse.Namespace,
    suite: str,
    target: str,
    shards: Sequence[str],
    methods: Sequence[str],
    kind: str = "evaluate",
) -> None:
    """The figures of some methods of these shards together; the journals are kept packed."""
    measurements: list[Measurement] = []
    for shard in shards:
        journal = folder_of(options, suite, target, shard) / JOURNAL
        if not journal.exists():
            continue
        lines = journal.read_text(encoding="utf-8").splitlines()
        measurements += [Measurement.from_json(json.loads(line)) for line in lines[1:]]
        with journal.open("rb") as source, gzip.open(journal.with_suffix(".jsonl.gz"), "wb") as packed:
            shutil.copyfileobj(source, packed)
    settings = settings_of(options, suite, target, whole(methods, measurements, budgets_of(options, suite)))
    loaded = load_suite(settings.suite)
    figures = Figuring(settings, loaded, measurements).all()
    table = without_folders(options, markdown(settings, loaded, figures) + by_kind(suite, measurements))
    result = {
        "command": "python benchmarks/evaluate_paper.py " + " ".join(sys.argv[1:]),
        **frame.circumstances(),
        **as_json(settings, loaded, figures),
    }
    stem = options.out / f"{kind}_{suite}_{name_of(target)}"
    text = without_folders(options, json.dumps(plain(result), indent=1, ensure_ascii=False))
    Path(f"{stem}.json").write_text(text + "\n", encoding="utf-8")
    Path(f"{stem}.md").write_text(table + "\n", encoding="utf-8")
    print(table)


def by_kind(suite: str, measurements: Sequence[Measurement]) -> str:
    """For tool output, in how many per cent of the prompts of each kind the answer is kept."""
    if suite != "tools":
        return ""
    kept: dict[tuple[str, str], dict[str, list[bool]]] = {}
    for one in {one.key: one for one in measurements}.values():
        kept.setdefault(one.cell, {}).setdefault(one.id.partition("/")[0], []).append(bool(one.answer_kept))
    kinds = list(next(iter(kept.values())))
    lines = ["", "", f"| answer kept, % | budget | {' | '.join(kinds)} |", "|---|---|" + "---|" * len(kinds)]
    for (method, budget), answers in sorted(kept.items(), key=lambda item: (item[0][1], item[0][0])):
        shares = (f"{100 * sum(answers[kind]) / len(answers[kind]):.0f}" for kind in kinds)
        lines.append(f"| `{method}` | {budget} | {' | '.join(shares)} |")
    return "\n".join(lines)


def whole(methods: Sequence[str], measurements: Sequence[Measurement], budgets: Sequence[str]) -> list[str]:
    """Those that were measured to the end: as often at every budget as any method was."""
    counts = Counter(one.cell for one in {one.key: one for one in measurements}.values())
    complete = [name for name in methods if all(counts[name, budget] == max(counts.values()) for budget in budgets)]
    for name in [name for name in methods if name not in complete]:
        print(f"left out, since it was not measured to the end: {name}", file=sys.stderr)
    return complete


def without_folders(options: argparse.Namespace, text: str) -> str:
    """Models by name; where their weights lay matters to nobody else."""
    for model in [*options.target, options.small, *([options.aligned] if options.aligned else [])]:
        text = text.replace(model, name_of(model)).replace(weights_of(model), name_of(model))
    return text.replace(str(options.data), "FOLDER").replace(str(options.out), "OUT").replace(str(Path.home()), "~")
