"""TerseLM's side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from against_llmlingua.serve import Json, Side, serve
from terselm import Prompt, PromptCompressor
from terselm.compress.settings import paper_settings


def load(folder: Path, device: str, dtype: str) -> Side:
    compressor = PromptCompressor.from_pretrained(folder, device=device, dtype=dtype, settings=paper_settings())

    def compress(prompts: Sequence[Json], budget: int) -> list[str]:
        return [result.text for result in compressor.compress_batch([Prompt(**p) for p in prompts], budget=budget)]

    return Side(
        model=compressor.lm.model,
        encode=lambda text: list(compressor.lm.tokenizer(text, add_special_tokens=False)["input_ids"]),
        compress=compress,
        packages=("torch", "transformers", "tokenizers", "numpy"),
    )


if __name__ == "__main__":
    serve(load)
