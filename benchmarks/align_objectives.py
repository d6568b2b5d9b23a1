"""Which objective makes a small LM see text as its target does: word by word, on held-out text of four domains.

    python benchmarks/align_objectives.py --datasets FOLDER --minutes 8 --out benchmarks/results/align_objectives.json

SmolLM2-135M to a local target that reads every word (gemma3-270m). All variants see as many tokens of text. Reported
before → after by domain: the rank correlation (Spearman) of the words' surprisals with the target's, and the overlap
of the words kept at 2×, 5× and 10× with those that the target itself would keep, with paired bootstrap intervals over
texts. One domain (Wikipedia) is like nothing that is trained on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from alignment_quality import domains
from alignment_quality.aligning import Bench, Budget, Variant, align, base, target_words, words
from alignment_quality.generate import generate

from terselm.data.records import Record
from terselm.files import atomic_file
from terselm.models import load_causal_lm
from terselm.train.choices import LossOn
from terselm.train.config import ObjectiveSettings
from terselm.train.hardware import describe_hardware, describe_versions
from terselm.train.progress import quieten_libraries
from terselm.train.report.metrics import LEAST_WORDS, compare_words


def matched(**weights: float) -> ObjectiveSettings:
    return ObjectiveSettings(**{"nll": 0.0, **weights}, target="it")  # type: ignore[arg-type]


VARIANTS = {
    "NLL, response": Variant(objective=ObjectiveSettings()),
    "NLL, all": Variant(objective=ObjectiveSettings(), loss_on=LossOn.ALL),
    "NLL, response of the target": Variant(objective=ObjectiveSettings(), text="generated"),
    "matching": Variant(objective=matched(matching=1)),
    "matching, near threshold": Variant(objective=matched(matching=1, near_threshold=4)),
    "matching + ranking": Variant(objective=matched(matching=1, ranking=1)),
    "ranking": Variant(objective=matched(ranking=1)),
    "matching + NLL": Variant(objective=matched(matching=1, nll=0.3), loss_on=LossOn.ALL),
    "matching, rank 128": Variant(objective=matched(matching=1), rank=128),
    "matching, all weights": Variant(objective=matched(matching=1), all_weights=True, learning_rate=1e-4),
    "matching + ranking, all weights": Variant(
        objective=matched(matching=1, ranking=1), all_weights=True, learning_rate=1e-4
    ),
    "matching, generated": Variant(objective=matched(matching=1), text="generated"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--target", default="gemma3-270m")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=2_000_000, help="that each variant is trained on")
    parser.add_argument("--records", type=int, default=0, help="train on so many records at most; 0 for all")
    parser.add_argument("--generate", type=int, default=5_000, help="prompts that the target answers")
    parser.add_argument("--generated-tokens", type=int, default=160, help="of each answer, at most")
    parser.add_argument("--texts", type=int, default=100, help="held-out texts a domain")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no further variant begins")
    parser.add_argument("--row-length", type=int, default=1024)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/align_objectives.json"))
    options = parser.parse_args()
    quieten_libraries()
    run(options)


def run(options: argparse.Namespace) -> None:
    deadline = time.monotonic() + 60 * options.minutes
    bench = Bench(
        model=options.model,
        target=load_causal_lm(options.target),
        budget=Budget(tokens=options.tokens, row_length=options.row_length, compile=options.compile),
    )
    held_out = {
        domain: [e for e in bench.encode(domain, found) if e.guide is not None and len(e.guide.nats) >= LEAST_WORDS]
        for domain, found in domains.held_out(options.datasets, options.texts).items()
    }
    records = domains.training(options.datasets)
    records = records[:: max(1, len(records) // options.records)] if options.records else records
    untrained = base(bench)
    before = {domain: words(untrained, texts, bench.budget) for domain, texts in held_out.items()}
    del untrained
    print(
        f"held-out text read twice with {60 * options.minutes - deadline + time.monotonic():.0f} s gone",
        file=sys.stderr,
    )
    runs: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        for name in options.variants:
            if time.monotonic() > deadline:
                print(f"no time left for {name}, seed {seed}", file=sys.stderr)
                continue
            variant = VARIANTS[name]
            text = bench.encode(variant.text, records if variant.text == "given" else answers(bench, records, options))
            try:
                model, took = align(bench, variant, text, seed)
            except RuntimeError as error:  # of the GPU or its compiler; the other variants may still work
                print(f"{name}, seed {seed} failed: {str(error)[:500]}", file=sys.stderr)
                continue
            after = {domain: words(model, texts, bench.budget) for domain, texts in held_out.items()}
            del model
            found = {domain: measure(before[domain], after[domain], texts, seed) for domain, texts in held_out.items()}
            runs.append({"variant": name, "seed": seed, "training": took, "domains": found})
            print(summary(runs[-1]), flush=True)
            save(runs, options)
    print_table(runs)


def answers(bench: Bench, records: list[Record], options: argparse.Namespace) -> list[Record]:
    """The target's own, made once."""
    if not bench.generated:
        some = records[:: max(1, len(records) // options.generate)]
        bench.generated = generate(bench.target, some, tokens=options.generated_tokens, seed=0)
    return bench.generated


def measure(before: list[Any], after: list[Any], texts: list[Any], seed: int) -> dict[str, Any]:
    measures = compare_words(before, after, target_words(texts), list(range(len(texts))))
    return {name: found.describe(seed) for name, found in measures.items()}


def summary(run: dict[str, Any]) -> str:
    parts = [
        f"{domain}: ρ {m['spearman']['before']:.3f} → {m['spearman']['after']:.3f}, 10× "
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


def save(runs: list[dict[str, Any]], options: argparse.Namespace) -> None:
    chosen = {name: getattr(options, name) for name in ("model", "target", "tokens", "seeds", "texts", "generate")}
    result = {
        "command": "python benchmarks/align_objectives.py " + " ".join(f"--{k} {v}" for k, v in chosen.items()),
        **chosen,
        "variants": {name: str(VARIANTS[name]) for name in options.variants},
        "versions": describe_versions(),
        "hardware": describe_hardware(),
        "runs": runs,
    }
    with atomic_file(options.out) as file:
        json.dump(result, file, indent=2)
        file.write("\n")


if __name__ == "__main__":
    main()
