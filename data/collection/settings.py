"""What is asked, of whom, how often, within which limits, and at which price."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from terselm.config import refuse
from terselm.errors import ConfigError
from terselm.extras import first_line
from terselm.models.chat import ChatMode

LOCAL = "local:"
SLOT = "{prompt}"
_OMITTABLE = ("temperature", "top_p", "seed", "max_tokens")
_MILLION = 1_000_000


class Api(StrEnum):
    """Which of the endpoint's interfaces is asked.

    Attributes:
        CHAT: ``/chat/completions``: the endpoint renders the messages.
        COMPLETIONS: ``/completions``: the prompt is text, by the templates of the settings.
    """

    CHAT = "chat"
    COMPLETIONS = "completions"


class PromptScores(StrEnum):
    """How an endpoint is asked for log-probabilities of given text (``/completions``).

    Attributes:
        ECHO: ``echo`` with ``logprobs``.
        VLLM: vLLM's ``prompt_logprobs``.
    """

    NONE = "none"
    ECHO = "echo"
    VLLM = "prompt_logprobs"


@dataclass(frozen=True, kw_only=True)
class PromptTemplate:
    """Plain text around a prompt, for a model that was not trained to chat.

    Attributes:
        text: holds ``{prompt}`` once; worked examples before it show a base model what an answer looks like.
        stop: the answer ends before the first of these.

    Raises:
        ConfigError: not exactly one ``{prompt}``, or an empty stop string.
    """

    text: str
    stop: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        count = self.text.count(SLOT)
        faults = [f"a template holds {SLOT} {count} times; expected once"] if count != 1 else []
        refuse([*faults, *(["a stop string is empty; leave it out"] if "" in self.stop else [])])


@dataclass(frozen=True, kw_only=True)
class LimitSettings:
    """How fast and how stubbornly an endpoint is asked; a local target has no such limits.

    Attributes:
        concurrency: most requests in flight; the number adapts to what the endpoint bears, up to this.
        requests_per_minute: in any 60 seconds.
        tokens_per_minute: prompt and completion together, in any 60 seconds. A request counts with its largest
            possible size until its usage is known, so a ``max_new_tokens`` close to the real lengths uses the limit
            best.
        timeout: seconds until a request is given up and asked again.
        retries: how often a request that failed in passing is asked again.
        backoff: seconds; the pause before retry n is drawn between 0 and ``backoff * 2**n``, or what ``Retry-After``
            says.
        longest_pause: seconds; of the pauses that ``Retry-After`` does not set.
        batch_poll: seconds after which a batch's state is asked for again.

    Raises:
        ConfigError: values are out of range.
    """

    concurrency: int = 32
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    timeout: float = 120.0
    retries: int = 6
    backoff: float = 1.0
    longest_pause: float = 60.0
    batch_poll: float = 30.0

    def __post_init__(self) -> None:
        refuse(self._faults())

    def _faults(self) -> Iterator[str]:
        for name in ("concurrency", "requests_per_minute", "tokens_per_minute"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"limits.{name} is {value}; expected at least 1"
        if self.retries < 0:
            yield f"limits.retries is {self.retries}; expected 0 or more"
        for name in ("timeout", "backoff", "longest_pause", "batch_poll"):
            if not getattr(self, name) > 0:
                yield f"limits.{name} is {getattr(self, name)}; expected more than 0 seconds"


@dataclass(frozen=True, kw_only=True)
class LogProbSettings:
    """Log-probabilities that are kept beside the records.

    Attributes:
        keep: those of the chosen tokens. A local target scores prompt and response as the compressor reads them, as
            raw text; an endpoint gives those of the response as it was generated.
        top_k: the likeliest tokens at each position besides; endpoints allow 5 to 20.
        of_texts: how an endpoint scores given texts (``terselm collection score``).

    Raises:
        ConfigError: a negative count.
    """

    keep: bool = False
    top_k: int = 0
    of_texts: PromptScores = PromptScores.NONE

    def __post_init__(self) -> None:
        if self.top_k < 0:
            raise ConfigError(f"logprobs.top_k is {self.top_k}; expected 0 (none) or more")


@dataclass(frozen=True, kw_only=True)
class LabelSettings:
    """How the utility of a prompt's units is found (``terselm collect --utility``).

    Attributes:
        masks: K: how often half of the units are left out; the answer is scored so many times, and twice more.
        ridge: weight of the squared utilities in the regression; more makes them smaller and less noisy.

    Raises:
        ConfigError: values are out of range.
    """

    masks: int = 32
    ridge: float = 1.0

    def __post_init__(self) -> None:
        faults = [f"labels.masks is {self.masks}; expected at least 2"] if self.masks < 2 else []
        if not 0 < self.ridge < math.inf:
            faults.append(f"labels.ridge is {self.ridge}; expected a number above 0")
        refuse(faults)


@dataclass(frozen=True, kw_only=True)
class CollectSettings:
    """Which target LLM is asked, how, and how often.

    Attributes:
        endpoint: ``https://…/v1`` of an OpenAI-compatible server, ``https://….openai.azure.com``, or ``local:MODEL``
            with an alias, a folder or a hub id.
        model: as the endpoint calls it (for Azure, the deployment); a local target's name where it is empty.
        api: which of the endpoint's interfaces is asked.
        azure_api_version: such as ``2024-10-21``; set it for Azure and nothing else.
        key_variable: environment variable that holds the endpoint's key; ``--key-file`` goes before it.
        temperatures: one answer to each instruction for each entry; 0 is greedy. An entry may come twice.
        samples: answers to each instruction at each sampled temperature.
        top_p: nucleus: the least set of tokens with so much probability, in (0, 1].
        top_k: tokens to choose from; 0 is no limit. Not every endpoint knows it.
        max_new_tokens: of an answer.
        seed: each request gets a seed of its own that follows from this one.
        omit: parameters that the endpoint refuses and that are not sent: temperature, top_p, seed, max_tokens.
        extra_body: sent along with every request, such as ``max_completion_tokens: 256``.
        logprobs: log-probabilities that are kept.
        labels: how the utility of units is found.
        limits: of an endpoint.
        device: of a local target.
        dtype: of a local target.
        batch_size: answers that a local target generates together; by default what the memory allows, up to 1024.
        attempts: how often a local target draws a sampled answer until it is neither empty nor looping nor copied
            from the template. What an endpoint answers is paid for and kept as it is.
        templates: plain text around a prompt, by category of the instruction; ``default`` for all others.
        chat: whether a local target is asked through its own chat template: ``auto`` where it has one, ``always``, or
            ``never``; else through ``templates``. A collection that was begun in one form goes on in it under ``auto``.

    Raises:
        ConfigError: values are out of range, or contradict one another.
    """

    endpoint: str = ""
    model: str = ""
    api: Api = Api.CHAT
    azure_api_version: str = ""
    key_variable: str = "OPENAI_API_KEY"
    temperatures: list[float] = field(default_factory=lambda: [0.0])
    samples: int = 1
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 256
    seed: int = 0
    omit: list[str] = field(default_factory=list)
    extra_body: dict[str, Any] = field(default_factory=dict)
    logprobs: LogProbSettings = field(default_factory=LogProbSettings)
    labels: LabelSettings = field(default_factory=LabelSettings)
    limits: LimitSettings = field(default_factory=LimitSettings)
    device: str = "auto"
    dtype: str = "auto"
    batch_size: int | None = None
    attempts: int = 3
    templates: dict[str, PromptTemplate] = field(default_factory=dict)
    chat: ChatMode = ChatMode.AUTO

    def __post_init__(self) -> None:
        refuse([*self._faults_of_numbers(), *(self._faults_if_local() if self.is_local else self._faults_if_remote())])

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

    def _faults_of_numbers(self) -> Iterator[str]:
        for name in ("max_new_tokens", "batch_size", "attempts", "samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                yield f"{name} is {getattr(self, name)}; expected at least 1"
        if not self.temperatures or not all(0 <= t < math.inf for t in self.temperatures):
            yield f"temperatures is {list(self.temperatures)}; expected numbers of at least 0"
        if not 0 < self.top_p <= 1:
            yield f"top_p is {self.top_p}; expected a number above 0 and up to 1"
        if self.top_k < 0:
            yield f"top_k is {self.top_k}; expected 0 (no limit) or more"
        if unknown := set(self.omit) - set(_OMITTABLE):
            yield f"omit holds {sorted(unknown)[0]!r}; expected names among {', '.join(_OMITTABLE)}"

    def _faults_if_local(self) -> Iterator[str]:
        if not self.local_name.strip():
            yield "endpoint is 'local:'; expected a model after it, such as local:gemma3-270m"
        if self.omit or self.extra_body or self.azure_api_version:
            yield "omit, extra_body and azure_api_version are for endpoints; this target is local"
        if self.chat == ChatMode.NEVER and not self.templates:
            yield "chat=never asks through plain templates; give templates.default, or choose chat=auto"

    def _faults_if_remote(self) -> Iterator[str]:
        parts = urlsplit(self.endpoint)
        if parts.username or parts.password or parts.query:  # which must not be shown
            yield "the endpoint's URL holds a password or a query; give the key by environment or file"
        elif parts.scheme not in ("http", "https") or not parts.hostname:
            yield f"endpoint is {self.endpoint!r}; expected http(s)://HOST/… or local:MODEL"
        if not self.model.strip():
            yield "model is empty; name the model that the endpoint is to ask"
        if self.chat != ChatMode.AUTO:
            yield f"chat={self.chat} is for local targets; an endpoint is told by api=chat or api=completions"
        if self.templates and self.api is Api.CHAT:
            yield "templates are for plain text; set api=completions, or leave them out"
        if not self.templates and self.api is Api.COMPLETIONS and self.logprobs.of_texts is PromptScores.NONE:
            yield "api=completions needs templates.default, which makes text of the messages"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Of one run, beside the settings that say what is asked.

    Attributes:
        key_file: holds the endpoint's key; else the environment does.
        prices: price table in YAML; without it, costs are 0.
        max_cost: hard stop, in the currency of the price table, over all runs on the same ledger.
        max_requests: hard stop on requests sent, those that failed included, over all runs on the same ledger.
        retry_failed: ask again what failed for good in an earlier run.
        batch: through the endpoint's batch interface.

    Raises:
        ConfigError: a negative limit, or a limit on costs without prices.
    """

    key_file: Path | None = None
    prices: Path | None = None
    max_cost: float | None = None
    max_requests: int | None = None
    retry_failed: bool = False
    batch: bool = False

    def __post_init__(self) -> None:
        limits = {"max_cost": self.max_cost, "max_requests": self.max_requests}
        faults = [f"{name} is {limit}; expected 0 or more" for name, limit in limits.items() if (limit or 0) < 0]
        if self.max_cost is not None and self.prices is None:
            faults.append("max_cost needs a price table; give one with prices")
        refuse(faults)


@dataclass(frozen=True, kw_only=True)
class Price:
    """In any one currency, for a million tokens."""

    input: float
    output: float

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (self.input * prompt_tokens + self.output * completion_tokens) / _MILLION


def read_price(path: Path | None, model: str) -> Price:
    """The price of a model from a YAML table: ``MODEL: {input: …, output: …}``, for a million tokens; 0 without one.

    Raises:
        ConfigError: no such file, no such model in it, or not such a table.
    """
    if path is None:
        return Price(input=0.0, output=0.0)
    import yaml

    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"price table {path} cannot be read: {first_line(error)}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"price table {path} is not YAML: {first_line(error)}") from None
    if not isinstance(table, dict) or model not in table:
        known = ", ".join(map(str, table)) if isinstance(table, dict) else "nothing"
        raise ConfigError(f"price table {path} has no price for {model!r}; it has {known}")
    entry = table[model]
    whole = isinstance(entry, dict) and len(entry) == 2
    prices: list[Any] = [entry.get(name) for name in ("input", "output")] if whole else [None]
    if not all(isinstance(price, int | float) and price >= 0 for price in prices):
        raise ConfigError(f"price table {path}: {model} is {entry!r}; expected input and output, for a million tokens")
    return Price(input=float(prices[0]), output=float(prices[1]))
