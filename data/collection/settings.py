"""What is asked, of whom, how often, and within which limits."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit

from terselm.errors import ConfigError

LOCAL = "local:"
SLOT = "{prompt}"
_OMITTABLE = ("temperature", "top_p", "seed", "max_tokens")


class Api(StrEnum):
    """Which of the endpoint's interfaces is asked."""

    CHAT = "chat"
    """``/chat/completions``: the endpoint renders the messages."""
    COMPLETIONS = "completions"
    """``/completions``: the prompt is text, by the templates below."""


class PromptScores(StrEnum):
    """How an endpoint is asked for log-probabilities of given text (``/completions``)."""

    NONE = "none"
    ECHO = "echo"
    """``echo`` with ``logprobs``."""
    VLLM = "prompt_logprobs"
    """vLLM's ``prompt_logprobs``."""


@dataclass(frozen=True, kw_only=True)
class PromptTemplate:
    """Plain text around a prompt, for a model that was not trained to chat.

    Raises:
        ConfigError: not exactly one ``{prompt}``, or an empty stop string.
    """

    text: str
    """Holds ``{prompt}`` once; worked examples before it show a base model what is wanted."""
    stop: list[str] = field(default_factory=list)
    """The answer ends before the first of these."""

    def __post_init__(self) -> None:
        if self.text.count(SLOT) != 1:
            raise ConfigError(f"a template holds {SLOT} {self.text.count(SLOT)} times; expected once")
        if "" in self.stop:
            raise ConfigError("a stop string is empty; leave it out")


@dataclass(frozen=True, kw_only=True)
class LimitSettings:
    """How fast and how stubbornly an endpoint is asked; a local target has no such limits.

    Raises:
        ConfigError: a value is out of range.
    """

    concurrency: int = 32
    """Most requests in flight; the number adapts to what the endpoint bears, up to this."""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Prompt and completion together, in any 60 seconds. A request counts with its largest possible size until its
    usage is known, so a ``max_new_tokens`` close to the real lengths uses the limit best."""
    timeout: float = 120.0
    """Seconds until a request is given up and asked again."""
    retries: int = 6
    """How often a request that failed in passing is asked again."""
    backoff: float = 1.0
    """Seconds; the pause before retry n is drawn between 0 and ``backoff * 2**n``, or what ``Retry-After`` says."""
    longest_pause: float = 60.0
    """Seconds; of the pauses that ``Retry-After`` does not set."""
    batch_poll: float = 30.0
    """Seconds after which a batch's state is asked for again."""

    def __post_init__(self) -> None:
        for name in ("concurrency", "requests_per_minute", "tokens_per_minute"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"limits.{name} is {value}; expected at least 1")
        if self.retries < 0:
            raise ConfigError(f"limits.retries is {self.retries}; expected 0 or more")
        for name in ("timeout", "backoff", "longest_pause", "batch_poll"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"limits.{name} is {getattr(self, name)}; expected more than 0 seconds")


@dataclass(frozen=True, kw_only=True)
class LogProbSettings:
    """Log-probabilities that are kept beside the records.

    Raises:
        ConfigError: a negative count.
    """

    keep: bool = False
    """Of the chosen tokens. A local target scores prompt and response as the compressor reads them, as raw text; an
    endpoint gives those of the response as it was generated."""
    top_k: int = 0
    """The likeliest tokens at each position besides; endpoints allow 5 to 20."""
    of_texts: PromptScores = PromptScores.NONE
    """How an endpoint scores given texts (``--score-only``)."""

    def __post_init__(self) -> None:
        if self.top_k < 0:
            raise ConfigError(f"logprobs.top_k is {self.top_k}; expected 0 (none) or more")


@dataclass(frozen=True, kw_only=True)
class CollectSettings:
    """Which target LLM is asked, how, and how often.

    Raises:
        ConfigError: a value is out of range, or two contradict one another.
    """

    endpoint: str = ""
    """``https://…/v1`` of an OpenAI-compatible server, ``https://….openai.azure.com``, or ``local:MODEL`` with an
    alias, a folder or a hub id."""
    model: str = ""
    """As the endpoint calls it (for Azure, the deployment); a local target's name where it is empty."""
    api: Api = Api.CHAT
    """Which of the endpoint's interfaces is asked."""
    azure_api_version: str = ""
    """Such as ``2024-10-21``; set it for Azure and nothing else."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the endpoint's key; ``--key-file`` goes before it."""
    temperatures: list[float] = field(default_factory=lambda: [0.0])
    """One answer to each instruction for each entry; 0 is greedy. An entry may come twice."""
    samples: int = 1
    """Answers to each instruction at each sampled temperature."""
    top_p: float = 1.0
    """Nucleus: the least set of tokens with so much probability, in (0, 1]."""
    top_k: int = 0
    """Tokens to choose from; 0 is no limit. Not every endpoint knows it."""
    max_new_tokens: int = 256
    seed: int = 0
    """Each request gets a seed of its own that follows from this one."""
    omit: list[str] = field(default_factory=list)
    """Parameters that the endpoint refuses and that are not sent: temperature, top_p, seed, max_tokens."""
    extra_body: dict[str, Any] = field(default_factory=dict)
    """Sent along with every request, such as ``max_completion_tokens: 256``."""
    logprobs: LogProbSettings = field(default_factory=LogProbSettings)
    limits: LimitSettings = field(default_factory=LimitSettings)
    device: str = "auto"
    """Of a local target."""
    dtype: str = "auto"
    """Of a local target."""
    batch_size: int | None = None
    """Answers that a local target generates together; by default what the memory allows, up to 1024."""
    attempts: int = 3
    """How often a local target draws a sampled answer until it is neither empty nor looping nor copied from the
    template. What an endpoint answers is paid for and kept as it is."""
    templates: dict[str, PromptTemplate] = field(default_factory=dict)
    """By category of the instruction; ``default`` for all others. Where none applies, the model's chat template."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size", "attempts", "samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1")
        if not self.temperatures or not all(0 <= t < math.inf for t in self.temperatures):
            raise ConfigError(f"temperatures is {list(self.temperatures)}; expected numbers of at least 0")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; expected a number above 0 and up to 1")
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}; expected 0 (no limit) or more")
        if unknown := set(self.omit) - set(_OMITTABLE):
            raise ConfigError(f"omit holds {sorted(unknown)[0]!r}; expected some of {', '.join(_OMITTABLE)}")
        if self.is_local:
            self._check_local()
        else:
            self._check_remote()

    @property
    def is_local(self) -> bool:
        return self.endpoint.startswith(LOCAL)

    @property
    def local_name(self) -> str:
        """What `load_causal_lm` takes."""
        return self.endpoint.removeprefix(LOCAL)

    @property
    def target(self) -> str:
        """The name that the records bear."""
        return self.model or self.local_name

    def _check_local(self) -> None:
        if not self.local_name.strip():
            raise ConfigError("endpoint is 'local:'; expected a model after it, such as local:gemma3-270m")
        if self.omit or self.extra_body or self.azure_api_version:
            raise ConfigError("omit, extra_body and azure_api_version are for endpoints; this target is local")

    def _check_remote(self) -> None:
        parts = urlsplit(self.endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"endpoint is {self.endpoint!r}; expected http(s)://HOST/… or local:MODEL")
        if parts.username or parts.password or parts.query:
            raise ConfigError("the endpoint's URL holds a password or a query; give the key by environment or file")
        if not self.model.strip():
            raise ConfigError("model is empty; name the model that the endpoint is to ask")
        if self.templates and self.api is Api.CHAT:
            raise ConfigError("templates are for plain text; set api=completions, or leave them out")
        if not self.templates and self.api is Api.COMPLETIONS and self.logprobs.of_texts is PromptScores.NONE:
            raise ConfigError("api=completions needs templates.default, which makes text of the messages")
