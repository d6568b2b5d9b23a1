"""Batched decoding against transformers' own, and against probabilities computed by hand."""

from __future__ import annotations

import inspect
from collections import Counter
from typing import Any

import pytest
import torch
from fakes import bigram_lm, bytes_tokenizer, random_lm
from transformers import AutoConfig, AutoModelForCausalLM

from terselm.data.generate import Answer, Engine, Limits, Query, encode, generate
from terselm.data.slots import UnsuitableModelError, decode
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


@pytest.mark.parametrize("engine", [Engine.LOOP, Engine.SLOTS])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma"])
def test_greedy_is_what_transformers_generates(kind: str, engine: Engine) -> None:
    lm = random_lm(kind)
    ends = [lm.tokenizer.eos_token_id, lm.model.generation_config.eos_token_id]
    answers = generate(lm, [query(prompt) for prompt in PROMPTS], Limits(max_new_tokens=24), engine=engine)
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


def test_token_ids_are_read_as_they_are() -> None:
    lm = random_lm("llama")
    limits = Limits(max_new_tokens=9)
    text = "The cat"
    ids = tuple(lm.tokenizer(text, add_special_tokens=False).input_ids)
    after_start = generate(lm, [Query(prompt=(lm.start_id, *ids), temperature=0.0, seed=0)], limits)
    assert after_start == generate(lm, [query(text)], limits)
    (alone,) = generate(lm, [Query(prompt=ids, temperature=0.0, seed=0)], limits)
    assert alone.prompt_tokens == len(ids)


@pytest.mark.parametrize("seed", [-1, 0, 2**64, 2**70 + 3])
def test_any_whole_number_is_a_seed(seed: int) -> None:
    generate(random_lm("llama"), [query("The cat", temperature=1.0, seed=seed)], Limits(max_new_tokens=3))


def ragged_queries() -> list[Query]:
    """Prompts of 1 to 100 tokens, greedy and not, that end at different steps."""
    texts = [*PROMPTS, "Question: " + "the cat and the dog " * 6, "def add(a, b):\n    return a + b\n" * 3]
    return [
        query(text, temperature=temperature, seed=seed, stop=stop)
        for seed, text in enumerate(texts)
        for temperature, stop in ((0.0, ()), (0.0, ("e", "\n")), (0.7, ("e",)), (1.3, ()))
    ]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma"])
@pytest.mark.parametrize("limits", [Limits(max_new_tokens=21), Limits(max_new_tokens=21, top_p=0.9, top_k=50)])
@pytest.mark.parametrize("slots", [1, 3, 64])
def test_slots_answer_as_the_loop_does(kind: str, limits: Limits, slots: int) -> None:
    lm = random_lm(kind)
    attention = lm.model.config._attn_implementation
    queries = ragged_queries()
    answers = dict(decode(lm, queries, limits, slots=slots))
    assert [answers[index] for index in range(len(queries))] == generate(lm, queries, limits, engine="loop")
    assert lm.model.config._attn_implementation == attention


FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen2-window": {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    "qwen3": {},
    "mistral": {"sliding_window": 24},
    "gemma2": {"sliding_window": 24, "query_pre_attn_scalar": 8},
    "phi3": {"sliding_window": None},
    "gpt_neox": {},
    "olmo2": {},
    "granite": {"logits_scaling": 4.0, "attention_multiplier": 0.35},
    "cohere": {"logit_scale": 0.3},
}


def family_lm(name: str) -> CausalLM:
    tokenizer = bytes_tokenizer(bos=True, trim=False)
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.4,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    config = AutoConfig.for_model(name.split("-")[0], vocab_size=len(tokenizer), **{**sizes, **FAMILIES[name]})
    return CausalLM(model=AutoModelForCausalLM.from_config(config).float().eval(), tokenizer=tokenizer, name=name)


@pytest.mark.parametrize("name", FAMILIES)
def test_slots_suit_the_families_that_people_use(name: str) -> None:
    lm = family_lm(name)
    queries = ragged_queries()
    limits = Limits(max_new_tokens=12)
    answers = dict(decode(lm, queries, limits, slots=5))
    assert [answers[index] for index in range(len(queries))] == generate(lm, queries, limits, engine="loop")


def test_a_model_without_keys_of_every_token_goes_through_the_loop() -> None:
    tokenizer = bytes_tokenizer(bos=True, trim=False)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "lfm2",
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=1,
    )
    lm = CausalLM(model=AutoModelForCausalLM.from_config(config).float().eval(), tokenizer=tokenizer, name="mixed")
    limits = Limits(max_new_tokens=6)
    with pytest.raises(UnsuitableModelError, match="do not keep keys and values"):
        dict(decode(lm, [query("The cat")], limits))
    assert generate(lm, [query("The cat")], limits, engine="slots") == generate(lm, [query("The cat")], limits)


def test_answers_come_as_soon_as_they_are_known() -> None:
    lm = bigram_lm("abc", TABLE, window=512)
    queries = [query("a"), query("", stop=("b",)), *[query("a")] * 20]
    order = [index for index, _ in decode(lm, queries, Limits(max_new_tokens=5), slots=4)]
    assert sorted(order) == list(range(22))
    assert order.index(21) > order.index(0)
    assert list(decode(lm, [], Limits(max_new_tokens=5))) == []


def test_slots_go_on_with_fewer_where_the_memory_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = random_lm("llama")
    limits = Limits(max_new_tokens=21)
    queries = ragged_queries()
    expected = generate(lm, queries, limits, engine="loop")
    forward = type(lm.model).forward
    passes = 0

    def small(self: Any, *, input_ids: torch.Tensor, **options: Any) -> Any:
        nonlocal passes
        passes += 1
        if len(input_ids) > 2 and passes > 40:
            raise torch.OutOfMemoryError("too many rows")
        return forward(self, input_ids=input_ids, **options)

    small.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    monkeypatch.setattr(type(lm.model), "forward", small)
    answers = dict(decode(lm, queries, limits, slots=7))
    assert [answers[index] for index in range(len(queries))] == expected
