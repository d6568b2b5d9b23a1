"""The command line: results on standard output, one sentence and status 2 for a mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fakes import bytes_tokenizer
from tiny_gguf import write_gguf
from transformers import LlamaConfig, LlamaForCausalLM

TEXT = "Sam had 12 apples and gave 5 of them away. How many apples does he have left now? 🍎 十二\r\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = bytes_tokenizer(bos=True, trim=False)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
        initializer_range=0.4,
    )
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def terselm(*arguments: object, stdin: str = "") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-c", "from terselm.cli import main; main()", *map(str, arguments)]
    return subprocess.run(
        command, input=stdin.encode(), capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, timeout=120
    )


def compress(model: Path, *arguments: object, stdin: str = TEXT) -> str:
    done = terselm("compress", "--model", model, "--device", "cpu", *arguments, stdin=stdin)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def mistake(*arguments: object, stdin: str = TEXT) -> str:
    """The one sentence on standard error."""
    done = terselm(*arguments, stdin=stdin)
    message = done.stderr.decode()
    assert (done.returncode, done.stdout) == (2, b""), message
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    return message


def test_text_from_standard_input(model: Path) -> None:
    assert compress(model, "--rate", 1.0) == TEXT + "\n"
    result = json.loads(compress(model, "--rate", 0.5, "--json", "--tokens"))
    assert result["compressed_tokens"] <= result["budget"] < result["original_tokens"]
    assert "".join(token["text"] for token in result["tokens"] if token["kept"]) == result["text"]
    assert "".join(token["text"] for token in result["tokens"]) == TEXT


def test_parts_from_files(model: Path, tmp_path: Path) -> None:
    parts = {"instruction": "Answer briefly.", "demonstrations": [TEXT, "A second one."], "question": "How many?"}
    for name in ("instruction", "question"):
        (tmp_path / name).write_text(str(parts[name]))
    files = [tmp_path / "first", tmp_path / "second"]
    for file, text in zip(files, parts["demonstrations"], strict=True):
        file.write_bytes(text.encode())
    (tmp_path / "prompt.json").write_text(json.dumps(parts))
    by_file = compress(
        model,
        *("--instruction", tmp_path / "instruction", "--question", tmp_path / "question", "--budget", 30),
        *(part for file in files for part in ("--demonstration", file)),
    )
    assert by_file == compress(model, "--prompt", tmp_path / "prompt.json", "--budget", 30)


def test_protected_text_and_settings(model: Path, tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("segment_size: 10\nunit: word\n")
    text = compress(
        model, "--budget", 12, "--keep", "apples", "--keep-preset", "numbers", "--config", tmp_path / "settings.yaml"
    )
    assert text.count("apples") == 2
    assert "12" in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--budget", "0"], "the budget is 0"),
        (["--budget", "-3"], "the budget is -3"),
        (["--rate", "1.5"], "the rate is 1.5"),
        (["--budget", "9", "--rate", "0.5"], "both a budget and a rate"),
        ([], "neither a budget nor a rate"),
        (["--budget", "9", "--model", "no-such-model"], "no model 'no-such-model'"),
        (["--budget", "9", "--keep-regex", "("], "not a regular expression"),
        (["--budget", "9", "--keep-preset", "names"], "unknown preset 'names'"),
        (["--budget", "9", "--config", "no.yaml"], "no.yaml"),
        (["--budget", "9", "no-such-file.txt"], "cannot read no-such-file.txt"),
        (["--budget", "9", "--prompt", "p.json", "text.txt"], "not several of these"),
    ],
)
def test_mistakes(arguments: list[str], expected: str) -> None:
    assert expected in mistake("compress", *arguments)


def test_an_empty_prompt() -> None:
    assert "the prompt is empty" in mistake("compress", "--budget", 9, stdin="")


def test_a_budget_below_what_is_protected(model: Path) -> None:
    message = mistake("compress", "--model", model, "--device", "cpu", "--budget", 1, "--keep-preset", "numbers")
    smallest = int(message.split("raise the budget to ")[1].split()[0])
    assert compress(model, "--budget", smallest, "--keep-preset", "numbers")


def test_a_text_is_ranked_for_what_will_be_asked(model: Path) -> None:
    text = "The shop opens at nine. Sam had 12 apples and gave 5 of them away. It rained all day and nobody came by."
    ask = ("--ask", "How many apples did Sam give away?")
    assert compress(model, "--rate", 0.6, *ask, stdin=text) != compress(model, "--rate", 0.6, stdin=text)
    kept = compress(model, "--rate", 0.6, *ask, "--set", "rank_by=question", "--set", "unit=sentence", stdin=text)
    assert kept.strip()
    assert all(sentence.strip(". \n") in text for sentence in kept.split(". "))
    assert "How many" not in kept


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--set", "rank_by=luck"], "rank_by"),
        (["--set", "rank_by"], "override 'rank_by' is not of the form key=value"),
        (["--set", "rankby=bm25"], "did you mean rank_by"),
        (["--set", "rank_by=question"], "the prompt has no question"),
        (
            ["--set", "rank_by=embedding", "--set", "ranker=/no/such/ranker", "--ask", "How many?"],
            "no encoder at /no/such/ranker",
        ),
        (["--set", "rank_by=question", "--ask", "How many apples? " * 2000], "leaves no room for text"),
    ],
)
def test_what_cannot_be_ranked(model: Path, arguments: list[str], expected: str) -> None:
    assert expected in mistake("compress", "--model", model, "--device", "cpu", "--budget", 5, *arguments)


def test_broken_files(tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.json"
    prompt.write_text('{"question": "a",\n "instruction" }')
    assert f"{prompt}:2: broken JSON" in mistake("compress", "--budget", 9, "--prompt", prompt)
    prompt.write_text('{"context": "a"}')
    assert "instruction, demonstrations, question" in mistake("compress", "--budget", 9, "--prompt", prompt)
    prompt.write_bytes(b"\xff\xfe")
    assert "not UTF-8" in mistake("compress", "--budget", 9, "--prompt", prompt)
    (tmp_path / "settings.yaml").write_text("segmentsize: 10\n")
    assert "did you mean segment_size" in mistake("compress", "--budget", 9, "--config", tmp_path / "settings.yaml")


def test_publishing_what_is_not_there(tmp_path: Path, model: Path) -> None:
    assert "not-there" in mistake("publish", tmp_path / "not-there", "--to", tmp_path / "out")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    assert "no adapter" in mistake("publish", tmp_path / "run", "--to", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_alias() -> None:
    assert "known: smollm2-135m, gemma3-270m" in mistake("convert", "smollm3")


def test_no_warning_of_a_dependency_reaches_the_terminal(model: Path) -> None:
    done = terselm("compress", "--model", model, "--device", "cpu", "--budget", 12, stdin=TEXT * 40)
    assert done.returncode == 0
    assert "warn" not in done.stderr.decode().lower()
    assert "deprecat" not in done.stderr.decode().lower()


def test_no_bar_without_a_terminal(tmp_path: Path) -> None:
    """Not even of what transformers does with a GGUF file; an alias's packages hold one."""
    arguments = ["compress", "--model", write_gguf(tmp_path / "m.gguf"), "--device", "cpu", "--budget", 12]
    done = terselm(*arguments, stdin=TEXT)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout
    assert done.stderr == b""


READ = """
import sys
from terselm.compress.compressor import PromptCompressor
from terselm.data.generate import Limits, Query, generate
from terselm.models import load_causal_lm
compressor = PromptCompressor.from_pretrained(sys.argv[1], device="cpu")
compressor.compress_text(sys.argv[2] * 20, budget=12)
lm = load_causal_lm(sys.argv[1], device="cpu")
generate(lm, [Query(prompt="Sam", temperature=0.0, seed=0)], Limits(max_new_tokens=4))
"""


def test_no_call_of_ours_is_deprecated(model: Path) -> None:
    """Also not where a dependency only logs it."""
    done = subprocess.run(
        [sys.executable, "-W", "error::FutureWarning", "-c", READ, model, TEXT],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "warning"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "deprecat" not in done.stderr.lower()
