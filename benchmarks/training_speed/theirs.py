"""TRL's side, in a process of its own: best-fit packing, LoRA, bfloat16, with and without Liger's layer kernels.

python benchmarks/training_speed/theirs.py --shape 135m --records FILE.jsonl --tokenizer FOLDER --out FILE.json <<< go
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from training_speed.corpus import examples, wait_for_turn
from training_speed.shapes import SHAPES, build
from transformers import TrainerCallback

SETTINGS = ("rows", "length", "liger", "packing", "attention", "checkpointing")


class StepTimes(TrainerCallback):
    """When each optimiser step ended, with the GPU idle."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", required=True)
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=8, help="packed rows at once")
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--liger", action="store_true")
    parser.add_argument("--packing", choices=["bfd", "wrapped", "none"], default="bfd")
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--checkpointing", action="store_true")
    options = parser.parse_args()
    result = run(options)
    options.out.write_text(json.dumps(result), encoding="utf-8")
    print(json.dumps(result), flush=True)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Real tokens per second in the second half of the steps, as on our side."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    vocabulary = SHAPES[options.shape]["vocab_size"]
    found = examples(options.records, tokenizer, row_length=options.length, vocabulary=vocabulary)
    rows = [{"input_ids": e.ids.tolist(), "completion_mask": e.counted.astype(int).tolist()} for e in found]
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # it wants one, though all are ids already
    wait_for_turn()
    device = torch.device(options.device)
    lm = build(options.shape, device)
    lm.set_attn_implementation(options.attention)
    times = StepTimes()
    arguments = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        max_steps=options.steps,
        per_device_train_batch_size=options.rows,
        learning_rate=1e-4,
        bf16=device.type == "cuda",
        use_cpu=device.type == "cpu",
        use_liger_kernel=options.liger,
        packing=options.packing != "none",
        packing_strategy=options.packing if options.packing != "none" else "bfd",
        padding_free=options.packing == "bfd",
        max_length=options.length,
        gradient_checkpointing=options.checkpointing,
        completion_only_loss=True,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=lm,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[times],
    )
    tokens = _count_tokens(trainer)
    trainer.train()
    warm = len(times.ends) // 2
    seconds = times.ends[-1] - times.ends[warm - 1]
    return {
        "tokens_per_second": sum(tokens[warm : len(times.ends)]) / seconds,
        "steps": len(times.ends),
        "memory_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        "settings": {
            name: getattr(options, name)
            for name in ("rows", "length", "liger", "packing", "attention", "checkpointing")
        },
    }


def _count_tokens(trainer: Any) -> list[int]:
    """Fills up with the real tokens of each batch, as the collator hands them out."""
    counts: list[int] = []
    collate = trainer.data_collator

    def counting(rows: list[dict[str, Any]]) -> Any:
        counts.append(sum(len(row["input_ids"]) for row in rows))
        return collate(rows)

    trainer.data_collator = counting
    return counts


if __name__ == "__main__":
    main()
