"""How often the answer stands in what is left of a prompt of documents.

    python benchmarks/answer_kept.py --data oracle.jsonl --out benchmarks/results/answer_kept.json

The data are rows with ``question``, ``answers`` and ``ctxs`` (``title``, ``text``), such as the NQ file of
arXiv:2307.03172. Each question's passage stands among those of other rows that BM25 finds nearest to the question and
that hold no accepted answer, at a place drawn by the seed. The whole text is cut to shares of its tokens; an answer is
kept if it stands in what is left of the documents, as whole words.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from terselm import CompressionSettings, PromptCompressor
from terselm.compress.result import CompressionResult
from terselm.evaluate.answers import holds_answer
from terselm.evaluate.nq import nq_prompts
from terselm.evaluate.settings import Distractors
from terselm.evaluate.suite_rows import suite_rows

METHODS: dict[str, dict[str, Any]] = {
    "default": {},
    "minilm-l6": {"ranker": "minilm-l6"},
    "bm25": {"rank_by": "bm25"},
    "question, documents alone": {"rank_by": "question", "unit": "demonstration"},
    "question, tokens": {"rank_by": "question", "unit": "token"},
    "longllmlingua": {"rank_by": "question", "contrast": True, "rank_delta": 0.3, "order": "ranked"},
    "surprisal, sentences": {"unit": "sentence"},
    "surprisal, tokens": {"unit": "token"},
}


def main() -> None:
    arguments = _arguments()
    rows = suite_rows(arguments.data)
    numbers = range(len(rows))[slice(*(int(n) if n else None for n in arguments.rows.split(":")))]
    chosen = random.Random(arguments.seed).sample(list(numbers), min(arguments.questions, len(numbers)))
    prompts = nq_prompts(rows, chosen, arguments.documents, arguments.seed, Distractors.HARDEST)
    compressor = PromptCompressor.from_pretrained(arguments.model, device=arguments.device)
    figures: dict[str, Any] = {}
    for name in arguments.methods or METHODS:
        own = compressor.with_settings(CompressionSettings(**METHODS[name]))
        for rate in arguments.rates:
            kept, shares, read, seconds = [], [], [], 0.0
            for begin in range(0, len(chosen), arguments.batch_size):
                part = slice(begin, begin + arguments.batch_size)
                started = time.perf_counter()
                results = own.compress_batch(prompts[part], rate=rate)
                seconds += time.perf_counter() - started
                for number, result in zip(chosen[part], results, strict=True):
                    kept.append(holds_answer(documents_left(result), rows[number].texts("answers")))
                    shares.append(result.compressed_tokens / result.original_tokens)
                    read.append(result.tokens_read)
            figures.setdefault(name, {})[str(rate)] = {
                "answer_kept": float(np.mean(kept)),
                "kept": [int(each) for each in kept],
                "share_of_tokens": float(np.mean(shares)),
                "tokens_read": float(np.mean(read)),
                "seconds_a_prompt": seconds / len(chosen),
            }
            print(f"{name:28} {rate:5.0%} answer kept {np.mean(kept):6.1%}  {seconds / len(chosen):.2f} s", flush=True)
            write(arguments, chosen, figures)


def write(arguments: argparse.Namespace, chosen: Sequence[int], figures: dict[str, Any]) -> None:
    asked = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    values = {"arguments": asked, "rows": list(chosen), "methods": figures}
    arguments.out.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def documents_left(result: CompressionResult) -> str:
    """What is kept of the documents, a gap where something was dropped."""
    texts: list[str] = []
    gap = True
    for token in result.tokens:
        if token.part == "demonstration" and token.kept:
            texts += [" … " if gap else "", token.text]
        gap = not token.kept
    return "".join(texts)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--rows", default="", help="of the data to choose among, such as 1000:2000")
    parser.add_argument("--documents", type=int, default=20)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.5, 0.25, 0.1, 0.05])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=None)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
