"""Batched decoding against transformers' own, and against probabilities computed by hand."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from fakes import bigram_lm, random_lm

from terselm.data.generate import Answer, Limits, Query, encode, generate
from terselm.errors import ContextLengthError
from terselm.models import CausalLM

PROMPTS = [
    "The cat",
    "def add(a, b):\n",
    "Question: Sam had 12 apples and gave 5 of them away. How many?",
    "我们今天",
    "",
]
TABLE = {"<s>": {"a": 0.5, "b": 0.3, "c": 0.19}, "a": {"b": 0.9}, "b": {"c": 0.9}, "c": {"</s>": 0.9}}


def query(prompt: str, *, temperature: float = 0.0, seed: int = 0, stop: tuple[str, ...] = ()) -> Query:
    return Query(prompt=prompt, temperature=temperature, seed=seed, stop=stop)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma"])
def test_greedy_is_what_transformers_generates(kind: str) -> None:
    lm = random_lm(kind)
    ends = [lm.tokenizer.eos_token_id, lm.model.generation_config.eos_token_id]
    answers = generate(lm, [query(prompt) for prompt in PROMPTS], Limits(max_new_tokens=24))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = torch.tensor([encode(lm, prompt, 24)])
        out = lm.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=lm.tokenizer.eos_token_id,
        )[0, ids.shape[1] :]
        text = lm.tokenizer.decode(out, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert answer.text == text.strip().rstrip("\ufffd")
        assert answer.prompt_tokens == ids.shape[1]
        assert answer.completion_tokens == len(out)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma"])
def test_an_answer_does_not_depend_on_the_rows_beside_it(kind: str) -> None:
    lm = random_lm(kind)
    limits = Limits(max_new_tokens=20, top_p=0.9, top_k=50)
    # Stop strings end the rows at different steps, so that the batch shrinks on the way.
    queries = [
        query(prompt, temperature=temperature, seed=seed, stop=("e", "\n"))
        for seed, prompt in enumerate(PROMPTS)
        for temperature in (0.0, 0.7, 1.3)
    ]
    together = generate(lm, queries, limits)
    assert together == [generate(lm, [one], limits)[0] for one in queries]
    assert len({answer.completion_tokens for answer in together}) > 2
    assert together == generate(lm, queries, limits)


def draw(lm: CausalLM, count: int, temperature: float, limits: Limits) -> Counter[str]:
    queries = [query("", temperature=temperature, seed=seed) for seed in range(count)]
    return Counter(answer.text for answer in generate(lm, queries, limits))


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k", "expected"),
    [
        (1.0, 1.0, 0, {"a": 0.5, "b": 0.3, "c": 0.19}),
        (0.5, 1.0, 0, {"a": 0.25 / 0.3761, "b": 0.09 / 0.3761, "c": 0.0361 / 0.3761}),
        (1.0, 1.0, 2, {"a": 0.625, "b": 0.375}),
        (1.0, 0.6, 0, {"a": 0.625, "b": 0.375}),  # b crosses 0.6 and stays
        (1.0, 0.4, 0, {"a": 1.0}),
        (1.0, 0.6, 3, {"a": 0.625, "b": 0.375}),  # after top-k, a has 0.505 of what is left
        (1.0, 1.0, 1, {"a": 1.0}),
    ],
)
def test_draws_follow_the_probabilities(
    temperature: float, top_p: float, top_k: int, expected: dict[str, float]
) -> None:
    count = 3000
    seen = draw(bigram_lm("abc", TABLE), count, temperature, Limits(max_new_tokens=1, top_p=top_p, top_k=top_k))
    for word, probability in expected.items():
        deviation = (probability * (1 - probability) / count) ** 0.5
        assert abs(seen[word] / count - probability) < 4 * deviation + 0.002, word
    if sum(expected.values()) == 1:
        assert seen.keys() == expected.keys()


def test_an_answer_ends_with_the_end_token() -> None:
    (answer,) = generate(bigram_lm("abc", TABLE), [query("")], Limits(max_new_tokens=9))
    assert answer == Answer(text="a b c", finish_reason="stop", prompt_tokens=1, completion_tokens=4)


def test_an_answer_ends_before_a_stop_string_and_at_the_limit() -> None:
    lm = bigram_lm("abc", TABLE)
    stopped, short = generate(lm, [query("", stop=("b c", "z")), query("")], Limits(max_new_tokens=3))
    assert stopped == Answer(text="a", finish_reason="stop", prompt_tokens=1, completion_tokens=3)
    assert short == Answer(text="a b c", finish_reason="length", prompt_tokens=1, completion_tokens=3)


def test_a_stop_string_may_span_many_tokens() -> None:
    lm = random_lm("llama")
    limits = Limits(max_new_tokens=30)
    (whole,) = generate(lm, [query("The cat")], limits)
    stop = whole.text[7:16]
    assert len(lm.tokenizer(stop).input_ids) > 3
    (cut,) = generate(lm, [query("The cat", stop=(stop,))], limits)
    assert cut.text == whole.text[: whole.text.index(stop)].strip()
    assert cut.finish_reason == "stop"
    assert cut.completion_tokens < whole.completion_tokens


def test_a_prompt_that_leaves_no_room() -> None:
    lm = bigram_lm("abc", TABLE, window=8)
    assert generate(lm, [query("a a a")], Limits(max_new_tokens=4))[0].text == "b c"
    with pytest.raises(ContextLengthError, match=r"a prompt of 5 tokens and an answer of up to 4 .* window of 8"):
        generate(lm, [query("a a a a")], Limits(max_new_tokens=4))
