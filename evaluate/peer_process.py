"""The process in which llmlingua runs: prompts in, compressed prompts out, one JSON value a line.

Runs as a script in an environment without terselm: python peer_process.py MODEL_FOLDER DEVICE
"""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    # llmlingua asks tiktoken for a vocabulary that tiktoken downloads. It only counts what it reports with it, so
    # single bytes stand in.
    import tiktoken
    import tiktoken.registry

    tiktoken.registry.ENCODINGS["cl100k_base"] = tiktoken.Encoding(
        name="cl100k_base",
        pat_str=r"\s+|\S+",
        mergeable_ranks={bytes([byte]): byte for byte in range(256)},
        special_tokens={},
    )
    from llmlingua import PromptCompressor

    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    folder, device = sys.argv[1:]
    compressor = PromptCompressor(folder, device_map=device, model_config={"trust_remote_code": False})
    for line in sys.stdin:
        prompt = json.loads(line)
        compressed = compressor.compress_prompt(
            prompt["demonstrations"],
            instruction=prompt["instruction"],
            question=prompt["question"],
            target_token=prompt["budget"],
            **prompt["options"],
        )
        answers.write(json.dumps(compressed["compressed_prompt"]) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
