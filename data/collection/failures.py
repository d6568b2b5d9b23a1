"""What can go wrong with a request, what it means, and what must not be repeated in a message: the key."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

_LONGEST = 500  # characters of an endpoint's message that are kept
_LIKE_A_KEY = re.compile(r"\b(?:sk|pk|gsk|hf|api|key)[-_][\w*-]{6,}|(?<=Bearer )[^\s\"']{6,}")
_REFUSED_BY_FILTER = ("content_filter", "content_policy_violation", "ResponsibleAIPolicyViolation")
_OVERLOADED = (429, 503, 529)


class Then(StrEnum):
    """What follows a failure."""

    RETRY = "retry"
    """It may pass."""
    GIVE_UP = "give up"
    """This request will not be answered."""
    FILTERED = "filtered"
    """A content filter refused this request."""
    STOP = "stop"
    """No request will be answered."""


class Reason(StrEnum):
    """Classes of failures, as the status lists them."""

    RATE_LIMIT = "rate_limit"
    SERVER_ERROR = "server_error"
    TIMEOUT = "timeout"
    CONNECTION = "connection"
    MALFORMED = "malformed"
    REFUSED = "refused"
    BAD_REQUEST = "bad_request"
    CONTENT_FILTER = "content_filter"
    EXPIRED = "expired"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """One attempt that brought no answer.

    Attributes:
        charged: it may have been answered, and so paid for.
        overload: the endpoint bears less than it is asked.
        pause: seconds that the endpoint asks to wait.
    """

    reason: Reason
    then: Then
    message: str
    charged: bool = False
    overload: bool = False
    pause: float | None = None


def of_status(status: int, body: Any, headers: Mapping[str, str]) -> Failure:
    """The failure that an HTTP status other than success stands for; ``body`` is parsed JSON, or text."""
    code, message = _said(body)
    message = f"HTTP {status}: {message}" if message else f"HTTP {status}"
    if any(name in f"{code} {message}" for name in _REFUSED_BY_FILTER):
        return Failure(reason=Reason.CONTENT_FILTER, then=Then.FILTERED, message=message)
    pause = _pause(headers)
    if status == 429:
        then = Then.STOP if "insufficient_quota" in f"{code} {message}" else Then.RETRY
        return Failure(reason=Reason.RATE_LIMIT, then=then, message=message, overload=True, pause=pause)
    if status in (408, 409) or status >= 500:
        overload = status in _OVERLOADED
        return Failure(reason=Reason.SERVER_ERROR, then=Then.RETRY, message=message, overload=overload, pause=pause)
    if status in (401, 403, 404, 405):
        return Failure(reason=Reason.REFUSED, then=Then.STOP, message=message)
    return Failure(reason=Reason.BAD_REQUEST, then=Then.GIVE_UP, message=message)


def no_answer(reason: Reason, error: BaseException | str) -> Failure:
    """A time-out, a dropped connection or a response that cannot be read; the work may have been done and charged."""
    message = str(error).strip().split("\n")[0] or type(error).__name__
    return Failure(reason=reason, then=Then.RETRY, message=message, charged=True, overload=reason is Reason.TIMEOUT)


def masked(text: str, key: str | None) -> str:
    """``text`` without the key and without what looks like one, and not longer than a message should be."""
    if key:
        text = text.replace(key, "[key]")
    text = _LIKE_A_KEY.sub("[key]", text)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"


def _said(body: Any) -> tuple[str, str]:
    """(code, message) of an error body in OpenAI's form, or something like it."""
    if isinstance(body, dict):
        error = body.get("error", body)
        if isinstance(error, dict):
            said = error.get("message") or error.get("detail") or error
            return f"{error.get('code')} {error.get('type')}", " ".join(str(said).split())
        return "", " ".join(str(error).split())
    return "", " ".join(str(body or "").split())


def _pause(headers: Mapping[str, str]) -> float | None:
    """Seconds from ``Retry-After-Ms`` or ``Retry-After``, which is a number or a date."""
    try:
        if (text := headers.get("retry-after-ms")) is not None:
            return max(0.0, float(text) / 1000)
        text = headers.get("retry-after")
        if text is None:
            return None
        if re.fullmatch(r"[\d.]+", text.strip()):
            return float(text)
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None
