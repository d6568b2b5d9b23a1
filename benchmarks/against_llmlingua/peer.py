"""The peer's side: llmlingua as its users call it. Runs in an environment of its own, without terselm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tiktoken
import tiktoken.registry

from against_llmlingua.serve import Json, Side, serve

# When it is constructed, llmlingua asks tiktoken for the encoding of gpt-3.5-turbo, whose vocabulary tiktoken then
# downloads. It only counts tokens with it, twice a prompt, for what it reports; no decision depends on the count. So
# single bytes stand in for that vocabulary: no network, and 0.4 ms a prompt, no more than the real one takes.
tiktoken.registry.ENCODINGS["cl100k_base"] = tiktoken.Encoding(
    name="cl100k_base",
    pat_str=r"'(?:[sdmt]|ll|ve|re)|\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+",
    mergeable_ranks={bytes([byte]): byte for byte in range(256)},
    special_tokens={},
)


def load(folder: Path, device: str, dtype: str) -> Side:
    from llmlingua import PromptCompressor

    # On a GPU it takes the dtype of config.json, on the CPU float32: what environment.peer_model writes there.
    compressor = PromptCompressor(str(folder), device_map=device, model_config={"trust_remote_code": False})

    def compress(prompts: Sequence[Json], budget: int) -> list[str]:
        return [  # it has no batches
            compressor.compress_prompt(
                prompt["demonstrations"],
                instruction=prompt["instruction"],
                question=prompt["question"],
                target_token=budget,
            )["compressed_prompt"]
            for prompt in prompts
        ]

    return Side(
        model=compressor.model,
        encode=lambda text: list(compressor.tokenizer(text, add_special_tokens=False)["input_ids"]),
        compress=compress,
        packages=("llmlingua", "torch", "transformers", "tokenizers", "numpy"),
    )


if __name__ == "__main__":
    serve(load)
