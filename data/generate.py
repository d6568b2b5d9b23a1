"""Answers of a local model to many queries at once, in which every row has its own temperature, seed and stop strings.

Two ways lead to the same answers, up to rounding: `slots` for a GPU, and the plain loop below for every model. A row's
random numbers depend on its seed, the step and the token alone: they are hashes of the three, not the output of a
generator that a batch would share. So in float32 an answer does not depend on the rows beside it, on the order in which
rows are decoded, or on the device. In bfloat16 it can: sums are rounded otherwise in another batch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from terselm.errors import ContextLengthError
from terselm.models import CausalLM

if TYPE_CHECKING:
    from torch import Tensor

_log = logging.getLogger(__name__)
_COMPACT_AT = 0.75
"""Finished rows leave the batch once at most this share of it is alive: dropping a row copies the whole cache."""


class Engine(StrEnum):
    """What decodes: ``auto`` takes the slots on a GPU where the model suits them, else the loop."""

    AUTO = "auto"
    LOOP = "loop"
    SLOTS = "slots"


def generate(
    lm: CausalLM, queries: Sequence[Query], limits: Limits, *, engine: Engine | str = Engine.AUTO
) -> list[Answer]:
    """Answer all queries; the loop takes them as one batch.

    Raises:
        ContextLengthError: a prompt and its answer do not fit into the model's window.
        torch.OutOfMemoryError: too many queries for the loop, or no memory for a single slot.
    """
    answers = dict(_each(lm, queries, limits, Engine(engine)))
    return [answers[index] for index in range(len(queries))]


def _each(lm: CausalLM, queries: Sequence[Query], limits: Limits, engine: Engine) -> Iterator[tuple[int, Answer]]:
    """Each answer with the index of its query."""
    if engine is Engine.AUTO:
        engine = Engine.SLOTS if lm.model.device.type == "cuda" else Engine.LOOP
    if engine is Engine.SLOTS:
        from terselm.data.slots import UnsuitableModelError, decode

        try:
            yield from decode(lm, queries, limits)
            return
        except UnsuitableModelError as error:  # before the first answer
            _log.warning("%s is decoded step by step, which is slower: %s", lm.name, error)
    yield from _loop(lm, queries, limits)


def _loop(lm: CausalLM, queries: Sequence[Query], limits: Limits) -> Iterator[tuple[int, Answer]]:
    """One batch, padded on the left, in which the host looks at every token."""
    import torch

    if not queries:
        return
    replies = start_replies(lm, queries, limits)
    with torch.inference_mode():
        _decode(lm, list(replies), limits)
    for index, reply in enumerate(replies):
        yield index, reply.answer()


def _decode(lm: CausalLM, alive: list[Reply], limits: Limits) -> None:
    import torch

    from terselm.models.reading import cache_argument, cache_of

    cache = None
    ids, mask = _left_pad([reply.prompt for reply in alive], lm)  # (B, P) each
    draws = Draws.of([reply.query for reply in alive], ids.device)
    sampled = any(reply.query.temperature > 0 for reply in alive)
    while True:
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = lm.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **cache_argument(lm.model, cache),
        )
        cache = cache_of(out)
        chosen = choose(out.logits[:, -1].float(), draws, limits, sampled=sampled)  # (B,)
        draws.steps.add_(1)
        for reply, token in zip(alive, chosen.tolist(), strict=True):
            reply.take(token)
        keep = [index for index, reply in enumerate(alive) if reply.finish_reason is None]
        if not keep:
            return
        if len(keep) <= _COMPACT_AT * len(alive):
            kept = torch.tensor(keep, device=ids.device)
            cache.batch_select_indices(kept)
            alive, draws = [alive[index] for index in keep], draws.of_rows(kept)
            mask, chosen = mask[kept], chosen[kept]
        ids = chosen[:, None]
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)


def _left_pad(prompts: Sequence[Sequence[int]], lm: CausalLM) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, ``(B, P)`` int64 each; the padding is masked, so its id does not matter."""
    import torch

    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), lm.start_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids.to(lm.model.device), mask.to(lm.model.device)


@dataclass(frozen=True, kw_only=True)
class Query:
    """One prompt, as the model reads it, and how to answer it.

    Attributes:
        prompt: plain text, without BOS; or token ids, read exactly as they are (as `chat_prompt` gives them).
        temperature: 0 is greedy.
        seed: of the answer's random numbers; any whole number.
        stop: the answer ends before the first of these.
    """

    prompt: str | tuple[int, ...]
    temperature: float
    seed: int
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What all rows of a batch share; ``top_k`` 0 is no limit. Nucleus sampling follows top-k."""

    max_new_tokens: int
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the model said; the stop string or end token counts among the tokens but is not in the text."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


def encode(lm: CausalLM, prompt: str | tuple[int, ...], max_new_tokens: int) -> list[int]:
    """Token ids of a prompt: of a text after the start token.

    Raises:
        ContextLengthError: prompt and answer do not fit into the model's window.
    """
    if isinstance(prompt, str):
        ids = [lm.start_id, *lm.tokenizer(prompt, add_special_tokens=False).input_ids]
    else:
        ids = list(prompt) or [lm.start_id]
    if len(ids) + max_new_tokens > lm.window:
        raise ContextLengthError(
            f"a prompt of {len(ids)} tokens and an answer of up to {max_new_tokens} do not fit into the window of "
            f"{lm.window} tokens of {lm.name}; shorten the prompt or lower max_new_tokens"
        )
    return ids


def start_replies(lm: CausalLM, queries: Sequence[Query], limits: Limits) -> list[Reply]:
    """An empty reply to each query.

    Raises:
        ContextLengthError: a prompt and its answer do not fit into the model's window.
    """
    pieces: dict[int, str] = {}
    ends = _end_ids(lm)
    return [Reply(lm, query, limits, pieces, ends) for query in queries]


class Reply:
    """The answer to a query, as it grows.

    Attributes:
        query: what is answered.
        prompt: token ids.
        tokens: of the answer so far.
        finish_reason: ``stop``, ``length``, or None while the answer grows.
    """

    def __init__(self, lm: CausalLM, query: Query, limits: Limits, pieces: dict[int, str], ends: set[int]) -> None:
        self.query = query
        self.prompt = encode(lm, query.prompt, limits.max_new_tokens)
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self._tokenizer = lm.tokenizer
        self._most = limits.max_new_tokens
        self._pieces = pieces  # texts of single tokens, shared by all replies
        self._ends = ends
        # A token is at least a byte, so a stop string that has just been completed lies within so many tokens.
        self._tail = max((len(stop.encode()) for stop in query.stop), default=0) + 1
        self._lasts = {stop[-1] for stop in query.stop}

    def take(self, token: int) -> None:
        """Add a token; does nothing once the reply is finished."""
        if self.finish_reason is not None:
            return
        self.tokens.append(token)
        if token in self._ends or (self._may_stop(token) and self._stops(self.tokens[-self._tail :])):
            self.finish_reason = "stop"
        elif len(self.tokens) == self._most:
            self.finish_reason = "length"

    def afresh(self) -> Reply:
        """The same, with nothing answered."""
        self.tokens, self.finish_reason = [], None
        return self

    def answer(self) -> Answer:
        text = self._text(self.tokens)
        for stop in self.query.stop:
            text = text.split(stop, 1)[0]
        return Answer(
            text=text.strip().rstrip("\ufffd"),  # the last token may hold but a part of a character
            finish_reason=str(self.finish_reason),
            prompt_tokens=len(self.prompt),
            completion_tokens=len(self.tokens),
        )

    def _may_stop(self, token: int) -> bool:
        """Whether a stop string's last character may be in this token: looking closer takes long in large batches."""
        if not self._lasts:
            return False
        if token not in self._pieces:
            self._pieces[token] = self._text([token])
        piece = self._pieces[token]
        # A tokenizer may drop the space at the start of a text, and show a part of a character as U+FFFD.
        return " " in self._lasts or "\ufffd" in piece or not self._lasts.isdisjoint(piece)

    def _stops(self, tokens: list[int]) -> bool:
        text = self._text(tokens)
        return any(stop in text for stop in self.query.stop)

    def _text(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _end_ids(lm: CausalLM) -> set[int]:
    """What ends an answer: a chat model names the end of a turn in its settings, besides the end of text."""
    ends: Any = lm.model.generation_config.eos_token_id
    return {lm.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}


@dataclass(frozen=True, kw_only=True)
class Draws:
    """How the rows of a batch draw their tokens, on the model's device.

    Attributes:
        temperatures: ``(B,)`` float32; 0 is greedy.
        keys: ``(B, 2)`` int32, of the rows' seeds.
        steps: ``(B,)`` int32, tokens that each row has drawn.
    """

    temperatures: Tensor
    keys: Tensor
    steps: Tensor

    @classmethod
    def of(cls, queries: Iterable[Query], device: Any) -> Draws:
        """For rows that have drawn nothing yet."""
        import torch

        queries = list(queries)
        return cls(
            temperatures=torch.tensor([query.temperature for query in queries], device=device),
            keys=torch.tensor([_key(query.seed) for query in queries], dtype=torch.int32, device=device),
            steps=torch.zeros(len(queries), dtype=torch.int32, device=device),
        )

    def of_rows(self, rows: Tensor) -> Draws:
        """Those of some rows."""
        return Draws(temperatures=self.temperatures[rows], keys=self.keys[rows], steps=self.steps[rows])


def choose(logits: Tensor, draws: Draws, limits: Limits, *, sampled: bool) -> Tensor:
    """The next token of each row: the likeliest, or one drawn by the Gumbel-max trick.

    Unlike a draw from sums of probabilities, rounding hardly ever turns it. Nothing here waits for the device, so that
    it can be captured.

    Args:
        logits: ``(B, V)`` float32.
        sampled: whether a row of the batch has a temperature; else nothing is drawn.
    Returns:
        ``(B,)`` int64.
    """
    import torch

    likeliest = logits.argmax(-1)
    if not sampled:
        return likeliest
    size = logits.shape[1]
    if limits.top_k or limits.top_p < 1:
        top, tokens = logits.topk(min(limits.top_k or size, size))  # (B, K), descending
    else:
        top, tokens = logits, torch.arange(size, device=logits.device)[None]
    log_p = (top / draws.temperatures.clamp(min=1e-6)[:, None]).log_softmax(-1)
    if limits.top_p < 1:
        before = log_p.exp().cumsum(-1) - log_p.exp()
        log_p = log_p.masked_fill(before >= limits.top_p, float("-inf"))
    best = (log_p - _log_waits(draws, tokens)).argmax(-1, keepdim=True)
    drawn = tokens.expand_as(log_p).gather(1, best)[:, 0]
    return torch.where(draws.temperatures > 0, drawn, likeliest)


def _log_waits(draws: Draws, tokens: Tensor) -> Tensor:
    """Logarithms of exponentially distributed numbers, one for each token of each row; the negative is Gumbel's.

    Args:
        tokens: ``(B, K)`` or ``(1, K)``.
    Returns:
        ``(B, K)`` float32.
    """
    import torch

    row = _scramble(_scramble(draws.steps + draws.keys[:, 0]) ^ draws.keys[:, 1])[:, None]  # (B, 1)
    numbers = _scramble(_scramble(tokens.to(torch.int32) ^ row) + row)
    # From (0, 1], finely graded towards 0: those are the tokens that win.
    shares = ((numbers.float() + (2.0**31 + 0.5)) * 2.0**-32).clamp_(min=2.0**-33)
    return torch.log1p(shares.neg_()).neg_().log_()


def _scramble(numbers: Tensor) -> Tensor:
    """A permutation of int32 in which every bit depends on every bit (lowbias32 of C. Wellons); products wrap."""
    numbers = numbers ^ (numbers >> 16 & 0xFFFF)
    numbers = numbers.mul_(0x7FEB352D)
    numbers = numbers.bitwise_xor_(numbers >> 15 & 0x1FFFF)
    numbers = numbers.mul_(0x846CA68B - (1 << 32))
    return numbers.bitwise_xor_(numbers >> 16 & 0xFFFF)


def _key(seed: int) -> tuple[int, int]:
    """64 bits of a seed as two signed numbers, so mixed that neighbouring seeds have nothing in common (splitmix64)."""
    state = (seed + 1) * 0x9E3779B97F4A7C15 & (1 << 64) - 1
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
    state = (state ^ state >> 27) * 0x94D049BB133111EB & (1 << 64) - 1
    state ^= state >> 31
    high, low = state >> 32, state & 0xFFFFFFFF
    return high - (high >> 31 << 32), low - (low >> 31 << 32)
