"""What lower precision, batches and the cache change in what is kept, on real weights.

    python benchmarks/precision.py --gsm8k train.jsonl --out FILE.json

Each variant compresses the same few-shot prompts of many lengths to the same budget as float32 does, one at a time:

- batches of 17, and the same prompts again with everything in the cache: these must choose exactly alike;
- other number formats: how many of the kept tokens are the same, and how many of all decisions (kept or dropped).

With --reference the brute-force reference of the tests (no cache, no batch, one full pass a segment) does them too.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import frame
import numpy as np
import torch
from against_llmlingua.prompts import PromptMaker, bundled, gsm8k
from tqdm import tqdm

from terselm import Prompt, PromptCompressor
from terselm.compress.settings import paper_settings
from terselm.models import CausalLM, load_causal_lm
from terselm.models.load import pick_device

_TESTS = Path(__file__).parents[1] / "tests" / "compress"
_NO_CACHE = paper_settings(cache_bytes=0)
_BATCH = 17

Kept = list[list[bool]]


def main() -> None:
    options = parse()
    began = time.perf_counter()
    result = measure(options)
    print(table(result))
    frame.write_result(options.out, result)
    print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)


def parse() -> argparse.Namespace:
    parser = frame.parser(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--gsm8k", type=Path, metavar="FILE", help="GSM8K's train.jsonl, to make the prompts of")
    parser.add_argument("--prompts", type=int, default=51)
    parser.add_argument("--tokens", type=int, nargs="+", default=[500, 900, 1500, 2465], help="lengths, in turns")
    parser.add_argument("--budget", type=int, default=200)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtypes", nargs="*", help="default: bfloat16, and float16 on a GPU or int8 on the CPU")
    parser.add_argument("--reference", action="store_true", help="takes a minute or two a prompt on two CPU cores")
    return parser.parse_args()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    about = frame.circumstances()
    device = pick_device(options.device).type
    lm = load_causal_lm(options.model, device=device, dtype="float32")
    prompts, lengths = make_prompts(lm, options)
    exact = compress(PromptCompressor(lm, settings=_NO_CACHE), prompts, options.budget, 1, "float32")
    variants: dict[str, Any] = {}
    cached = PromptCompressor(lm, settings=paper_settings())
    for name, compressor in (
        ("batches of 17", PromptCompressor(lm, settings=_NO_CACHE)),
        ("the cache being filled", cached),
        ("the cache full", cached),
    ):
        kept = compress(compressor, prompts, options.budget, _BATCH, name)
        variants[f"float32, {name}"] = against(exact, kept)
    if options.reference:
        variants["float32, reference"] = against(exact, by_reference(lm, prompts, options.budget))
    dtypes = options.dtypes or ["bfloat16", "int8" if device == "cpu" else "float16"]
    for dtype in dtypes:
        rounded = PromptCompressor(
            load_causal_lm(options.model, device=device, dtype=dtype), settings=paper_settings(cache_bytes=0)
        )
        variants[dtype] = against(exact, compress(rounded, prompts, options.budget, 1, dtype))
    return {
        **about,
        "model": Path(options.model).name,
        "device": device,
        "prompts": {"number": len(prompts), "tokens": lengths, "budget": options.budget},
        "variants": variants,
    }


def make_prompts(lm: CausalLM, options: argparse.Namespace) -> tuple[list[Prompt], list[int]]:
    def count(text: str) -> int:
        return len(lm.tokenizer(text, add_special_tokens=False)["input_ids"])

    material = gsm8k(options.gsm8k) if options.gsm8k else bundled()
    makers = [PromptMaker(material, tokens, count) for tokens in options.tokens]
    prompts = [Prompt(**makers[i % len(makers)].prompt()) for i in range(options.prompts)]
    return prompts, [sum(map(count, [p.instruction, *p.demonstrations, p.question])) for p in prompts]


def compress(compressor: PromptCompressor, prompts: Sequence[Prompt], budget: int, batch: int, name: str) -> Kept:
    kept: Kept = []
    for begin in tqdm(range(0, len(prompts), batch), desc=name, disable=None):
        results = compressor.compress_batch(prompts[begin : begin + batch], budget=budget)
        kept += [[token.kept for token in result.tokens] for result in results]
    return kept


def by_reference(lm: CausalLM, prompts: Sequence[Prompt], budget: int) -> Kept:
    sys.path.insert(0, str(_TESTS))
    import reference

    torch.set_default_device(lm.model.device)  # where the reference makes its tensors
    try:
        return [
            reference.compress(lm, prompt, paper_settings(), budget=budget).kept
            for prompt in tqdm(prompts, desc="reference", disable=None)
        ]
    finally:
        torch.set_default_device(None)


def against(exact: Kept, other: Kept) -> dict[str, Any]:
    """How far two series of choices agree: prompts in all, kept tokens, decisions."""
    pairs = [(np.array(one), np.array(two)) for one, two in zip(exact, other, strict=True)]
    same = [(one & two).sum() / max(one.sum(), two.sum()) for one, two in pairs]
    return {
        "prompts_alike": sum(bool((one == two).all()) for one, two in pairs),
        "kept_tokens_alike": float(np.mean(same)),
        "least_kept_tokens_alike": float(np.min(same)),
        "decisions_alike": float(np.mean(np.concatenate([one == two for one, two in pairs]))),
    }


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| against float32, one at a time | prompts alike | kept tokens alike | decisions alike |",
        "|---|" + "---:|" * 3,
    ]
    for name, found in result["variants"].items():
        lines.append(
            f"| {name} | {found['prompts_alike']} of {result['prompts']['number']} | "
            f"{found['kept_tokens_alike']:.2%} | {found['decisions_alike']:.2%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    frame.run(main)
