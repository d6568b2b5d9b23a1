"""What is still to be used: tokens and cost, as expected and at most."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, linear_regression, stdev
from typing import TypeVar

from terselm.data.collection.admission import PromptSizes, prompt_bytes
from terselm.data.collection.collect import ask, open_run, plan_collection, still_waiting
from terselm.data.collection.ledger import Use
from terselm.data.collection.plan import Request, local_prompt
from terselm.data.collection.settings import CollectSettings, Options, Price, read_price
from terselm.data.instructions import Instruction
from terselm.errors import ConfigError

BYTES_PER_TOKEN = 4.0  # of English, where nothing better is known
_TWO_SIDED = 1.96  # standard errors in a 95% interval
_LEAST = 8  # answers from which a mean is worth something
_Known = tuple[Request, Use]  # an answered request
Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Guess:
    """A sum over the requests that are still to be asked.

    Attributes:
        expected: None where nothing is known to expect it from.
        low, high: 95% interval of the expectation, as far as chance goes.
        at_most: it cannot be more, unless requests fail after they were charged.
    """

    expected: float | None
    low: float | None
    high: float | None
    at_most: float


@dataclass(frozen=True, kw_only=True)
class CostEstimate:
    """What the rest of a collection will use.

    Attributes:
        requests: still to be asked.
        answers_known: answers of the same target, with the same settings but for the seed, that it is judged by.
        prompt_basis: ``tokenizer`` (exact), ``answers`` (tokens per byte of the prompts known), or ``bytes`` (rough).
    """

    requests: int
    answers_known: int
    prompt_basis: str
    prompt_tokens: Guess
    completion_tokens: Guess
    cost: Guess


def estimate(
    instructions: Sequence[Instruction],
    out: Path,
    settings: CollectSettings,
    options: Options | None = None,
    *,
    pilot: int = 0,
) -> CostEstimate:
    """Judge by the answers that the ledger has what the others will take.

    Args:
        pilot: ask so many requests first, of all kinds that are waiting; they are paid for, and count.

    Raises:
        ConfigError: as `collect`; or ``pilot`` is negative.
    """
    options = options or Options()
    price = read_price(options.prices, settings.target)
    requests = plan_collection(instructions, out, settings)
    if pilot < 0:
        raise ConfigError(f"pilot is {pilot}; expected 0 or more requests")
    with open_run(out, requests) as ledger:
        if pilot:
            ask(ledger, _spread(still_waiting(ledger, requests), pilot, settings.seed), settings, options)
        uses = ledger.uses()
        known = [(request, uses[request.id]) for request in requests if request.id in uses]
        waiting = still_waiting(ledger, requests)
    return estimate_requests(known, waiting, settings, price)


def estimate_requests(
    known: Sequence[_Known], waiting: Sequence[Request], settings: CollectSettings, price: Price
) -> CostEstimate:
    """What requests will use, judged by those that are answered.

    Args:
        known: answered ones, with what they have used.
        waiting: still to be asked.
        settings: of both.
        price: of the target.
    """
    basis, prompt = _prompts(known, waiting, settings)
    completion = _completions(known, waiting, settings)
    return CostEstimate(
        requests=len(waiting),
        answers_known=len(known),
        prompt_basis=basis,
        prompt_tokens=prompt,
        completion_tokens=completion,
        cost=cost_of(price, prompt, completion),
    )


def cost_of(price: Price, prompt: Guess, completion: Guess) -> Guess:
    """Of tokens read and written."""
    return Guess(
        expected=_cost(price, prompt.expected, completion.expected),
        low=_cost(price, prompt.low, completion.low),
        high=_cost(price, prompt.high, completion.high),
        at_most=price.cost(round(prompt.at_most), round(completion.at_most)),
    )


def systematic_sample(ordered: Sequence[Item], count: int, seed: int) -> list[Item]:
    """As many, or all, at equal distances from a random start: what is alike stands together and takes its share."""
    count, start = min(count, len(ordered)), random.Random(seed).random()
    return [ordered[int((index + start) * len(ordered) / count)] for index in range(count)]


def _spread(waiting: Sequence[Request], count: int, seed: int) -> list[Request]:
    """Answers to the same kind of prompt are alike in length."""
    ordered = sorted(waiting, key=lambda r: (r.temperature, r.instruction.category or "", _bytes(r), r.id))
    return systematic_sample(ordered, count, seed)


def _cost(price: Price, prompt: float | None, completion: float | None) -> float | None:
    return None if prompt is None or completion is None else price.cost(round(prompt), round(completion))


def _most_draws(request: Request, settings: CollectSettings) -> int:
    return settings.attempts if settings.is_local and request.temperature > 0 else 1


def _completions(known: Sequence[_Known], waiting: Sequence[Request], settings: CollectSettings) -> Guess:
    """Greedy and sampled answers apart, as far as there are enough of both: they differ in length and in draws."""
    at_most = sum(settings.max_new_tokens * _most_draws(request, settings) for request in waiting)
    if not waiting:
        return Guess(expected=0, low=0, high=0, at_most=0)
    expected = variance = 0.0
    for sampled in (False, True):
        count = sum((request.temperature > 0) is sampled for request in waiting)
        own = [use.completion_tokens for request, use in known if (request.temperature > 0) is sampled]
        own = own if len(own) >= _LEAST else [use.completion_tokens for _, use in known]
        if count and len(own) < 2:
            return Guess(expected=None, low=None, high=None, at_most=at_most)
        if count:
            expected += count * fmean(own)
            variance += (count**2 / len(own) + count) * stdev(own) ** 2
    spread = _TWO_SIDED * math.sqrt(variance)
    return Guess(
        expected=expected, low=max(0.0, expected - spread), high=min(at_most, expected + spread), at_most=at_most
    )


def _prompts(known: Sequence[_Known], waiting: Sequence[Request], settings: CollectSettings) -> tuple[str, Guess]:
    at_most: float
    if settings.is_local:
        lengths = _local_lengths(waiting, settings)
        draws = {
            sampled: fmean([use.draws for request, use in known if (request.temperature > 0) is sampled] or [1])
            for sampled in (False, True)
        }
        expected = sum(length * draws[r.temperature > 0] for r, length in zip(waiting, lengths, strict=True))
        at_most = sum(length * _most_draws(r, settings) for r, length in zip(waiting, lengths, strict=True))
        return "tokenizer", Guess(expected=expected, low=expected, high=expected, at_most=at_most)
    sizes = PromptSizes()
    for request, use in known:
        sizes.learn(request.instruction.messages, use.prompt_tokens)
    at_most = sum(sizes.bound(request.instruction.messages) for request in waiting)
    pairs = [(_bytes(request), use.prompt_tokens) for request, use in known if use.prompt_tokens]
    if len(pairs) < 2:
        expected = sum(_bytes(request) / BYTES_PER_TOKEN for request in waiting)
        return "bytes", Guess(expected=expected, low=expected, high=at_most, at_most=at_most)
    sizes_known, tokens = zip(*pairs, strict=True)
    alike = len(set(sizes_known)) == 1
    # Tokens per byte, and what the endpoint's template adds to each prompt.
    slope, start = (0.0, fmean(tokens)) if alike else linear_regression(sizes_known, tokens)
    expected = sum(start + slope * _bytes(request) for request in waiting)
    return "answers", Guess(expected=expected, low=expected, high=expected, at_most=at_most)


def _local_lengths(waiting: Sequence[Request], settings: CollectSettings) -> list[int]:
    from terselm.models import load_tokenizer

    tokenizer = load_tokenizer(settings.local_name)
    prompts = [local_prompt(request, tokenizer) for request in waiting]
    plain = [prompt for prompt in prompts if isinstance(prompt, str)]
    lengths = iter(tokenizer(plain, add_special_tokens=False).input_ids if plain else [])
    return [1 + len(next(lengths)) if isinstance(prompt, str) else len(prompt) for prompt in prompts]


def _bytes(request: Request) -> int:
    return prompt_bytes(request.instruction.messages)
