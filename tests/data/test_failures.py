"""What an endpoint's errors mean, what must not be in a message, and the arithmetic of money and sizes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from terselm.data.collection.admission import PromptSizes
from terselm.data.collection.endpoint import Key, of_status
from terselm.data.collection.outcome import FailureCause, Then
from terselm.data.collection.settings import read_price
from terselm.data.schema import Message, Role
from terselm.errors import ConfigError


@pytest.mark.parametrize(
    ("status", "body", "reason", "then", "overload"),
    [
        (429, {"error": {"message": "slow down", "code": "rate_limit_exceeded"}}, "rate_limit", "retry", True),
        (429, {"error": {"message": "pay", "code": "insufficient_quota"}}, "rate_limit", "stop", True),
        (500, "oops", "server_error", "retry", False),
        (503, None, "server_error", "retry", True),
        (529, {"type": "error", "error": {"type": "overloaded_error", "message": "x"}}, "server_error", "retry", True),
        (408, None, "server_error", "retry", False),
        (401, {"error": {"message": "wrong key"}}, "refused", "stop", False),
        (403, {"detail": "no"}, "refused", "stop", False),
        (404, {"error": {"message": "no such model"}}, "refused", "stop", False),
        (400, {"error": {"message": "too long", "code": "context_length_exceeded"}}, "bad_request", "give up", False),
        (422, {"detail": [{"msg": "bad"}]}, "bad_request", "give up", False),
        (400, {"error": {"message": "x", "code": "content_filter"}}, "content_filter", "filtered", False),
        (
            400,
            {
                "error": {
                    "message": "x",
                    "innererror": {"code": "ResponsibleAIPolicyViolation"},
                    "code": "content_filter",
                }
            },
            "content_filter",
            "filtered",
            False,
        ),
        (400, {"error": {"message": "see content_policy_violation"}}, "content_filter", "filtered", False),
    ],
)
def test_what_a_status_means(status: int, body: Any, reason: str, then: str, overload: bool) -> None:
    failure = of_status(status, body, {})
    assert (failure.cause, failure.then, failure.overload) == (FailureCause(reason), Then(then), overload)
    assert failure.message.startswith(f"HTTP {status}")
    assert not failure.charged


@pytest.mark.parametrize(
    ("headers", "pause"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.25"}, 0.25),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after": "soon"}, None),
        ({"retry-after-ms": "-3"}, 0.0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
    ],
)
def test_how_long_an_endpoint_asks_to_wait(headers: dict[str, str], pause: float | None) -> None:
    assert of_status(429, None, headers).pause == pause


def test_a_date_to_wait_for() -> None:
    when = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    pause = of_status(429, None, {"retry-after": when}).pause
    assert pause is not None
    assert 55 < pause <= 60


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Incorrect API key provided: sk-abc123def456.", "Incorrect API key provided: [key]."),
        ("key sk-proj-****wxyz is wrong", "key [key] is wrong"),
        ('{"authorization": "Bearer abcdef123456"}', '{"authorization": "Bearer [key]"}'),
        ("my-own-secret! was sent", "[key] was sent"),
        ("Rate limit reached for gpt-4o in organization org-x", "Rate limit reached for gpt-4o in organization org-x"),
        ("x" * 600, "x" * 500 + "…"),
    ],
)
def test_a_key_is_not_shown(text: str, shown: str) -> None:
    assert Key(secret="my-own-secret!").mask(text) == shown


@given(st.lists(st.text(min_size=1, max_size=60), min_size=1, max_size=60))
def test_a_prompt_is_never_larger_than_its_bound(texts: list[str]) -> None:
    """Of a tokenizer that makes a token of every two bytes and adds ten."""
    sizes = PromptSizes()
    for text in texts:
        messages = [Message(role=Role.USER, content=f"a{text}".encode(errors="ignore").decode())]
        tokens = 10 + (len(messages[0].content.encode()) + 1) // 2
        assert tokens <= sizes.bound(messages)
        sizes.learn(messages, tokens)


def test_the_bound_tightens() -> None:
    sizes, messages = PromptSizes(), [Message(role=Role.USER, content="word " * 800)]
    assert sizes.bound(messages) >= 4000
    for _ in range(20):
        sizes.learn(messages, 1010)
    assert 1010 <= sizes.bound(messages) < 1300


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("m: {input: 1}", "expected input and output"),
        ("m: {input: -1, output: 2}", "expected input and output"),
        ("m: {input: a, output: 2}", "expected input and output"),
        ("other: {input: 1, output: 2}", "has no price for 'm'; it has other"),
        ("- 3", "has no price for 'm'; it has nothing"),
        ("m: [", "is not YAML"),
    ],
)
def test_a_bad_price_table(tmp_path: Path, table: str, message: str) -> None:
    (tmp_path / "p.yaml").write_text(table)
    with pytest.raises(ConfigError, match=message):
        read_price(tmp_path / "p.yaml", "m")


def test_a_price(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("m: {input: 0.5, output: 2}")
    assert read_price(tmp_path / "p.yaml", "m").cost(1_000_000, 500_000) == 1.5
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_price(tmp_path / "none.yaml", "m")
