"""How fast a local target answers and scores: records and log-probabilities from one GPU.

    python benchmarks/collect_local.py --instructions FILE.jsonl --count 5000 --folder /tmp/collected \
        --out benchmarks/results/collect_local.json

Asks for somewhat more than ``--count`` answers, since those without a use (empty, copied from the template) are
dropped. The folder then holds ``records.jsonl``, ``records.logprobs.parquet`` and the ledger. Sampled at temperature
0.8.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import frame
import numpy as np

from terselm.data.collection.collect import collect, logprobs_of
from terselm.data.collection.settings import CollectSettings, LogProbSettings, PromptTemplate
from terselm.data.instructions import load_instructions
from terselm.data.logprobs import LogProbFile
from terselm.data.records import read_records
from terselm.data.schema import record_text
from terselm.models import load_causal_lm

TEMPLATE = PromptTemplate(
    text="### Instruction:\nWhat does a librarian do?\n\n### Response:\nA librarian chooses and orders books, keeps "
    "them in order, lends them to readers and helps people to find what they are looking for.\n\n"
    "### Instruction:\n{prompt}\n\n### Response:\n",
    stop=["\n###"],
)


def main() -> None:
    parser = frame.parser(__doc__, required=True)
    parser.add_argument("--model", default="gemma3-270m", help="alias, folder or hub id")
    parser.add_argument("--instructions", required=True, help="anything that terselm collect takes")
    parser.add_argument("--count", type=int, default=5000, help="records wanted")
    parser.add_argument("--ask", type=float, default=1.1, help="answers asked for, as a multiple of them")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--batch-size", type=int, help="default: what the memory allows")
    parser.add_argument("--top-k", type=int, default=0, help="log-probabilities of the likeliest tokens, too")
    parser.add_argument("--folder", type=Path, required=True, help="new folder for the records")
    options = parser.parse_args()
    if options.folder.exists():
        parser.error(f"{options.folder} exists; answers that are there would not be generated again")
    result = measure(options)
    frame.write_result(options.out, result)
    print(json.dumps(result, indent=2))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    about = frame.circumstances("pyarrow")
    instructions = load_instructions(options.instructions).instructions
    wanted = round(options.count * options.ask)
    samples = -(-wanted // len(instructions))
    settings = CollectSettings(
        endpoint=f"local:{options.model}",
        temperatures=[0.8],
        samples=samples,
        top_p=0.95,
        top_k=64,
        max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size,
        templates={"default": TEMPLATE},
    )
    asked = instructions[: -(-wanted // samples)]
    out = options.folder / "records.jsonl"
    seconds, start = {}, time.perf_counter()
    lm = load_causal_lm(options.model)
    seconds["load"], start = time.perf_counter() - start, time.perf_counter()
    collect(asked, out, settings, lm=lm)
    seconds["generate"], start = time.perf_counter() - start, time.perf_counter()
    # The ledger has the answers: this run scores them and writes both files.
    scoring = CollectSettings(**vars(settings) | {"logprobs": LogProbSettings(keep=True, top_k=options.top_k)})
    summary = collect(asked, out, scoring, lm=lm)
    seconds["score"] = time.perf_counter() - start
    check(out)
    total = seconds["generate"] + seconds["score"]
    return {
        "command": f"python benchmarks/collect_local.py --instructions {Path(options.instructions).name} "
        f"--count {options.count} --model {Path(options.model).name}",
        "records": summary.records,
        "asked": len(asked) * samples,
        "dropped": summary.without_record,
        "cut_loops": summary.cut,
        "drawn_again": summary.retried,
        "max_new_tokens": options.max_new_tokens,
        "prompt_tokens": summary.prompt_tokens,
        "completion_tokens": summary.completion_tokens,
        "seconds": {name: round(value, 2) for name, value in seconds.items()} | {"generate_and_score": round(total, 2)},
        "records_per_minute": round(60 * summary.records / total),
        "completion_tokens_per_second": round(summary.completion_tokens / seconds["generate"]),
        "bytes": {path.name: path.stat().st_size for path in sorted(options.folder.iterdir())},
        **about,
        "hardware": about["hardware"] | gpu(lm.model.device.type),
    }


def check(out: Path) -> None:
    """Every record has its scores, of its own text, and the first token starts where the text does."""
    for record, scored in zip(read_records(out), LogProbFile(logprobs_of(out)), strict=True):
        assert scored.id == record.id
        assert scored.text == record_text(record).text
        assert scored.starts[0] == 0
        assert scored.ends[-1] == len(scored.text)
        assert np.isfinite(scored.logprobs).all()


def gpu(device: str) -> dict[str, Any]:
    """Where the target ran, and the most memory that it took there."""
    import torch

    if device != "cuda":
        return {"device": device}
    peak = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return {"device": device, "gpu": torch.cuda.get_device_name(), "peak_memory_gib": peak}


if __name__ == "__main__":
    frame.run(main)
