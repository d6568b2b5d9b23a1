"""Which objective makes a small LM see text as its target does: word by word, on held-out text of five domains.

    python benchmarks/align_objectives.py --datasets FOLDER --answers records.jsonl --free free.jsonl --seeds 0 1 2 \\
        --out benchmarks/results/align_objectives.json

SmolLM2-135M to a local target that reads every word (gemma3-270m). `--answers` and `--free` are what `terselm collect`
got from it: for the instructions of gpt4_instructions, and for the first words of sentences. All variants see as many
tokens. Top-k KL needs a target with the small LM's vocabulary: what `--save` left of a training of all weights is one.
Reported before → after by domain: bits per byte of the response, the rank correlation (Spearman) of the words'
surprisals with the target's, and the overlap of the words kept at 2×, 5× and 10× with those that the target itself
would keep, with paired bootstrap intervals over texts. Of one domain (Wikipedia) nothing is trained on. With
`--at-once 4` so many trainings share a GPU. Runs that are in the file already are not made again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
import traceback
from concurrent.futures import CancelledError, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import frame
import numpy as np
from alignment_quality.aligning import Budget, Reading, Variant, align, open_small, read, save
from alignment_quality.texts import HeldOut, Sources, Texts, gather

from terselm.errors import TerseLMError
from terselm.models import load_causal_lm
from terselm.train.hardware import quieten_libraries
from terselm.train.report.measures import Measure, compare_words
from terselm.train.settings import LossOn, ObjectiveSettings

ALL = ("given", "answers", "free")


def matched(**weights: float) -> ObjectiveSettings:
    return ObjectiveSettings(**{"nll": 0.0, "matching": 1.0, **weights}, target="it")  # type: ignore[arg-type]


VARIANTS = {
    "NLL, response": Variant(objective=ObjectiveSettings()),
    "NLL, all": Variant(objective=ObjectiveSettings(), loss_on=LossOn.ALL),
    "NLL, the target's answers": Variant(objective=ObjectiveSettings(), text=("answers",)),
    "NLL, GPT-4's answers": Variant(objective=ObjectiveSettings(), text=("gpt4",)),
    "matching": Variant(objective=matched()),
    "matching, near threshold": Variant(objective=matched(near_threshold=4)),
    "matching + NLL": Variant(objective=matched(nll=0.3), loss_on=LossOn.ALL),
    "matching + ranking": Variant(objective=matched(ranking=1)),
    "top-k KL": Variant(objective=matched(matching=0, divergence=1)),
    "top-k KL + matching": Variant(objective=matched(divergence=1)),
    "matching, the target's own text": Variant(objective=matched(), text=("answers", "free")),
    "matching, all text": Variant(objective=matched(), text=ALL),
    "matching + ranking, all weights, all text, 3e-4": Variant(
        objective=matched(ranking=1), all_weights=True, learning_rate=3e-4, text=ALL
    ),
}


def main() -> None:
    parser = frame.parser(__doc__, out=frame.RESULTS / "align_objectives.json")
    parser.add_argument("--datasets", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--answers", type=Path, help="records with the target's answers")
    parser.add_argument("--free", type=Path, help="records with what the target wrote after a few words")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--target", default="gemma3-270m")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, metavar="NAME", help="default: all that have their text"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tokens", type=int, default=2_000_000, help="that each variant is trained on")
    parser.add_argument("--records", type=int, default=0, help="of each kind to train on, at most; 0 for all")
    parser.add_argument("--texts", type=int, default=200, help="held-out texts a domain")
    parser.add_argument("--minutes", type=float, default=60.0, help="after which no further training begins")
    parser.add_argument("--row-length", type=int, default=1024)
    parser.add_argument("--rows-per-pass", type=int, default=16)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--at-once", type=int, default=1, help="trainings that share the device")
    parser.add_argument("--save", type=Path, help="folder for the aligned models of the first seed")
    options = parser.parse_args()
    quieten_libraries()
    run(options)


def run(options: argparse.Namespace) -> None:
    began = time.monotonic()
    budget = Budget(
        tokens=options.tokens,
        row_length=options.row_length,
        rows_per_pass=options.rows_per_pass,
        compile=options.compile,
    )
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:  # which gives the GPU's memory back when it ends
        texts = pool.submit(gathered, options).result()
    print(f"{texts.describe()} after {time.monotonic() - began:.0f} s", file=sys.stderr)
    options.variants = options.variants or [name for name, variant in VARIANTS.items() if works(variant, texts)]
    runs = known_runs(options, texts)
    there = {(run["variant"], run["seed"]) for run in runs}
    desk = texts, options.model, budget, options.save
    with ProcessPoolExecutor(options.at_once, mp_context=context, initializer=begin, initargs=desk) as pool:
        jobs = {
            pool.submit(measure, name, seed): (name, seed)
            for seed in options.seeds
            for name in options.variants
            if (name, seed) not in there
        }
        for job in as_completed(jobs):
            try:
                runs.append(job.result())
            except CancelledError:
                print("no time left for {}, seed {}".format(*jobs[job]), file=sys.stderr)
                continue
            except (RuntimeError, OSError, TerseLMError) as error:  # the other variants may still work
                print("{}, seed {} failed:".format(*jobs[job]), file=sys.stderr)
                traceback.print_exception(error, limit=-4)
                continue
            print(summary(runs[-1]), flush=True)
            store(runs, texts, options)
            if time.monotonic() - began > 60 * options.minutes:
                for other in jobs:
                    other.cancel()
    print_table(runs)


def works(variant: Variant, texts: Texts) -> bool:
    there = all(kind in texts.training for kind in variant.text)
    return there and (texts.one_vocabulary or not variant.objective.divergence)


def gathered(options: argparse.Namespace) -> Texts:
    """All text as the target sees it."""
    sources = Sources(datasets=options.datasets, answers=options.answers, free=options.free, records=options.records)
    small = load_causal_lm(options.model, device="cpu")
    return gather(sources, options.texts, small, load_causal_lm(options.target), options.row_length)


@dataclass(frozen=True)
class Desk:
    """What every process has in front of it for all its trainings."""

    texts: Texts
    model: str
    budget: Budget
    save: Path | None
    before: dict[str, Reading]


_desk: Desk


def begin(texts: Texts, model: str, budget: Budget, save_to: Path | None) -> None:
    """In each process, first."""
    global _desk  # a pool hands its tasks nothing else
    quieten_libraries()
    untrained = open_small(model).model
    before = {name: read(untrained, found, budget) for name, found in texts.held_out.items()}
    _desk = Desk(texts, model, budget, save_to, before)


def measure(name: str, seed: int) -> dict[str, Any]:
    """Train one variant; the figures before and after by domain."""
    variant = VARIANTS[name]
    lm, model, took = align(_desk.model, variant, _desk.budget, _desk.texts.of(variant.text), seed)
    found = {
        domain: compare(_desk.before[domain], read(model, texts, _desk.budget), texts, seed)
        for domain, texts in _desk.texts.held_out.items()
    }
    if _desk.save is not None and seed == 0:
        save(lm, model, _desk.save / name.replace(" ", "_").replace(",", ""))
    return {"variant": name, "seed": seed, "training": took, "domains": found}


def compare(before: Reading, after: Reading, texts: HeldOut, seed: int) -> dict[str, Any]:
    measures = compare_words(before.words, after.words, texts.nats(), list(range(len(texts.examples))))
    measures["bits_per_byte"] = Measure(
        before=before.nats / np.log(2), after=after.nats / np.log(2), weight=texts.responses, higher_is_better=False
    )
    return {name: found.describe(seed) for name, found in measures.items()}


def summary(run: dict[str, Any]) -> str:
    parts = [
        f"{domain}: {m['bits_per_byte']['before']:.3f} → {m['bits_per_byte']['after']:.3f} bits per byte, "
        f"ρ {m['spearman']['before']:.3f} → {m['spearman']['after']:.3f}, 10× "
        f"{m['kept_overlap_10x']['before']:.3f} → {m['kept_overlap_10x']['after']:.3f} ({gap(m):+.0%} of the gap)"
        for domain, m in run["domains"].items()
    ]
    took = run["training"]
    mean = sum(gap(m) for m in run["domains"].values()) / len(run["domains"])
    return (
        f"{run['variant']}, seed {run['seed']}: {mean:+.1%} of the gap at 10×; {took['tokens']:,} tokens in "
        f"{took['seconds']:.0f} s, loss {took['loss'][0]:.3f} → {took['loss'][-1]:.3f}\n  " + "\n  ".join(parts)
    )


def gap(measures: dict[str, Any]) -> float:
    """Share of the distance to full overlap at 10× that was closed."""
    return float(measures["kept_overlap_10x"]["gap_closed"])


def print_table(runs: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(run["variant"] for run in runs))
    found = list(runs[0]["domains"]) if runs else []
    print(f"| objective | seeds | {' | '.join(found)} | mean |\n" + "|---" * (len(found) + 3) + "|")
    for name in names:
        of_name = [run for run in runs if run["variant"] == name]
        cells = []
        for domain in found:
            closed = sum(gap(run["domains"][domain]) for run in of_name) / len(of_name)
            after = sum(run["domains"][domain]["kept_overlap_10x"]["after"] for run in of_name) / len(of_name)
            cells.append((closed, f"{after:.3f} ({closed:+.0%})"))
        mean = sum(closed for closed, _ in cells) / len(cells)
        print(f"| {name} | {len(of_name)} | {' | '.join(cell for _, cell in cells)} | {mean:+.1%} |")


def known_runs(options: argparse.Namespace, texts: Texts) -> list[dict[str, Any]]:
    """Of an earlier call with the same settings and text."""
    if not options.out.exists():
        return []
    found = json.loads(options.out.read_text(encoding="utf-8"))
    same = {**chosen(options), **texts.describe()}
    if any(found.get(name) != value for name, value in same.items()):
        sys.exit(f"{options.out} was made with other settings or text; give another --out")
    return list(found["runs"])


def chosen(options: argparse.Namespace) -> dict[str, Any]:
    names = {name: Path(getattr(options, name)).name.replace("_", " ") for name in ("model", "target")}
    return names | {name: getattr(options, name) for name in ("tokens", "texts")}


def store(runs: list[dict[str, Any]], texts: Texts, options: argparse.Namespace) -> None:
    names = list(dict.fromkeys([*(run["variant"] for run in runs), *options.variants]))
    result = {
        "command": "python benchmarks/align_objectives.py --datasets FOLDER --answers records.jsonl --free free.jsonl "
        + " ".join(f"--{name} {value}" for name, value in chosen(options).items())
        + " --compile" * options.compile
        + " --seeds "
        + " ".join(str(seed) for seed in sorted({run["seed"] for run in runs})),
        **chosen(options),
        **texts.describe(),
        "variants": {name: asdict(VARIANTS[name]) for name in names},
        **frame.circumstances(),
        "runs": sorted(runs, key=lambda run: (names.index(run["variant"]), run["seed"])),
    }
    frame.write_result(options.out, result, indent=1)


if __name__ == "__main__":
    frame.run(main)
