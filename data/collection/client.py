"""One endpoint over the network: the `openai` SDK's client with its own retries off, and what its errors mean."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from terselm.data.collection.failures import Failure, Reason, masked, no_answer, of_status
from terselm.data.collection.settings import CollectSettings
from terselm.errors import ConfigError

if TYPE_CHECKING:
    from openai import AsyncOpenAI

_NO_KEY = "none"  # servers of one's own ask for none; the SDK wants one


class AskError(Exception):
    """An attempt brought no answer."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


@dataclass(frozen=True, kw_only=True, repr=False)
class Key:
    """The endpoint's key; it has no representation, so that no log can hold it."""

    secret: str | None

    def mask(self, text: str) -> str:
        """``text`` without the key, or what looks like one, and shortened to a message."""
        return masked(text, self.secret)

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
        raise ConfigError(f"key file {key_file} cannot be read: {getattr(error, 'strerror', error)}") from None
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
        self._settings = settings
        self.sdk = _sdk(settings, key)

    async def ask(self, body: dict[str, Any], *, plain: bool) -> bytes:
        """Send one request and return the response as it came, without the key.

        Args:
            plain: ask ``/completions``.

        Raises:
            AskError: saying what went wrong, in the endpoint's words.
        """
        make = self.sdk.completions.with_raw_response if plain else self.sdk.chat.completions.with_raw_response
        known = {"model", "messages", "prompt"}
        asked = {name: value for name, value in body.items() if name in known}
        rest = {name: value for name, value in body.items() if name not in known}
        async with self.clear_errors():
            response: Any = await make.create(**asked, extra_body=rest)
            return self._key.mask_raw(response.content)

    @asynccontextmanager
    async def clear_errors(self) -> AsyncIterator[None]:
        """What the SDK raises within becomes AskError, without the key."""
        import openai

        limit = self._settings.limits.timeout
        try:
            async with asyncio.timeout(limit):  # the SDK's own is for each read
                yield
            return
        except openai.APIStatusError as error:
            failure = of_status(error.status_code, error.body or error.response.text, error.response.headers)
        except (openai.APITimeoutError, TimeoutError):
            failure = no_answer(Reason.TIMEOUT, f"no answer within {limit:g} s")
        except openai.APIConnectionError as error:
            failure = no_answer(Reason.CONNECTION, error.__cause__ or error)
        except openai.APIError as error:
            failure = no_answer(Reason.MALFORMED, error)
        raise AskError(replace(failure, message=self._key.mask(failure.message)))

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.sdk.close()


def _sdk(settings: CollectSettings, key: Key) -> AsyncOpenAI:
    try:
        import openai
    except ImportError:
        raise ConfigError("endpoints need the openai package; run: pip install 'terselm[collect]'") from None
    common: dict[str, Any] = {
        "api_key": key.secret or _NO_KEY,
        "timeout": settings.limits.timeout,
        "max_retries": 0,
    }
    if settings.azure_api_version:
        return openai.AsyncAzureOpenAI(
            azure_endpoint=settings.endpoint, api_version=settings.azure_api_version, **common
        )
    return openai.AsyncOpenAI(base_url=settings.endpoint, **common)
