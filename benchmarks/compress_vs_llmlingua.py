"""TerseLM and llmlingua 0.2.2, side by side: the same weights, prompts and machine, in turns.

    python benchmarks/compress_vs_llmlingua.py --gsm8k train.jsonl --out FILE.json

Each side runs in a process of its own: llmlingua in a virtual environment that is made at the first run, with the last
transformers that it works with. Without --gsm8k the prompts are made of the bundled one. Measured, after a warm-up:

- cold: one prompt at a time, every text of it new;
- warm: the demonstrations of the prompt before, a new question;
- batch: many new prompts at once, as prompt tokens a second (llmlingua has no batches and takes them one by one);
- share of the ceiling: that rate over the rate of plain batched scoring of the same prompts with the same model;
- forward passes and the tokens in them (padding included), and the peak of memory above the weights.

On a machine without network, carry the wheels of the peer there (those which the running interpreter's packages lack),
and a model folder, which with --shape needs no weights:

    python benchmarks/compress_vs_llmlingua.py --peer-wheels wheels --peer-env peer --model folder --shape llama-7b
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import frame
from against_llmlingua import environment
from against_llmlingua.comparison import Comparison, Plan
from against_llmlingua.process import SideProcess
from against_llmlingua.prompts import PromptMaker, bundled, gsm8k
from against_llmlingua.report import ratios, table
from against_llmlingua.weights import SHAPES, random_model

from terselm.errors import ConfigError
from terselm.evaluate.peer import translate_model
from terselm.models import load_tokenizer
from terselm.models.load import pick_device, resolve

_PROMPT_TOKENS = 2465


def main() -> None:
    options = parse()
    result = measure(options)
    print(table(result))
    frame.write_result(options.out, result)


def parse() -> argparse.Namespace:
    parser = frame.parser(__doc__)
    parser.add_argument("--model", default="smollm2-135m", help="alias or model folder")
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape, with the tokenizer of --model")
    parser.add_argument("--gsm8k", type=Path, metavar="FILE", help="GSM8K's train.jsonl, to make the prompts of")
    parser.add_argument("--budget", type=int, default=200, help="tokens; default 200")
    parser.add_argument("--repeats", type=int, help="prompts timed one at a time; default 20, on the CPU 5")
    parser.add_argument("--batch", type=int, help="prompts in a batch; default 64, on the CPU 4")
    parser.add_argument("--batch-repeats", type=int, default=3, help="batches timed; default 3")
    parser.add_argument("--device", default="auto", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on the CPU, else bfloat16")
    parser.add_argument("--own-dtype", choices=("bfloat16", "float16", "int8"), help="TerseLM's, if it is another")
    parser.add_argument("--peer-env", type=Path, default=environment.default_folder(), metavar="DIR")
    parser.add_argument("--peer-wheels", type=Path, metavar="DIR", help="install the peer from these, with no index")
    return parser.parse_args()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    about = frame.circumstances()
    load_before = os.getloadavg()
    device = pick_device(options.device).type
    dtype = options.dtype or ("float32" if device == "cpu" else "bfloat16")
    on_cpu = device == "cpu"
    plan = Plan(
        budget=options.budget,
        warm_ups=2 if on_cpu else 20,
        repeats=options.repeats if options.repeats is not None else (5 if on_cpu else 20),
        batch=options.batch if options.batch is not None else (4 if on_cpu else 64),
        batch_repeats=options.batch_repeats,
    )
    material = gsm8k(options.gsm8k) if options.gsm8k else bundled()
    python = environment.peer_python(options.peer_env, options.peer_wheels)
    with tempfile.TemporaryDirectory() as scratch:
        folder = model_folder(options.model)
        if options.shape:
            folder = random_model(options.shape, folder, Path(scratch) / "own", device, dtype)
        translated = translate_model(folder, Path(scratch) / "peer", dtype)
        tokenizer = load_tokenizer(folder)

        def encode(text: str) -> list[int]:
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])

        maker = PromptMaker(material, _PROMPT_TOKENS, lambda text: len(encode(text)))
        with (
            SideProcess("own", Path(sys.executable), folder, device, options.own_dtype or dtype) as own,
            SideProcess("peer", python, translated, device, dtype) as peer,
        ):
            measured = Comparison({"terselm": own, "llmlingua": peer}, maker, encode, plan).run()
    name = f"random weights, shape of {options.shape}" if options.shape else Path(options.model).name
    return {
        "command": command(options),
        **about,
        "terselm": version("terselm"),
        "order": "the sides take turns on every prompt and batch",
        "load_average": {"before": load_before, "after": os.getloadavg()},
        "model": {"name": name, "device": device, "dtype": dtype, "own_dtype": options.own_dtype or dtype},
        "source": material.source,
        **measured,
        "ratios": ratios(measured["sides"]),
    }


def model_folder(name: str) -> Path:
    """The folder of an alias, or the folder itself.

    Raises:
        ConfigError: neither; both sides must read the same files.
    """
    folder = resolve(name)
    if not isinstance(folder, Path) or not (folder / "config.json").is_file():
        raise ConfigError(f"--model is {name!r}; expected an alias or a folder with config.json and a tokenizer")
    return folder


def command(options: argparse.Namespace) -> str:
    """The command line, with the names of files in place of their paths."""
    words = ["python benchmarks/compress_vs_llmlingua.py"]
    for name, value in vars(options).items():
        if value is not None and name not in ("peer_env", "peer_wheels", "out"):
            words.append(f"--{name.replace('_', '-')} {Path(value).name if name in ('model', 'gsm8k') else value}")
    return " ".join(words)


if __name__ == "__main__":
    frame.run(main)
