"""Batched decoding in which every row has its own temperature, seed and stop strings.

A row's random numbers depend on its seed alone, so that in float32 its answer does not depend on the rows beside it.
In bfloat16 it can: sums are rounded otherwise in another batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from terselm.errors import ContextLengthError
from terselm.models import CausalLM

if TYPE_CHECKING:
    from torch import Generator, Tensor

_COMPACT_AT = 0.75
"""Finished rows leave the batch once at most this share of it is alive: dropping a row copies the whole cache."""


@dataclass(frozen=True, kw_only=True)
class Query:
    """One prompt, as the model reads it, and how to answer it.

    Attributes:
        prompt: plain text, without BOS.
        temperature: 0 is greedy.
        stop: the answer ends before the first of these.
    """

    prompt: str
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


def encode(lm: CausalLM, prompt: str, max_new_tokens: int) -> list[int]:
    """Token ids of a prompt after the start token.

    Raises:
        ContextLengthError: prompt and answer do not fit into the model's window.
    """
    ids = [lm.start_id, *lm.tokenizer(prompt, add_special_tokens=False).input_ids]
    if len(ids) + max_new_tokens > lm.window:
        raise ContextLengthError(
            f"a prompt of {len(ids)} tokens and an answer of up to {max_new_tokens} do not fit into the window of "
            f"{lm.window} tokens of {lm.name}; shorten the prompt or lower max_new_tokens"
        )
    return ids


def generate(lm: CausalLM, queries: Sequence[Query], limits: Limits) -> list[Answer]:
    """Answer all queries in one batch.

    Raises:
        ContextLengthError: a prompt and its answer do not fit into the model's window.
    """
    import torch

    from terselm.models.reading import cache_argument, cache_of

    pieces: dict[int, str] = {}
    rows = [_Row(lm, query, limits, pieces) for query in queries]
    alive, cache = rows, None
    ids, mask = _left_pad([row.prompt for row in rows], lm)  # (B, P) each
    with torch.inference_mode():
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
            chosen = _choose(out.logits[:, -1].float(), alive, limits)  # (B,)
            for row, token in zip(alive, chosen.tolist(), strict=True):
                row.take(token)
            cache = cache_of(out)
            keep = [index for index, row in enumerate(alive) if row.finish_reason is None]
            if not keep:
                return [row.answer() for row in rows]
            if len(keep) <= _COMPACT_AT * len(alive):
                kept = torch.tensor(keep, device=ids.device)
                cache.batch_select_indices(kept)
                alive, mask, chosen = [alive[index] for index in keep], mask[kept], chosen[kept]
            ids = chosen[:, None]
            mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)


@dataclass
class _Row:
    """A query on its way."""

    lm: CausalLM
    query: Query
    limits: Limits
    pieces: dict[int, str]
    """Text of single tokens, shared by all rows."""
    prompt: list[int] = field(init=False)
    generator: Generator = field(init=False)
    ends: set[int] = field(init=False)
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None

    def __post_init__(self) -> None:
        import torch

        self.prompt = encode(self.lm, self.query.prompt, self.limits.max_new_tokens)
        # With a whole vocabulary to draw from, the numbers are too many to be carried to a GPU.
        device = "cpu" if self.limits.top_k else self.lm.model.device
        self.generator = torch.Generator(device=device).manual_seed(self.query.seed)
        self.ends = _end_ids(self.lm)
        # A token is at least a byte, so a stop string that has just been completed lies within so many tokens.
        self._tail = max((len(stop.encode()) for stop in self.query.stop), default=0) + 1
        self._lasts = {stop[-1] for stop in self.query.stop}

    def take(self, token: int) -> None:
        if self.finish_reason is not None:
            return
        self.tokens.append(token)
        if token in self.ends or (self._may_stop(token) and self._stops(self.tokens[-self._tail :])):
            self.finish_reason = "stop"
        elif len(self.tokens) == self.limits.max_new_tokens:
            self.finish_reason = "length"

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
        if token not in self.pieces:
            self.pieces[token] = self._text([token])
        piece = self.pieces[token]
        # A tokenizer may drop the space at the start of a text, and show a part of a character as U+FFFD.
        return " " in self._lasts or "\ufffd" in piece or not self._lasts.isdisjoint(piece)

    def _stops(self, tokens: list[int]) -> bool:
        text = self._text(tokens)
        return any(stop in text for stop in self.query.stop)

    def _text(self, tokens: list[int]) -> str:
        return str(self.lm.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _choose(logits: Tensor, rows: Sequence[_Row], limits: Limits) -> Tensor:
    """The next token of each row: the likeliest, or one drawn.

    Args:
        logits: ``(B, V)`` float32.
    Returns:
        ``(B,)`` int64.
    """

    chosen = logits.argmax(-1)
    sampled = [index for index, row in enumerate(rows) if row.query.temperature > 0]
    if sampled:
        temperatures = logits.new_tensor([rows[index].query.temperature for index in sampled])
        generators = [rows[index].generator for index in sampled]
        chosen[sampled] = _draw(logits[sampled], temperatures[:, None], generators, limits)
    return chosen


def _draw(logits: Tensor, temperatures: Tensor, generators: Sequence[Generator], limits: Limits) -> Tensor:
    """By the Gumbel-max trick: unlike a draw from sums of probabilities, rounding hardly ever turns it.

    Args:
        logits: ``(S, V)`` float32.
        temperatures: ``(S, 1)``.
    Returns:
        ``(S,)`` int64.
    """
    import torch

    count = min(limits.top_k or logits.shape[1], logits.shape[1])
    top, tokens = logits.topk(count)  # (S, K), descending
    log_p = (top / temperatures).log_softmax(-1)
    before = log_p.exp().cumsum(-1) - log_p.exp()
    log_p = log_p.masked_fill(before >= limits.top_p, float("-inf"))
    noise = torch.stack([torch.rand(count, generator=g, device=g.device) for g in generators])
    gumbel = -(-noise.clamp(min=1e-20).log()).log()
    best = (log_p + gumbel.to(log_p.device)).argmax(-1, keepdim=True)
    return tokens.gather(1, best)[:, 0]


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


def _end_ids(lm: CausalLM) -> set[int]:
    """What ends an answer: a chat model names the end of a turn in its settings, besides the end of text."""
    ends: Any = lm.model.generation_config.eos_token_id
    return {lm.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
