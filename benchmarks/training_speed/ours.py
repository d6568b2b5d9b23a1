"""Our side, in a process of its own: the trainer that `train/align.py` runs, on a model with random weights.

python benchmarks/training_speed/ours.py --shape 135m --records FILE.jsonl --tokenizer FOLDER --out FILE.json <<< go
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from accelerate import PartialState
from training_speed.corpus import examples, wait_for_turn
from training_speed.shapes import SHAPES, build

from terselm.train.hardware import apply_engine
from terselm.train.model import add_adapter
from terselm.train.packing import pack_examples
from terselm.train.run_folder import RunFolder
from terselm.train.settings import AlignSettings, DataSettings, EngineSettings, LoraSettings, OptimisationSettings
from terselm.train.surprisals import give_surprisals
from terselm.train.trainer import AlignmentTrainer, schedule_rows, training_arguments

SETTINGS = ("rows", "length", "compile", "recompute")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=8, help="packed rows at once, and in a step")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--recompute", action="store_true")
    options = parser.parse_args()
    result = run(options)
    options.out.write_text(json.dumps(result), encoding="utf-8")
    print(json.dumps({name: value for name, value in result.items() if name != "history"}), flush=True)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Real tokens per second after the first steps, which compile and warm up."""
    from transformers import AutoTokenizer

    found = examples(
        options.records,
        AutoTokenizer.from_pretrained(options.tokenizer),
        row_length=options.length,
        vocabulary=SHAPES[options.shape]["vocab_size"],
    )
    rows = pack_examples(found, options.length)
    wait_for_turn()
    device = PartialState().device
    lm = build(options.shape, device)
    config = AlignSettings(
        data=DataSettings(max_length=options.length),
        lora=LoraSettings(rank=16, alpha=32),
        optimisation=OptimisationSettings(
            epochs=options.steps * options.rows / len(rows),
            rows_per_step=options.rows,
            rows_per_pass=options.rows,
            learning_rate=1e-4,
        ),
        engine=EngineSettings(compile=options.compile, recompute=options.recompute),
        log_every=5,
        save_every=10**9,
    )
    give_surprisals(lm, autocast=torch.bfloat16 if device.type == "cuda" else None)
    model = add_adapter(lm, config.lora)
    apply_engine(lm, config.engine)
    folder = RunFolder(Path(tempfile.mkdtemp()), "speed")
    schedule = schedule_rows(rows, config)
    trainer = AlignmentTrainer(
        model, training_arguments(config, folder, rows=len(schedule), processes=1), schedule, folder, config
    )
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    first, last = history[len(history) // 2 - 1], history[-1]
    rate = (last["tokens"] - first["tokens"]) / (last["seconds"] - first["seconds"])
    real = sum(map(len, found)) / (len(rows) * options.length)
    return {
        "tokens_per_second": rate,
        "mfu": rate * trainer._flops_per_token / trainer._peak_flops if trainer._peak_flops else None,
        "flops_per_token": trainer._flops_per_token,
        "real_token_share": real,
        "steps": trainer.state.global_step,
        "memory_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        "settings": {name: getattr(options, name) for name in SETTINGS},
        "history": history,
    }


if __name__ == "__main__":
    main()
