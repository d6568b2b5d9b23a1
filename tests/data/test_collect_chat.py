"""Collection from a local target through its chat template: what it reads, what is scored, and older collections."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import bytes_tokenizer, random_lm

from terselm.cli import main
from terselm.data.collection.collect import ask, collect, open_run, plan_collection
from terselm.data.collection.estimate import estimate
from terselm.data.collection.ledger import Ledger, ledger_of
from terselm.data.collection.local import answer_all
from terselm.data.collection.outcome import CollectionProgress
from terselm.data.collection.plan import Request, local_prompt, plan_requests
from terselm.data.collection.settings import CollectSettings, LogProbSettings, Options, PromptTemplate
from terselm.data.generate import Engine, Limits, Query, encode, generate
from terselm.data.instructions import Instruction
from terselm.data.logprobs import Given, LogProbFile
from terselm.data.records import Message, Record, Role, read_records
from terselm.errors import ConfigError, ModelError
from terselm.models import CausalLM

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_START = "{{ bos_token }}" + CHATML
ALTERNATES = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must "
    "alternate user/assistant') }}{% endif %}[{{ m.content }}]{% endfor %}"
)
PLAIN = {"default": PromptTemplate(text="Q: {prompt}\nA:")}


def chat_lm(template: str | None = CHATML) -> CausalLM:
    """In float64, so that no answer hangs on how sums are rounded; with two more special tokens."""
    lm = random_lm()
    tokenizer = bytes_tokenizer(bos=True, trim=False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    model = copy.deepcopy(lm.model)
    model.resize_token_embeddings(len(tokenizer))
    return CausalLM(model=model.double(), tokenizer=tokenizer, name="chat")


def talk(name: str, *turns: tuple[Role, str]) -> Instruction:
    messages = tuple(Message(role=role, content=content) for role, content in turns)
    return Instruction(id=name, category="test", messages=messages)


ASK = [
    talk("one", (Role.USER, "How many apples?")),
    talk("two", (Role.SYSTEM, "Be short."), (Role.USER, "And cats?")),
    talk("many", (Role.USER, "Hi."), (Role.ASSISTANT, "Hello."), (Role.USER, "Where is the dog that chased it?")),
]
SHORT = ASK[:2]  # what plain templates can hold


def settings(**changes: Any) -> CollectSettings:
    plain: dict[str, Any] = {"endpoint": "local:no/such/model", "max_new_tokens": 12, "templates": PLAIN}
    return CollectSettings(**plain | changes)


def records_of(path: Path) -> list[Record]:
    return list(read_records(path))


def turns(record: Record) -> list[dict[str, str]]:
    return [{"role": message.role.value, "content": message.content} for message in record.messages]


@pytest.mark.parametrize("template", [CHATML, WITH_START])
def test_a_chat_model_is_asked_through_its_template(template: str, tmp_path: Path) -> None:
    lm = chat_lm(template)
    collect(ASK, tmp_path / "r.jsonl", settings(temperatures=[0.0, 0.9]), lm=lm)
    records = records_of(tmp_path / "r.jsonl")
    assert {record.messages for record in records} == {ask.messages for ask in ASK}
    for record in records:
        made = record.generation
        assert made is not None
        assert (made.parameters["chat"], made.parameters["prompt_template"], made.parameters["stop"]) == (
            True,
            "chat",
            [],
        )
        ids = lm.tokenizer.apply_chat_template(turns(record), add_generation_prompt=True, return_dict=True)["input_ids"]
        assert ids.count(lm.tokenizer.bos_token_id) == (template == WITH_START)
        assert made.usage.prompt_tokens == len(ids)
        if made.finish_reason == "loop":
            continue
        seed = int(str(made.parameters["seed"])) + made.attempts - 1
        query = Query(prompt=tuple(ids), temperature=float(str(made.parameters["temperature"])), seed=seed)
        assert generate(lm, [query], Limits(max_new_tokens=12))[0].text == record.response


def test_a_model_without_a_template_or_told_so_reads_plain_text(tmp_path: Path) -> None:
    for name, lm, mode in (("none", chat_lm(None), "auto"), ("never", chat_lm(), "never")):
        collect(SHORT, tmp_path / f"{name}.jsonl", settings(chat=mode), lm=lm)
        for record in records_of(tmp_path / f"{name}.jsonl"):
            assert record.generation is not None
            assert record.generation.parameters["prompt_template"] == "Q: {prompt}\nA:"
            assert "chat" not in record.generation.parameters


def ids_of(requests: Sequence[Request]) -> list[str]:
    return [request.id for request in requests]


def test_the_form_is_part_of_what_names_a_request() -> None:
    plain, chat = (plan_requests(SHORT, settings(), chat=chat) for chat in (False, True))
    assert not set(ids_of(plain)) & set(ids_of(chat))
    # As collections were named before there was a choice.
    assert ids_of(plain)[0] == "a9fc05c44917afa93d93"
    (before,) = plan_requests(SHORT[:1], settings(templates={}))
    assert before.id == "abd68e1979df4498fa9c"


def begin(out: Path, requests: Sequence[Request], lm: CausalLM, count: int) -> None:
    """A collection that was killed after some answers."""
    with open_run(out, requests) as ledger:
        ask(ledger, requests[:count], settings(chat="never"), Options(), lm=lm)


def test_a_plain_collection_goes_on_as_it_began(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out, lm = tmp_path / "r.jsonl", chat_lm()
    begin(out, plan_requests(SHORT, settings()), lm, 1)
    with caplog.at_level("INFO"):
        summary = collect(SHORT, out, settings(), lm=lm)
    assert "this collection was begun without it and goes on so" in caplog.text
    assert (summary.records, summary.reused) == (2, 1)
    assert all("chat" not in record.generation.parameters for record in records_of(out) if record.generation)
    before = out.read_bytes()
    # From the ledger, or the records alone: no model is needed to know the form.
    assert collect(SHORT, out, settings()).reused == 2
    ledger_of(out).unlink()
    assert collect(SHORT, out, settings()).reused == 2
    assert out.read_bytes() == before


def test_a_chat_collection_goes_on_without_its_model(tmp_path: Path) -> None:
    out, lm = tmp_path / "r.jsonl", chat_lm()
    first = collect(ASK, out, settings(), lm=lm)
    assert first.records == 3
    for mode in ("auto", "always"):
        assert collect(ASK, out, settings(chat=mode)) == replace(first, reused=3)
    with pytest.raises(ModelError):  # other requests, of another form, which must be asked
        collect(SHORT, out, settings(chat="never"))


def test_older_chats_keep_the_start_token_before_the_template(tmp_path: Path) -> None:
    out, lm = tmp_path / "r.jsonl", chat_lm()
    bare = settings(templates={})
    begin(out, plan_requests(ASK, bare), lm, 1)
    collect(ASK, out, bare, lm=lm)
    for record in records_of(out):
        text = lm.tokenizer.apply_chat_template(turns(record), tokenize=False, add_generation_prompt=True)
        assert record.generation is not None
        assert record.generation.usage.prompt_tokens == len(encode(lm, text, 0))
        query = Query(prompt=text, temperature=0.0, seed=0)
        if record.generation.finish_reason != "loop":
            assert generate(lm, [query], Limits(max_new_tokens=12))[0].text == record.response
    assert "chat" not in records_of(out)[0].generation.parameters  # type: ignore[union-attr]


def test_a_form_that_is_asked_for_is_asked_anew(tmp_path: Path) -> None:
    out, lm = tmp_path / "r.jsonl", chat_lm()
    collect(SHORT, out, settings(chat="never"), lm=lm)
    assert collect(SHORT, out, settings(chat="always"), lm=lm).reused == 0
    assert {record.generation.parameters["prompt_template"] for record in records_of(out) if record.generation} == {
        "chat"
    }
    assert collect(SHORT, out, settings(chat="never")).reused == 2  # nothing is lost


@pytest.mark.parametrize(
    ("changes", "template", "message"),
    [
        ({"chat": "always"}, None, r"chat is 'always', but the tokenizer of no/such/model has no chat template"),
        (
            {"chat": "never", "templates": {"x": PromptTemplate(text="{prompt}")}},
            CHATML,
            r"no template for category 'test', and chat is 'never'; give one under templates\.default",
        ),
        ({"templates": {}}, None, r"the model has no chat template; give one under templates\.default"),
    ],
)
def test_a_form_that_there_is_not(changes: Any, template: str | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        collect(SHORT, tmp_path / "r.jsonl", settings(**changes), lm=chat_lm(template))


def test_a_template_that_refuses_stops_before_anything_is_generated(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"refuses these 2 messages \(roles: system, user\): roles must alternate"):
        collect(SHORT, tmp_path / "r.jsonl", settings(), lm=chat_lm(ALTERNATES))
    with Ledger(ledger_of(tmp_path / "r.jsonl")) as ledger:
        assert not ledger.attempts()


@pytest.mark.parametrize("template", [CHATML, WITH_START])
def test_answers_are_scored_after_the_prompt_that_was_asked(template: str, tmp_path: Path) -> None:
    out, lm = tmp_path / "r.jsonl", chat_lm(template)
    kept = settings(logprobs=LogProbSettings(keep=True, top_k=3))
    collect(ASK, out, kept, lm=lm)
    for record, scored in zip(records_of(out), LogProbFile(tmp_path / "r.logprobs.parquet"), strict=True):
        assert (scored.id, scored.text, scored.given) == (record.id, record.response, Given.PROMPT)
        prompt = lm.tokenizer.apply_chat_template(turns(record), add_generation_prompt=True, return_dict=True)
        ids = prompt["input_ids"] + lm.tokenizer(record.response, add_special_tokens=False).input_ids
        with torch.no_grad():
            log_p = lm.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        first = len(prompt["input_ids"])
        expected = [float(log_p[place - 1, ids[place]]) for place in range(first, len(ids))]
        np.testing.assert_allclose(scored.logprobs, expected, atol=1e-4)
        assert scored.token_ids is not None
        assert scored.top_ids is not None
        assert scored.token_ids.tolist() == ids[first:]
        assert scored.top_ids[:, 0].tolist() == log_p[first - 1 : -1].argmax(-1).tolist()
    collect(ASK, out, kept)  # what is there is not scored again


def test_slots_give_the_same_records(tmp_path: Path) -> None:
    lm, found = chat_lm(), {}
    sampled = settings(temperatures=[0.0, 0.7, 0.7, 0.7], batch_size=3)
    for engine in (Engine.LOOP, Engine.SLOTS):
        out = tmp_path / f"{engine}.jsonl"
        requests = plan_collection(ASK, out, sampled, lm)
        with open_run(out, requests) as ledger, CollectionProgress(len(requests), "Asking") as progress:
            answer_all(lm, ledger, requests, sampled, progress, engine)
            found[engine] = {r.id: (ledger.record(r.id) or {}).get("response") for r in requests}
            assert not ledger.report()["attempts"].keys() - {"answered"}
    assert found[Engine.LOOP] == found[Engine.SLOTS]
    assert len(set(found[Engine.LOOP].values())) > 3


def test_an_estimate_counts_the_tokens_of_the_template(tmp_path: Path) -> None:
    lm = chat_lm()
    model = tmp_path / "model"
    lm.model.float().save_pretrained(model)
    lm.tokenizer.save_pretrained(model)
    real = settings(endpoint=f"local:{model}")
    expected = estimate(ASK, tmp_path / "r.jsonl", real).prompt_tokens.expected
    requests = plan_collection(ASK, tmp_path / "other.jsonl", real)
    assert all(request.chat for request in requests)
    assert expected == sum(len(local_prompt(request, lm.tokenizer)) for request in requests)
    assert collect(ASK, tmp_path / "r.jsonl", real).prompt_tokens == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--endpoint", "local:m", "--chat", "sometimes"], "chat"),
        (["--endpoint", "local:m", "--chat", "never"], "chat=never asks through plain templates"),
        (
            ["--endpoint", "https://x/v1", "--model", "m", "--chat", "always"],
            "chat=always is for local targets; an endpoint is told by api=chat",
        ),
    ],
)
def test_the_command_takes_the_form(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr("sys.argv", ["terselm", "collect", "--out", str(tmp_path / "r.jsonl"), *options])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert message in capsys.readouterr().err
