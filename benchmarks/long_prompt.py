"""A prompt far beyond the small LM's window: time, memory, and what was kept.

    python benchmarks/long_prompt.py --tokens 200000 --out FILE.json

`documents`: the text as documents of some 2,000 tokens with a question; `text`: as one text. The text is that of the
bundled records, over and over, each copy numbered.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import sys
import threading
import time
from pathlib import Path
from typing import Any

import frame
import torch

from terselm import Prompt, PromptCompressor
from terselm.data.records import read_records

_RECORDS = Path(__file__).parents[1] / "data" / "sample" / "records.jsonl"
_DOCUMENT = 2000  # tokens
_MIB = 1 << 20


def main() -> None:
    parser = frame.parser(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--form", choices=("documents", "text"), nargs="+", default=["documents", "text"])
    options = parser.parse_args()
    result = frame.circumstances()
    result |= {"model": Path(options.model).name, "runs": measure(options)}
    print(json.dumps(result, indent=2))
    frame.write_result(options.out, result)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    compressor = PromptCompressor.from_pretrained(options.model, device=options.device, dtype=options.dtype)
    compressor.compress_text("A short text, so that libraries set themselves up.", rate=0.5)
    documents = make_documents(compressor, options.tokens)
    runs = []
    for form in options.form:
        prompt = Prompt(demonstrations=["\n\n".join(documents)])
        if form == "documents":
            prompt = Prompt(
                instruction="Answer from the documents.", demonstrations=documents, question="What do the records say?"
            )
        before = memory()
        with Watch() as watch:
            began = time.perf_counter()
            result = compressor.compress_batch([prompt], rate=options.rate)[0]
            seconds = time.perf_counter() - began
        runs.append(
            {
                "form": form,
                "dtype": str(compressor.lm.model.dtype).removeprefix("torch."),
                "threads": torch.get_num_threads(),
                "window": compressor.lm.window,
                "original_tokens": result.original_tokens,
                "budget": result.budget,
                "compressed_tokens": result.compressed_tokens,
                "demonstrations_selected": len(result.selected),
                "tokens_read": result.tokens_read,
                "seconds": round(seconds, 1),
                "resident_before_mib": round(before / _MIB),
                "peak_above_mib": round((watch.peak - before) / _MIB),
                "peak_above_by_tenth_of_the_time_mib": [round((p - before) / _MIB) for p in watch.tenths()],
            }
        )
        print(runs[-1], file=sys.stderr)
    return runs


def make_documents(compressor: PromptCompressor, tokens: int) -> list[str]:
    texts = [f"{record.messages[-1].content}\n{record.response}" for record in read_records(_RECORDS)]
    count = compressor.lm.tokenizer
    documents: list[str] = []
    lines: list[str] = []
    size = total = 0
    for number in itertools.count():
        lines.append(f"Record {number}. {texts[number % len(texts)]}")
        size += len(count(lines[-1], add_special_tokens=False)["input_ids"])
        if size >= _DOCUMENT:
            documents.append("\n".join(lines))
            total, size, lines = total + size, 0, []
            if total >= tokens:
                return documents
    raise AssertionError


def memory() -> int:
    """Bytes in use: on the GPU, else resident in memory now."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    pages = Path("/proc/self/statm")
    if pages.exists():
        return int(pages.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Watch:
    """Looks at the memory ten times a second."""

    def __enter__(self) -> Watch:
        self._seen: list[int] = [memory()]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def peak(self) -> int:
        return max(self._seen)

    def tenths(self) -> list[int]:
        """The peak in each tenth of the time."""
        step = max(1, len(self._seen) // 10)
        return [max(self._seen[i : i + step]) for i in range(0, step * 10, step) if self._seen[i : i + step]]

    def _look(self) -> None:
        while not self._over.wait(0.1):
            self._seen.append(memory())


if __name__ == "__main__":
    frame.run(main)
