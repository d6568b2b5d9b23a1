"""Log-probabilities as endpoints give them: their tokens back on the characters of the text."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from endpoints import KEY, settings
from fakes import random_lm
from faulty_server import Reply, Server, error, serving
from hypothesis import given
from hypothesis import settings as trials
from hypothesis import strategies as st

from terselm.data.collection.score_only import score_only
from terselm.data.collection.scores import echoed_scores, pack, spans, unpack, vllm_scores
from terselm.data.collection.settings import CollectSettings, LogProbSettings, PromptScores
from terselm.data.logprobs import LogProbFile, ScoredText, score_texts
from terselm.data.schema import PlainText
from terselm.errors import ConfigError, TargetLLMError
from terselm.models import CausalLM

TEXTS = ["The cat sat.", "我们今天 naïve 👍 café", "def add(a, b):\n    return a + b\n", "a"]


def local(lm: CausalLM, text: str, top_k: int = 0) -> ScoredText:
    ((scored,),) = score_texts(lm, [PlainText(id="x", text=text)], top_k)
    return scored


def pieces(lm: CausalLM, ids: list[int]) -> list[str]:
    return [lm.tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in ids]


@trials(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), st.randoms(use_true_random=False))
def test_spans_of_byte_pieces_cover_the_text(text: str, chance: Any) -> None:
    data = text.encode()
    cuts = sorted({0, len(data), *(chance.randrange(len(data) + 1) for _ in range(5))})
    parts = [data[a:b] for a, b in pairwise(cuts)]
    starts, ends = spans(text, parts)
    at = 0
    for part, start, end in zip(parts, starts, ends, strict=True):
        whole = text[start:end].encode()
        assert len(text[:start].encode()) <= at
        assert part in whole
        at += len(part)
    assert not text or {n for s, e in zip(starts, ends, strict=True) for n in range(s, e)} == set(range(len(text)))


@pytest.mark.parametrize("kind", ["llama", "gemma"])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("top_k", [0, 2])
def test_vllm_says_what_the_local_model_says(kind: str, text: str, top_k: int) -> None:
    lm = random_lm(kind)
    expected = local(lm, text, max(1, top_k))
    found = vllm_scores("x", text, json.dumps(vllm_reply(lm, text, top_k)).encode(), top_k)
    assert expected.token_ids is not None
    assert found.token_ids is not None
    assert found.token_ids.tolist() == expected.token_ids.tolist()
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-6)
    if text.isascii():
        assert found.starts.tolist() == expected.starts.tolist()
        assert found.ends.tolist() == expected.ends.tolist()
    if top_k:
        assert expected.top_ids is not None
        assert found.top_ids is not None
        assert found.top_ids.tolist() == expected.top_ids.tolist()


def vllm_reply(lm: CausalLM, text: str, top_k: int) -> dict[str, Any]:
    """The reply of vLLM's ``/completions``: the token that is there first, then the likeliest."""
    scored = local(lm, text, max(1, top_k))
    assert scored.token_ids is not None
    assert scored.top_ids is not None
    assert scored.top_logprobs is not None
    rows: list[Any] = [None]
    for place, token in enumerate(scored.token_ids.tolist()):
        entries = {token: float(scored.logprobs[place])}
        if top_k:
            top = zip(scored.top_ids[place].tolist(), scored.top_logprobs[place].tolist(), strict=True)
            entries |= {other: logprob for other, logprob in top if other != token}
        rows.append(
            {
                str(name): {"logprob": logprob, "rank": 1, "decoded_token": pieces(lm, [name])[0]}
                for name, logprob in entries.items()
            }
        )
    return {"choices": [{"text": "x", "finish_reason": "length", "prompt_logprobs": rows}], "usage": {}}


@pytest.mark.parametrize("start", [True, False])
def test_echo_with_and_without_a_start_token(start: bool) -> None:
    lm, text = random_lm("llama"), "def add(a, b):\n    return a + b"
    expected = local(lm, text)
    assert expected.token_ids is not None
    tokens = pieces(lm, expected.token_ids.tolist())
    values: list[float | None] = [*map(float, expected.logprobs)]
    if start:
        tokens, values = ["<s>", *tokens], [None, *values]
    else:
        values[0] = None
    logprobs = {"tokens": [*tokens, "x"], "token_logprobs": [*values, -1.0], "top_logprobs": None}
    raw = json.dumps({"choices": [{"text": text + "x", "logprobs": logprobs}]}).encode()
    found = echoed_scores("x", text, raw)
    assert found.starts.tolist() == expected.starts.tolist()
    assert found.ends.tolist() == expected.ends.tolist()
    assert math.isnan(found.logprobs[0]) is not start
    np.testing.assert_allclose(found.logprobs[1:], expected.logprobs[1:], atol=1e-6)


def test_what_the_ledger_keeps_comes_back() -> None:
    scored = local(random_lm("llama"), TEXTS[1], 3)
    again = unpack(pack(scored), PlainText(id="x", text=TEXTS[1]))
    for one, other in zip(vars(scored).values(), vars(again).values(), strict=True):
        assert np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Server]]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    lm, server = random_lm("llama"), Server()

    async def handle(server: Server, path: str, headers: dict[str, str], body: bytes) -> Reply:
        asked = json.loads(body)
        server.answered[asked["prompt"]] += 1
        if asked["prompt"] == "bad":
            return error(400, f"not with {KEY}")
        if server.answered.total() % 3 == 0:
            return error(500, "again")
        return Reply(body=json.dumps(vllm_reply(lm, asked["prompt"], asked["prompt_logprobs"])).encode())

    server.handle = handle
    with serving(server) as url:
        yield url, server


def test_score_only_through_an_endpoint(tmp_path: Path, vllm: tuple[str, Server]) -> None:
    endpoint, server = vllm
    source = tmp_path / "texts.jsonl"
    source.write_text(
        "".join(json.dumps({"id": f"t{n}", "text": text}) + "\n" for n, text in enumerate([*TEXTS, "bad"]))
    )
    out = tmp_path / "scores.parquet"
    asked = settings(endpoint, logprobs=LogProbSettings(of_texts=PromptScores.VLLM, top_k=2))
    summary = score_only(str(source), out, asked)
    assert (summary.texts, summary.reused, summary.failed) == (4, 0, {"t4": "HTTP 400: not with [key]"})
    for number, scored in enumerate(LogProbFile(out)):
        assert (scored.id, scored.text) == (f"t{number}", TEXTS[number])
        np.testing.assert_allclose(scored.logprobs, local(random_lm("llama"), TEXTS[number]).logprobs, atol=1e-6)
    before = server.answered["a"]
    assert score_only(str(source), out, asked).reused == 4
    assert server.answered["a"] == before
    with pytest.raises(ConfigError, match="not known to score texts"):
        score_only(str(source), out, settings(endpoint))
    source.write_text('{"text": "bad"}\n')
    with pytest.raises(TargetLLMError, match="no text was scored: HTTP 400"):
        score_only(str(source), tmp_path / "none.parquet", asked)


def test_score_only_of_a_local_model(tmp_path: Path) -> None:
    lm = random_lm("llama")
    lm.model.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"instruction": text, "output": "yes"}) + "\n" for text in TEXTS))
    given = CollectSettings(endpoint=f"local:{tmp_path / 'model'}", logprobs=LogProbSettings(top_k=2))
    summary = score_only(str(source), tmp_path / "s.parquet", given)
    assert (summary.texts, summary.reused) == (4, 0)
    for text, scored in zip(TEXTS, LogProbFile(tmp_path / "s.parquet"), strict=True):
        assert scored.text == f"{text}\n\nyes"
        assert scored.response_start == len(text) + 2
        np.testing.assert_allclose(scored.logprobs, local(lm, scored.text).logprobs, atol=1e-5)
    assert score_only(str(source), tmp_path / "s.parquet", given).reused == 4
