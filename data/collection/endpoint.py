"""One endpoint over the network: it is asked through the `openai` SDK, what it answers, and what its errors mean.

The SDK's own retries are off: each attempt is in the ledger. The endpoint's key must not be repeated in any message.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from terselm.data.collection.outcome import AskError, Failure, FailureCause, Then
from terselm.data.collection.settings import CollectSettings, LimitSettings
from terselm.errors import ConfigError
from terselm.extras import first_line, need

if TYPE_CHECKING:
    from collections.abc import Mapping

    from openai import AsyncOpenAI

T = TypeVar("T")
_NO_KEY = "none"  # servers of one's own ask for none; the SDK insists on one
_LONGEST = 500  # characters of an endpoint's message that are kept
_LONGEST_WISH = 3600.0  # seconds; an endpoint that asks to wait longer is asked again after this
_LIKE_A_KEY = re.compile(r"\b(?:sk|pk|gsk|hf|api|key)[-_][\w*-]{6,}|(?<=Bearer )[^\s\"']{6,}")
_REFUSED_BY_FILTER = ("content_filter", "content_policy_violation", "ResponsibleAIPolicyViolation")


@dataclass(frozen=True, kw_only=True, repr=False)
class Key:
    """The endpoint's key; it has no representation, so that no log can hold it."""

    secret: str | None

    def mask(self, text: str) -> str:
        """``text`` without the key and without what looks like one, and not longer than a message should be."""
        if self.secret:
            text = text.replace(self.secret, "[key]")
        text = _LIKE_A_KEY.sub("[key]", text)
        return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"

    def mask_raw(self, raw: bytes) -> bytes:
        """A response without the key, should the endpoint repeat it."""
        return raw.replace(self.secret.encode(), b"[key]") if self.secret else raw


def read_key(settings: CollectSettings, key_file: Path | None) -> Key:
    """The key from a file, or else from the environment; none for an endpoint that asks for none.

    Raises:
        ConfigError: the file cannot be read or is empty.
    """
    if key_file is None:
        return Key(secret=os.environ.get(settings.key_variable, "").strip() or None)
    try:
        secret = key_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"key file {key_file} cannot be read: {first_line(error)}") from None
    if not secret:
        raise ConfigError(f"key file {key_file} is empty; expected the endpoint's key")
    return Key(secret=secret)


class Client:
    """Asks one endpoint.

    Raises:
        ConfigError: the `openai` package is missing.
    """

    def __init__(self, settings: CollectSettings, key: Key) -> None:
        self._key = key
        self._limits = settings.limits
        openai = need("openai", "collect")
        common = {"api_key": key.secret or _NO_KEY, "timeout": settings.limits.timeout, "max_retries": 0}
        azure = {"azure_endpoint": settings.endpoint, "api_version": settings.azure_api_version}
        self.sdk: AsyncOpenAI = (
            openai.AsyncAzureOpenAI(**azure, **common)
            if settings.azure_api_version
            else openai.AsyncOpenAI(base_url=settings.endpoint, **common)
        )

    async def ask(self, body: dict[str, Any], *, plain: bool) -> bytes:
        """Send one request and return the response as it came, without the key.

        Args:
            plain: ask ``/completions``.

        Raises:
            AskError: saying what went wrong, in the endpoint's words.
        """
        make = self.sdk.completions.with_raw_response if plain else self.sdk.chat.completions.with_raw_response
        known = {"model", "messages", "prompt"}
        named = {name: value for name, value in body.items() if name in known}
        rest = {name: value for name, value in body.items() if name not in known}
        async with self._clear_errors():
            response: Any = await make.create(**named, extra_body=rest)
            return self._key.mask_raw(response.content)

    async def call(self, make: Callable[[], Awaitable[T]]) -> T:
        """One call of the interface, again and again as long as its failures may pass.

        Raises:
            AskError: the last of them, or one that does not pass.
        """
        failures = 0
        while True:
            try:
                async with self._clear_errors():
                    return await make()
            except AskError as error:
                failures += 1
                if error.failure.then is not Then.RETRY or failures > self._limits.retries:
                    raise
                pause = pause_after(failures, error.failure, self._limits)
            await asyncio.sleep(pause)

    @asynccontextmanager
    async def _clear_errors(self) -> AsyncIterator[None]:
        """What the SDK raises within becomes AskError, without the key."""
        import openai

        limit = self._limits.timeout
        try:
            async with asyncio.timeout(limit):  # the SDK's own is for each read
                yield
            return
        except openai.APIStatusError as error:
            failure = of_status(error.status_code, error.body or error.response.text, error.response.headers)
        except (openai.APITimeoutError, TimeoutError):
            failure = no_answer(FailureCause.TIMEOUT, f"no answer within {limit:g} s")
        except openai.APIConnectionError as error:
            failure = no_answer(FailureCause.CONNECTION, first_line(error.__cause__ or error))
        except openai.APIError as error:
            failure = no_answer(FailureCause.MALFORMED, first_line(error))
        raise AskError(replace(failure, message=self._key.mask(failure.message)))

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.sdk.close()


def of_status(status: int, body: Any, headers: Mapping[str, str]) -> Failure:
    """The failure that an HTTP status other than success stands for; ``body`` is parsed JSON, or text."""
    code, message = _code_and_message(body)
    message = f"HTTP {status}: {message}" if message else f"HTTP {status}"
    if any(name in f"{code} {message}" for name in _REFUSED_BY_FILTER):
        return Failure(cause=FailureCause.CONTENT_FILTER, then=Then.FILTERED, message=message)
    overload, pause = status in (429, 503, 529), _pause_in(headers)
    if status == 429:
        then = Then.STOP if "insufficient_quota" in f"{code} {message}" else Then.RETRY
        return Failure(cause=FailureCause.RATE_LIMIT, then=then, message=message, overload=overload, pause=pause)
    if status in (408, 409) or status >= 500:
        cause, then = FailureCause.SERVER_ERROR, Then.RETRY
        return Failure(cause=cause, then=then, message=message, overload=overload, pause=pause)
    if status in (401, 403, 404, 405):
        return Failure(cause=FailureCause.REFUSED, then=Then.STOP, message=message)
    return Failure(cause=FailureCause.BAD_REQUEST, then=Then.GIVE_UP, message=message)


def no_answer(cause: FailureCause, message: str) -> Failure:
    """A time-out, a dropped connection or a response that cannot be read; the work may have been done and charged."""
    overload = cause is FailureCause.TIMEOUT
    return Failure(cause=cause, then=Then.RETRY, message=message, charged=True, overload=overload)


def pause_after(failures: int, failure: Failure, limits: LimitSettings) -> float:
    """Seconds until the next attempt: what the endpoint asks for, else exponential with full jitter.

    Args:
        failures: of this request so far, at least 1.
    """
    drawn = random.uniform(0.0, min(limits.longest_pause, limits.backoff * 2.0 ** min(failures - 1, 64)))
    return drawn if failure.pause is None else min(failure.pause, _LONGEST_WISH) + min(drawn, 0.1 * failure.pause)


def _code_and_message(body: Any) -> tuple[str, str]:
    """Of an error body in OpenAI's form, or something like it."""
    error, code = body.get("error", body) if isinstance(body, dict) else body or "", ""
    if isinstance(error, dict):
        code = f"{error.get('code')} {error.get('type')}"
        error = error.get("message") or error.get("detail") or error
    return code, " ".join(str(error).split())


def _pause_in(headers: Mapping[str, str]) -> float | None:
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
