"""How fast a local target answers: the loop, the slots, and transformers' continuous batching, in one run.

    python benchmarks/generate_local.py --model qwen2.5-coder-1.5b --rows gsm8k/test.jsonl \
        --out benchmarks/results/generate_local.json

Asks the 1-shot questions of ``--rows`` (JSONL with ``question`` and ``answer``; used anew with other examples until
there are ``--count`` prompts), in the model's chat template where it has one, for greedy answers of up to 400 tokens.
The loop answers the first ``--loop`` of them in batches of 128, as evaluation has it. Reported beside the rates: how
many greedy texts are the same both ways, next to how many the loop itself gives alike in batches of another size; and
the same in float32, where rounding hardly turns a token. ``--model random`` takes random weights of the 1.5B shape.
A way that fails is reported with its traceback, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import time
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from terselm.data.generate import Answer, Limits, Query, generate
from terselm.data.slots import decode
from terselm.files import atomic_file
from terselm.models import CausalLM, load_causal_lm

_BATCH = 128
_SHAPE_OF_1_5B = {
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-coder-1.5b", help="alias, folder, GGUF file, hub id, or random")
    parser.add_argument("--rows", type=Path, required=True, help="JSONL with question and answer")
    parser.add_argument("--count", type=int, default=1600, help="answers by the slots")
    parser.add_argument("--loop", type=int, default=256, help="answers by the loop, of the same prompts")
    parser.add_argument("--exact", type=int, default=64, help="answers in float32, both ways; 0 leaves it out")
    parser.add_argument("--max-new-tokens", type=int, default=400)
    parser.add_argument("--slots", type=int, help="default: what the library takes")
    parser.add_argument("--transformers", type=int, default=0, help="answers by transformers' generate_batch")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the figures")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    result = measure(options)
    with atomic_file(options.out) as file:
        json.dump(result, file, indent=2)
        file.write("\n")
    print(table(result))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    lm = load(options.model, options.rows, options.device)
    queries = make_queries(lm, options.rows, options.count)
    limits = Limits(max_new_tokens=options.max_new_tokens)
    result: dict[str, Any] = {
        "model": options.model,
        "dtype": str(lm.model.dtype),
        "device": torch.cuda.get_device_name() if lm.model.device.type == "cuda" else platform.processor() or "cpu",
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "max_new_tokens": options.max_new_tokens,
        "prompt_tokens": sum(len(query.prompt) for query in queries) / len(queries),
        "ways": {},
    }
    texts: dict[str, list[str]] = {}

    def run(name: str, answer: Callable[[], list[Answer]]) -> None:
        print(f"{name} …", flush=True)
        try:
            result["ways"][name], texts[name] = timed(lm, answer)
        except Exception as error:  # the other ways are measured all the same, and the figures so far are kept
            traceback.print_exc()
            result["ways"][name] = {"error": repr(error)[:500]}
        print(json.dumps(result["ways"][name]), flush=True)

    few = queries[: options.loop]
    generate(lm, few[:4], Limits(max_new_tokens=4), engine="loop")  # kernels are loaded, handles made
    run("slots", lambda: by_slots(lm, queries, limits, options.slots))
    run("slots, sampled", lambda: by_slots(lm, sampled(queries), limits, options.slots))
    run("loop", lambda: in_batches(lm, few, limits, _BATCH))
    run("loop, small batches", lambda: in_batches(lm, few[: options.loop // 4], limits, _BATCH // 4))
    if options.transformers:
        run("transformers", lambda: by_transformers(lm, queries[: options.transformers], limits))
    result["same_texts"] = {
        f"{one} / {other}": agreement(texts[one], texts[other])
        for one, other in (("slots", "loop"), ("loop, small batches", "loop"), ("transformers", "loop"))
        if one in texts and other in texts
    }
    if options.exact:
        print("float32 …", flush=True)
        lm.model.float()
        run("float32 slots", lambda: by_slots(lm, queries[: options.exact], limits, options.slots))
        run("float32 loop", lambda: in_batches(lm, queries[: options.exact], limits, options.exact))
        if {"float32 slots", "float32 loop"} <= texts.keys():
            result["same_texts"]["float32 slots / loop"] = agreement(texts["float32 slots"], texts["float32 loop"])
    rates = [result["ways"].get(name, {}).get("answers_per_s") for name in ("slots", "loop")]
    result["speedup"] = rates[0] / rates[1] if all(rates) else None
    return result


def by_slots(lm: CausalLM, queries: Sequence[Query], limits: Limits, slots: int | None) -> list[Answer]:
    answers = dict(decode(lm, queries, limits, slots=slots))
    return [answers[index] for index in range(len(queries))]


def in_batches(lm: CausalLM, queries: Sequence[Query], limits: Limits, size: int) -> list[Answer]:
    """Shorter prompts first, as `LocalTarget.generate` has it."""
    order = sorted(range(len(queries)), key=lambda index: len(queries[index].prompt))
    answers: dict[int, Answer] = {}
    for begin in range(0, len(order), size):
        batch = order[begin : begin + size]
        answers.update(zip(batch, generate(lm, [queries[i] for i in batch], limits, engine="loop"), strict=True))
    return [answers[index] for index in range(len(queries))]


def by_transformers(lm: CausalLM, queries: Sequence[Query], limits: Limits) -> list[Answer]:
    """Continuous batching with paged attention, as ``generate_batch`` does it without flash-attn."""
    from transformers import GenerationConfig

    config = GenerationConfig(
        max_new_tokens=limits.max_new_tokens, do_sample=False, eos_token_id=lm.model.generation_config.eos_token_id
    )
    outputs = lm.model.generate_batch([list(query.prompt) for query in queries], generation_config=config)
    answers = []
    for query, key in zip(queries, sorted(outputs, key=lambda name: int(name.rsplit("_", 1)[-1])), strict=True):
        tokens = outputs[key].generated_tokens
        text = lm.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
        answers.append(
            Answer(
                text=text, finish_reason="", prompt_tokens=len(query.prompt), completion_tokens=len(tokens)
            )
        )  # fmt: skip
    return answers


def timed(lm: CausalLM, answer: Callable[[], list[Answer]]) -> tuple[dict[str, Any], list[str]]:
    on_gpu = lm.model.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    begin = time.perf_counter()
    answers = answer()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    tokens = sum(one.completion_tokens for one in answers)
    figures = {
        "answers": len(answers),
        "seconds": round(seconds, 2),
        "answers_per_s": round(len(answers) / seconds, 2),
        "tokens_per_s": round(tokens / seconds),
        "tokens_per_answer": round(tokens / len(answers), 1),
        "ended": round(sum(one.finish_reason == "stop" for one in answers) / len(answers), 3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else None,
    }
    return figures, [one.text for one in answers]


def agreement(texts: Sequence[str], others: Sequence[str]) -> dict[str, Any]:
    """Of the answers that both hold: how many are the same, and how much of the text before the first difference."""
    pairs = list(zip(texts, others, strict=False))
    common = [next((i for i, (a, b) in enumerate(zip(x, y, strict=False)) if a != b), len(min(x, y, key=len)))
              for x, y in pairs]  # fmt: skip
    whole = sum(len(max(x, y, key=len)) for x, y in pairs)
    return {
        "answers": len(pairs),
        "same": sum(x == y for x, y in pairs),
        "last_number_same": sum(last_number(x) == last_number(y) for x, y in pairs),
        "characters_before_a_difference": round(sum(common) / max(1, whole), 3),
    }


def last_number(text: str) -> str:
    digits = "".join(c if c.isdigit() else " " for c in text.replace(",", "")).split()
    return digits[-1] if digits else ""


def make_queries(lm: CausalLM, rows: Path, count: int) -> list[Query]:
    """1-shot questions; the example is another row, another one each time round."""
    data = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines() if line.strip()]
    queries = []
    for index in range(count):
        row, example = data[index % len(data)], data[(index * 7 + 1 + index // len(data)) % len(data)]
        text = (
            "Solve the problem step by step, and end with: The answer is N.\n\n"
            f"Question: {example['question']}\nLet's think step by step\n{example['answer']}\n\n"
            f"Question: {row['question']}\nLet's think step by step\n"
        )
        if getattr(lm.tokenizer, "chat_template", None):
            from terselm.models.chat import chat_prompt

            ids = chat_prompt(lm.tokenizer, text)
        else:
            ids = [lm.start_id, *lm.tokenizer(text, add_special_tokens=False).input_ids]
        queries.append(Query(prompt=tuple(ids), temperature=0.0, seed=index))
    return queries


def sampled(queries: Sequence[Query]) -> list[Query]:
    """The same prompts with a temperature and a stop string, every other one greedy."""
    return [
        Query(prompt=query.prompt, temperature=0.8 * (index % 2), seed=index, stop=("\n\nQuestion:",))
        for index, query in enumerate(queries)
    ]


def load(name: str, rows: Path, device: str) -> CausalLM:
    if name != "random":
        return load_causal_lm(name, device=device)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    from terselm.models.load import pick_device

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=8000, special_tokens=["</s>"], show_progress=False)
    backend.train_from_iterator(rows.read_text(encoding="utf-8").splitlines()[:2000], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    place = pick_device(device)
    torch.manual_seed(0)
    with torch.device(place):
        model = Qwen2ForCausalLM(Qwen2Config(**_SHAPE_OF_1_5B, bos_token_id=0, eos_token_id=0))
    dtype = torch.float32 if place.type == "cpu" else torch.bfloat16
    return CausalLM(model=model.to(place, dtype).eval(), tokenizer=tokenizer, name="random")


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['model']}, {result['dtype']}, {result['device']}, prompts of {result['prompt_tokens']:.0f} tokens",
        "",
        "| way | answers | s | answers/s | tokens/s | tokens an answer | GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, way in result["ways"].items():
        if "error" in way:
            lines.append(f"| {name} | {way['error']} | | | | | |")
            continue
        lines.append(
            f"| {name} | {way['answers']:,} | {way['seconds']} | {way['answers_per_s']} | {way['tokens_per_s']:,} "
            f"| {way['tokens_per_answer']} | {way['peak_gib']} |"
        )
    lines += [""] + [f"{pair}: {figures}" for pair, figures in result["same_texts"].items()]
    if result["speedup"]:
        lines.append(f"slots / loop: {result['speedup']:.1f} times the answers a second")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
