"""Conversations in the small LM's own chat template, against what transformers renders prefix by prefix."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_training import TINY_RUN, Script, make_model, make_tokenizer

from terselm.data.records import Generation, Message, Record, Role, Usage
from terselm.errors import ConfigError, ModelError
from terselm.models import CausalLM, load_causal_lm
from terselm.train.examples import Encoding, Example, encode_records
from terselm.train.guidance import TargetOpinions
from terselm.train.publish import publish
from terselm.train.settings import AlignSettings, DataSettings, EvaluationSettings, LossOn, Overlong, Template
from terselm.train.texts import prepare_texts

CHATML = (  # SmolLM2's: a system turn of its own where there is none
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (  # SmolLM3's way: the template says what the assistant says
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (  # Llama 3's: a start token, and contents that are trimmed
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
ALTERNATING = (  # Mistral's: no opening of the assistant's turn, and roles that must alternate
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST]' + message['content'] + '[/INST]' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
THINKING = (  # Qwen3's: an empty thought before the last answer, and none before the others
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "marked": MARKED, "llama": LLAMA, "alternating": ALTERNATING}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]"]
ENDS = {"chatml": "<|im_end|>", "marked": "<|im_end|>", "llama": "<|eot_id|>", "alternating": "</s>"}

CONTENT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(
    lambda text: bool(text.strip()) and "<" not in text and "[" not in text
)


def tokenizer_with(template: str | None) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = template
    return tokenizer


def encoding(template: str, **changes: Any) -> Encoding:
    plain = Encoding(
        tokenizer=tokenizer_with(template),
        start_id=0,
        end_id=1,
        template=Template.CHAT,
        loss_on=LossOn.RESPONSE,
        max_length=10_000,
        overlong=Overlong.SPLIT,
    )
    return replace(plain, **changes)


ENCODINGS = {name: encoding(template) for name, template in TEMPLATES.items()}


def talk(*turns: tuple[str, str], finish_reason: str | None = None, name: str = "talk") -> Record:
    """The last turn is the response."""
    generation = None
    if finish_reason is not None:
        usage = Usage(prompt_tokens=1, completion_tokens=1)
        generation = Generation(
            model="target", parameters={}, created="2026-01-01", finish_reason=finish_reason, usage=usage
        )
    messages = tuple(Message(role=Role(role), content=content) for role, content in turns[:-1])
    return Record(id=name, messages=messages, response=turns[-1][1], generation=generation)


def turns_of(record: Record) -> list[dict[str, str]]:
    said = [{"role": turn.role.value, "content": turn.content} for turn in record.messages]
    return [*said, {"role": "assistant", "content": record.response}]


def decoded(tokenizer: Any, ids: Any) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def by_prefixes(tokenizer: Any, record: Record) -> tuple[str, str]:
    """What the assistant says, and all up to its last word, from what transformers renders of each prefix."""

    def rendered(turns: Sequence[dict[str, str]], *, opened: bool) -> str:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=opened))

    turns, said, whole = turns_of(record), "", ""
    for index, turn in enumerate(turns):
        if turn["role"] == "assistant":
            before = rendered(turns[:index], opened=True)
            whole = rendered(turns[: index + 1], opened=False)
            assert whole.startswith(before)
            whole = whole.removesuffix("\n") if whole.endswith(">\n") else whole
            said += whole[len(before) :]
    return said, whole


@st.composite
def conversations(draw: st.DrawFn) -> Record:
    rounds = draw(st.integers(1, 3))
    turns = [(role, draw(CONTENT)) for _ in range(rounds) for role in ("user", "assistant")]
    return talk(*turns)


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=40, deadline=None)
@given(record=conversations())
def test_the_mask_covers_what_the_assistant_says(name: str, record: Record) -> None:
    encoding = ENCODINGS[name]
    said, whole = by_prefixes(encoding.tokenizer, record)
    (example,) = encode_records([record], encoding).examples
    assert decoded(encoding.tokenizer, example.ids) == whole
    assert decoded(encoding.tokenizer, example.ids[example.counted]) == said
    assert said.count(ENDS[name]) == len([turn for turn in turns_of(record) if turn["role"] == "assistant"])
    assert (example.ids == 0).sum() == (name in ("llama", "alternating"))  # the start token, once
    # What is held out is the response alone, whose bytes are counted.
    (scored,) = encode_records([record], replace(encoding, end_id=None, every_turn=False)).examples
    response = record.response.strip() if name == "llama" else record.response
    assert decoded(encoding.tokenizer, scored.ids[scored.counted]) == response
    assert scored.ids.tolist() == example.ids.tolist()[: len(scored)]


@settings(max_examples=40, deadline=None)
@given(record=conversations())
def test_a_template_that_marks_is_read_as_transformers_reads_it(record: Record) -> None:
    encoding = ENCODINGS["marked"]
    (example,) = encode_records([record], encoding).examples
    theirs = encoding.tokenizer.apply_chat_template(
        turns_of(record), return_dict=True, return_assistant_tokens_mask=True
    )
    own = np.array(theirs["assistant_masks"], dtype=bool)
    said = decoded(encoding.tokenizer, np.array(theirs["input_ids"])[own])
    assert decoded(encoding.tokenizer, example.ids[example.counted]) == said


def test_system_and_tool_turns_are_read_and_not_learnt() -> None:
    record = talk(
        ("system", "Be short."),
        ("user", "count the list"),
        ("assistant", "one"),
        ("tool", '{"sum": 3}'),
        ("assistant", "three"),
    )
    for name in ("chatml", "marked", "llama"):
        tokenizer = ENCODINGS[name].tokenizer
        (example,) = encode_records([record], ENCODINGS[name]).examples
        said, whole = by_prefixes(tokenizer, record)
        assert decoded(tokenizer, example.ids) == whole
        assert "Be short." in whole
        assert '{"sum": 3}' in whole
        assert decoded(tokenizer, example.ids[example.counted]) == said == f"one{ENDS[name]}three{ENDS[name]}"


def test_loss_on_all_counts_everything_but_the_start() -> None:
    (example,) = encode_records(
        [talk(("user", "one"), ("assistant", "two"))], encoding(CHATML, loss_on=LossOn.ALL)
    ).examples
    assert example.counted.tolist() == [False] + [True] * (len(example) - 1)


@pytest.mark.parametrize(("reason", "end"), [("stop", "<|im_end|>"), ("length", ""), ("loop", "")])
def test_an_answer_that_was_cut_short_has_no_end(reason: str, end: str) -> None:
    record = talk(
        ("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "list of"), finish_reason=reason
    )
    encoded = ENCODINGS["chatml"]
    (example,) = encode_records([record], encoded).examples
    assert decoded(encoded.tokenizer, example.ids[example.counted]) == f"two<|im_end|>list of{end}"
    assert example.counted[-1]


@pytest.mark.parametrize("response", ["end", "im_end", "<think>", "two\n", "a"])
def test_a_response_that_looks_like_what_is_around_it(response: str) -> None:
    held_out = encoding(THINKING, every_turn=False, end_id=None)
    (example,) = encode_records([talk(("user", "one"), ("assistant", response))], held_out).examples
    assert decoded(held_out.tokenizer, example.ids[example.counted]) == response
    (learnt,) = encode_records([talk(("user", "one"), ("assistant", response))], encoding(THINKING)).examples
    assert decoded(held_out.tokenizer, learnt.ids[learnt.counted]) == f"<think>\n\n</think>\n\n{response}<|im_end|>"


@pytest.mark.parametrize(
    ("template", "turns", "message"),
    [
        (
            ALTERNATING,
            ["user", "user", "assistant"],
            r"record 'talk': the chat template refuses these 3 messages .*alternate",
        ),
        (THINKING, ["user", "assistant"] * 2, r"record 'talk': the chat template renders turn 2 of 4 in another way"),
        ("{% for m in messages %}{{ m.role }}\n{% endfor %}", ["user", "assistant"], r"template rewrites the response"),
    ],
)
def test_records_that_a_template_does_not_take(template: str, turns: list[str], message: str) -> None:
    record = talk(*((role, f"count {index}") for index, role in enumerate(turns)))
    with pytest.raises(ModelError, match=message) as caught:
        encode_records([record], encoding(template))
    assert "\n" not in str(caught.value)


def test_overlong_conversations_are_split_or_dropped_as_other_text() -> None:
    record = talk(("user", "one " * 20), ("assistant", "two " * 20), ("user", "three"), ("assistant", "red " * 30))
    (whole,) = encode_records([record], ENCODINGS["chatml"]).examples
    encoded = encode_records([record], replace(ENCODINGS["chatml"], max_length=24))
    assert encoded.split == 1
    assert all(len(piece) <= 24 and not piece.counted[0] and piece.counted.any() for piece in encoded.examples)
    assert {int(piece.ids[0]) for piece in encoded.examples} <= {0, int(whole.ids[0])}
    counted = [token for piece in encoded.examples for token in piece.ids[piece.counted].tolist()]
    assert counted == whole.ids[whole.counted].tolist()
    dropped = encode_records([record], replace(ENCODINGS["chatml"], max_length=24, overlong=Overlong.DROP))
    assert (dropped.dropped, len(dropped.examples)) == (1, 0)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "chat"
    tokenizer = tokenizer_with(CHATML)
    make_model(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def nats_after(lm: CausalLM, ids: list[int], first: int) -> float:
    """Of the tokens from ``first`` on, all together."""
    with torch.inference_mode():
        log_p = lm.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return -sum(log_p[place - 1, ids[place]].item() for place in range(first, len(ids)))


@pytest.mark.parametrize("has_template", [True, False])
def test_the_target_reads_the_prompt_in_its_own_way(chat_model: Path, has_template: bool) -> None:
    target = load_causal_lm(chat_model, device="cpu", dtype="float32")
    target.tokenizer.chat_template = LLAMA if has_template else None
    small = tokenizer_with(CHATML)
    record = talk(("system", "count"), ("user", "count the red list"), ("assistant", "one two three"))
    guided = encoding(CHATML, tokenizer=small, guidance=TargetOpinions(target, 3, small), top_k=3)
    (example,) = encode_records([record], guided).examples
    if has_template:
        prompt = target.tokenizer.apply_chat_template(turns_of(record)[:-1], add_generation_prompt=True)["input_ids"]
    else:
        text = "count\n\ncount the red list\n\n"
        prompt = [target.start_id, *target.tokenizer(text, add_special_tokens=False).input_ids]
    response = target.tokenizer("one two three", add_special_tokens=False).input_ids
    assert example.guide is not None
    assert example.guide.nats.sum() == pytest.approx(nats_after(target, prompt + response, len(prompt)), abs=1e-3)
    assert len(example.guide.nats) == 3
    guided_text = decoded(small, example.ids[example.guide.words >= 0])
    assert guided_text == "one two three"
    assert example.guide.top_ids is not None
    known = (example.guide.top_ids >= 0).all(axis=1)
    assert decoded(small, example.ids[known]) == "one two three"


def config(records: Path, template: Template) -> AlignSettings:
    data = DataSettings(records=str(records), max_length=64)
    return AlignSettings(data=data, evaluation=EvaluationSettings(held_out=0.2), template=template)


def first_text(lm: CausalLM, records: Path, template: Template = Template.CHAT) -> str:
    example: Example = prepare_texts(config(records, template), lm).training.examples[0]
    return decoded(lm.tokenizer, example.ids)


def test_the_text_cache_knows_the_template(
    chat_model: Path, records_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERSELM_CACHE", str(tmp_path))
    lm = load_causal_lm(chat_model, device="cpu")
    assert first_text(lm, records_file).startswith("<|im_start|>system\nYou are helpful.")
    lm.tokenizer.chat_template = CHATML.replace("helpful", "brief")
    assert first_text(lm, records_file).startswith("<|im_start|>system\nYou are brief.")
    kept = len([path for path in (tmp_path / "texts").iterdir() if path.is_dir()])
    first_text(lm, records_file, Template.RAW)
    lm.tokenizer.chat_template = None
    first_text(lm, records_file, Template.RAW)  # which the template does not touch
    assert len([path for path in (tmp_path / "texts").iterdir() if path.is_dir()]) == kept + 1


def test_held_out_text_is_scored_on_the_response(chat_model: Path, records_file: Path) -> None:
    lm = load_causal_lm(chat_model, device="cpu")
    held_out = prepare_texts(config(records_file, Template.CHAT), lm).held_out
    plain = prepare_texts(config(records_file, Template.RAW), lm).held_out
    assert held_out.text_bytes.tolist() == plain.text_bytes.tolist()
    assert held_out.tokens.tolist() == plain.tokens.tolist()
    assert held_out.raw == plain.raw


def test_a_small_lm_without_a_template_takes_one_sentence(tiny_model: Path, records_file: Path) -> None:
    lm = load_causal_lm(tiny_model, device="cpu")
    with pytest.raises(ConfigError, match=r"template is 'chat', but the tokenizer of .* has no chat template; choose"):
        prepare_texts(config(records_file, Template.CHAT), lm)


def test_a_run_without_a_template_is_refused(finished: Script, tmp_path: Path) -> None:
    done = finished("template=chat", f"run_dir={tmp_path / 'run'}")
    assert done.returncode == 2
    assert "has no chat template; choose template=raw or alpaca" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def chat_run(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Script:
    """A finished run on conversations of one to three rounds."""
    folder = tmp_path_factory.mktemp("chat-run")
    rows = folder / "records.jsonl"
    with rows.open("w", encoding="utf-8") as file:
        for index in range(40):
            rounds = [
                turn
                for number in range(1 + index % 3)
                for turn in (
                    {"role": "user", "content": f"count {index} {number}"},
                    {"role": "assistant", "content": "one two three"[: 3 + 4 * number]},
                )
            ]
            file.write(json.dumps({"messages": rounds}) + "\n")
    text = TINY_RUN.format(records=rows, model=chat_model, run=folder / "run").replace(
        "max_length: 64", "max_length: 96"
    )
    (folder / "align.yaml").write_text(f"{text}\ntemplate: chat\n", encoding="utf-8")
    script = Script(folder / "align.yaml", folder / "run")
    done = script()
    assert done.returncode == 0, done.stderr
    return script


def test_a_run_on_conversations_learns_and_is_published(chat_run: Script, tmp_path: Path) -> None:
    held_out = chat_run.metrics()["held_out"]
    assert held_out["difference"]["bits_per_byte"] < -0.2
    published = publish(chat_run.run, tmp_path / "out").path
    assert "template: chat" in (published / "config.yaml").read_text(encoding="utf-8")
    assert load_causal_lm(published, device="cpu").tokenizer.chat_template == CHATML
