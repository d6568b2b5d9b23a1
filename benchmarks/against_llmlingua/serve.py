"""One side of the comparison: a compressor in a process of its own, which answers requests, one JSON object a line.

Knows torch and the standard library alone, so that it runs in the peer's environment too.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from against_llmlingua.watch import Watch

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Side:
    """A compressor that is ready to work.

    Attributes:
        model: its causal LM, with the head.
        encode: a text's tokens, none of them special.
        compress: the compressed texts of prompts, for a budget in tokens.
        packages: whose versions are reported.
    """

    model: Any
    encode: Callable[[str], list[int]]
    compress: Callable[[Sequence[Json], int], list[str]]
    packages: Sequence[str]


def serve(load: Callable[[Path, str, str], Side]) -> None:
    """Answer requests from standard input until it ends. ``load`` takes folder, device and dtype."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    device, folder, dtype = sys.argv[1:]
    side = load(Path(folder), device, dtype)
    watch = Watch(side.model)
    for line in sys.stdin:
        request = json.loads(line)
        with torch.inference_mode():
            answer = _answer(side, watch, request)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _answer(side: Side, watch: Watch, request: Json) -> Json:
    match request["do"]:
        case "describe":
            return _describe(side)
        case "probe":
            answer = _probe(side, request["text"])
            watch.remember_base()
            return answer
        case "compress":
            return _compress(side, watch, request)
        case "score":
            from against_llmlingua.scoring import score

            with watch.away():
                return score(side.model, request)
    raise ValueError(request["do"])


def _describe(side: Side) -> Json:
    return {
        "versions": {"python": sys.version.split()[0], **{package: version(package) for package in side.packages}},
        "threads": torch.get_num_threads(),
        "attention": side.model.config._attn_implementation,
        "dtype": _dtype(side.model),
        "weights_bytes": sum(p.numel() * p.element_size() for p in side.model.parameters()),
    }


def _dtype(model: Any) -> str:
    quantised = any("quantized" in type(module).__module__ for module in model.modules())
    return "int8" if quantised else str(model.dtype).removeprefix("torch.")


def _probe(side: Side, text: str) -> Json:
    """Tokens of a text, and −log p of all but the first: the same on both sides, or the weights are not the same."""
    ids = side.encode(text)
    tokens = torch.tensor([ids], device=side.model.device)
    log_p = side.model(tokens).logits[0, :-1].float().log_softmax(-1)
    return {"ids": ids, "nll": (-log_p.gather(-1, tokens[0, 1:, None])[:, 0]).tolist()}


def _compress(side: Side, watch: Watch, request: Json) -> Json:
    watch.start()
    _synchronise(side.model)
    begin, begin_processor = time.perf_counter(), time.process_time()
    texts = side.compress(request["prompts"], request["budget"])
    _synchronise(side.model)
    return {
        "seconds": time.perf_counter() - begin,
        "processor_seconds": time.process_time() - begin_processor,  # of all threads; other programs hardly change it
        **watch.stop(),
        "tokens": [len(side.encode(text)) for text in texts],
    }


def _synchronise(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
