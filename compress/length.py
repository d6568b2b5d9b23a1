"""The caller's tokens: how many a compressed prompt may have, how they are counted, and how its text is made to fit.

The last is Stage 3 (docs/algorithm.md, §3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from terselm.compress.layout import Layout, Mask
from terselm.errors import BudgetError, ConfigError, ModelError

if TYPE_CHECKING:
    from terselm.statistics import Floats, Ints

Count = Callable[[str], int]


@dataclass(frozen=True, kw_only=True)
class Length:
    """How long one compressed prompt may be: a budget or a rate.

    Attributes:
        budget: tokens allowed, as the caller counts them.
        rate: instead, the fraction to keep, in (0, 1].

    Raises:
        BudgetError: both, neither, or one out of its range.
    """

    budget: int | None = None
    rate: float | None = None

    def __post_init__(self) -> None:
        if (self.budget is None) == (self.rate is None):
            fault = "both a budget and a rate are" if self.budget is not None else "neither a budget nor a rate is"
            raise BudgetError(f"{fault} given; give exactly one of the two")
        if self.budget is not None and (
            isinstance(self.budget, bool) or not isinstance(self.budget, int) or self.budget < 1
        ):
            raise BudgetError(f"the budget is {self.budget!r}; expected a whole number of tokens, at least 1")
        if self.rate is not None and not 0 < self.rate <= 1:
            raise BudgetError(f"the rate is {self.rate!r}; expected a fraction in (0, 1]")

    def tokens(self, original: int, smallest: Callable[[], int]) -> int:
        """The budget for a prompt of ``original`` tokens.

        Args:
            smallest: tells the smallest budget that could work.

        Raises:
            BudgetError: the rate leaves not a single token.
        """
        if self.budget is not None:
            return self.budget
        assert self.rate is not None
        budget = math.floor(self.rate * original)
        if budget < min(1, original):
            least = max(1, smallest())
            message = f"a rate of {self.rate} leaves none of {original} tokens; the smallest budget that could work is"
            raise BudgetError(f"{message} {least}", smallest=least)
        return budget


def lengths_of(
    prompts: int,
    budget: int | Sequence[int] | None,
    rate: float | Sequence[float] | None,
    lengths: Sequence[Length] | None,
) -> Sequence[Length]:
    """One length a prompt, from one number for all, one number each, or ``lengths``.

    Raises:
        BudgetError: not as many as prompts, several of the three, or a number that `Length` refuses.
    """
    for name, each in (("budgets", budget), ("rates", rate), ("lengths", lengths)):
        if isinstance(each, Sequence) and len(each) != prompts:
            raise BudgetError(f"{len(each)} {name} for {prompts} prompts; give one number for all or one for each")
    if lengths is not None:
        if budget is not None or rate is not None:
            raise BudgetError("lengths are given beside a budget or a rate; give one of the three")
        return lengths
    budgets = budget if isinstance(budget, Sequence) else [budget] * prompts
    rates = rate if isinstance(rate, Sequence) else [rate] * prompts
    return [Length(budget=b, rate=r) for b, r in zip(budgets, rates, strict=True)]


def resolve_counter(counter: Count | str | None) -> Count | None:
    """A counter by name: a tiktoken encoding or OpenAI model, else whatever `load_tokenizer` takes.

    Args:
        counter: such as ``cl100k_base``, ``gpt-4o``, ``gemma3-270m``, a folder or a hub id; a callable, and None (the
            small LM's own), are given back.

    Raises:
        ModelError: no such tokenizer, or tiktoken could not get its vocabulary.
        ConfigError: neither a name nor a callable.
    """
    if counter is None or (callable(counter) and not isinstance(counter, str)):
        return counter
    if not isinstance(counter, str):
        raise ConfigError(f"counter is a {type(counter).__name__}; expected a tokenizer's name or a callable")
    if (encoding := _tiktoken_encoding(counter)) is not None:
        return lambda text: len(encoding.encode_ordinary(text))
    from terselm.models import load_tokenizer

    return TokenizerCounter(load_tokenizer(counter))


class TokenizerCounter:
    """Tokens of a text under a fast Hugging Face tokenizer; text that looks like a special token is ordinary text."""

    def __init__(self, tokenizer: Any) -> None:
        self.backend = plain_backend(tokenizer)

    def __call__(self, text: str) -> int:
        return len(self.backend.encode(text, add_special_tokens=False))

    def many(self, texts: Sequence[str]) -> list[int]:
        """The counts of several texts, in parallel."""
        return [len(encoding) for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def plain_backend(tokenizer: Any) -> Any:
    """A copy of a fast tokenizer's core that neither truncates, nor pads, nor sees special tokens in text."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def count_all(count: Count, texts: Sequence[str]) -> list[int]:
    """The counts of several texts, in parallel where the counter can."""
    return count.many(texts) if isinstance(count, TokenizerCounter) else [count(text) for text in texts]


def _tiktoken_encoding(name: str) -> Any:
    """tiktoken's encoding of that name or for that model; None where it knows neither."""
    try:
        import tiktoken
    except ImportError:
        if name.startswith(("cl100k", "o200k", "p50k", "r50k", "gpt-", "o1", "o3", "o4")):
            raise ModelError(f"counting as {name!r} does needs tiktoken; run: pip install tiktoken") from None
        return None
    try:
        encoding = name if name in tiktoken.list_encoding_names() else tiktoken.encoding_name_for_model(name)
    except KeyError:
        return None
    try:
        return tiktoken.get_encoding(encoding)
    except Exception as error:  # whatever its download meets: requests' errors, OSError, a wrong checksum
        raise ModelError(
            f"tiktoken could not get its vocabulary {encoding!r} ({type(error).__name__}); it downloads it once, or "
            "takes it from the folder in TIKTOKEN_CACHE_DIR"
        ) from None


class BudgetFit:
    """Drops the least certain units while over the budget, takes the best dropped ones back while well under it.

    Args:
        kept: ``(n_units,)``, the choice of Stage 2.
        margin: ``(n_units,)``, score − γ; NaN for units without one.
        spare: gives the units that did not take part in Stage 2, best first; taken back last.
        budget: in the caller's tokens.

    Attributes, final once `steps` has come to its end:
        kept: ``(n_units,)``.
        text, size: the text of what is kept, and its tokens, at most ``budget``.
    """

    def __init__(
        self, layout: Layout, kept: Mask, margin: Floats, spare: Callable[[], Ints], budget: int, count: Count
    ) -> None:
        self._layout = layout
        self._margin = margin
        self._spare = spare
        self._budget = budget
        self.count = count
        self.kept = kept.copy()
        self.text = layout.text(kept)
        self.size = 0

    def steps(self) -> Generator[str, int, None]:
        """Yields a text whenever one has to be counted; its tokens are sent back.

        Raises:
            BudgetError: no text can fit.
        """
        self.size = yield self.text
        if self.size > self._budget:
            yield from self._drop()
        if self._wants_more():
            yield from self._take_back()
        if not self.kept.any():
            raise self._nothing_fits()

    def _wants_more(self) -> bool:
        return self.size * 100 < self._budget * 98 or not self.kept.any()

    def _drop(self) -> Generator[str, int, None]:
        free = np.flatnonzero(self.kept & ~self._layout.protected)[::-1]  # of equals the later goes first
        worst = free[np.argsort(self._margin[free], kind="stable")]
        done = 0
        while self.size > self._budget:
            if done == len(worst) and not self._layout.protected.any():
                raise self._nothing_fits()
            if done == len(worst):
                raise BudgetError(
                    f"the protected text alone has {self.size} tokens, more than the budget of {self._budget}; "
                    f"raise the budget to {self.size} or protect less",
                    smallest=self.size,
                )
            step = self._first_step()
            self.kept[worst[done : done + step]] = False
            done = min(done + step, len(worst))
            self.text = self._layout.text(self.kept)
            self.size = yield self.text

    def _take_back(self) -> Generator[str, int, None]:
        dropped = np.flatnonzero(~self.kept & ~np.isnan(self._margin))
        candidates = dropped[np.argsort(-self._margin[dropped], kind="stable")]
        done, step, extended = 0, 0, False
        while self._wants_more():
            step = step or self._first_step()
            if done + step > len(candidates) and not extended:  # only now, since it may need the model
                candidates, extended = np.concatenate([candidates, self._spare()]), True
            if done == len(candidates):
                break
            chunk = candidates[done : done + step]
            self.kept[chunk] = True
            trial = self._layout.text(self.kept)
            size = yield trial
            if size <= self._budget:
                self.text, self.size = trial, size
                done += len(chunk)
                step = 0
                continue
            self.kept[chunk] = False
            if step == 1:
                done += 1
            else:
                step //= 2

    def _first_step(self) -> int:
        """As many units as make up half of the difference, if they are as long as those that are kept."""
        return max(1, abs(self._budget - self.size) * int(self.kept.sum()) // (2 * self.size)) if self.size else 1

    def _nothing_fits(self) -> BudgetError:
        smallest = smallest_budget(self._layout, self.count)
        return BudgetError(
            f"a budget of {self._budget} tokens holds nothing of this prompt; the smallest that could is {smallest}",
            smallest=smallest,
        )


def fit_all(fits: Sequence[BudgetFit]) -> None:
    """Run the steps of prompts that are counted alike together, so that their texts are counted together.

    Raises:
        BudgetError: for one of the prompts no text can fit.
    """
    running = [fit.steps() for fit in fits]
    texts = [next(steps) for steps in running]
    while running:
        going, asked = [], []
        for steps, size in zip(running, count_all(fits[0].count, texts), strict=True):
            try:
                asked.append(steps.send(size))
                going.append(steps)
            except StopIteration:
                continue
        running, texts = going, asked


def smallest_budget(layout: Layout, count: Count) -> int:
    """The least that a budget can be: the protected text, or where none is protected the cheapest single unit."""
    if layout.protected.any():
        return count(layout.text(layout.protected))
    units = zip(layout.piece_of, layout.starts, layout.ends, strict=True)
    return min(map(count, {layout.pieces[piece].text[start:end] for piece, start, end in units}))
