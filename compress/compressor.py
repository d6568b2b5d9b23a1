"""The compressor, as users meet it."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from terselm.compress.engine.reader import ScoreReader
from terselm.compress.engine.surprisal import SurprisalEngine, require_attention
from terselm.compress.length import Count, Length, lengths_of, resolve_counter
from terselm.compress.pipeline import Pipeline
from terselm.compress.prompt import Keep, Prompt, compile_keep
from terselm.compress.result import CompressionResult
from terselm.compress.settings import CompressionSettings
from terselm.models import CausalLM, load_causal_lm

if TYPE_CHECKING:
    from terselm.compress.messages import ChatResult


class Wishes(TypedDict, total=False):
    """How long one compressed prompt may be, and what must survive; see `PromptCompressor.compress_batch`.

    Attributes:
        budget: tokens allowed, as ``counter`` counts them.
        rate: instead, the fraction of the tokens to keep, in (0, 1].
        keep: what must survive.
        counter: how tokens are counted; by default as the small LM does.
    """

    budget: int | None
    rate: float | None
    keep: Sequence[Keep]
    counter: Count | str | None


class PromptCompressor:
    """Shortens prompts with a small LM.

    Args:
        lm: the small LM.
        settings: how to compress.

    Raises:
        ModelError: a model with recurrent layers, or one whose logits are not made as usual; see `OutputHead`.
        ConfigError: ``rank_by`` is ``utility``, but the small LM has no utility head.
    """

    def __init__(self, lm: CausalLM, *, settings: CompressionSettings | None = None) -> None:
        require_attention(lm)
        self.settings = settings or CompressionSettings()
        self.lm = lm
        self._engine = SurprisalEngine(lm)
        self._reader = ScoreReader(self._engine, self.settings.cache_bytes)
        self._pipeline = Pipeline(lm, self.settings, self._reader)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, device: str = "auto", dtype: str = "auto", settings: CompressionSettings | None = None
    ) -> PromptCompressor:
        """Load the small LM by alias, folder, run folder, adapter or hub id; see `load_causal_lm`."""
        return cls(load_causal_lm(name, device=device, dtype=dtype), settings=settings)

    def with_settings(self, settings: CompressionSettings) -> PromptCompressor:
        """The same small LM under other settings; what it has read stays known, so ``cache_bytes`` is as before."""
        other = copy.copy(self)
        other.settings = settings
        other._pipeline = Pipeline(self.lm, settings, self._reader)
        return other

    def compress(
        self,
        *,
        instruction: str = "",
        demonstrations: Sequence[str] = (),
        question: str = "",
        pinned: Sequence[int] = (),
        **wishes: Unpack[Wishes],
    ) -> CompressionResult:
        """Compress one prompt; see `Prompt`, `Wishes` and `compress_batch`."""
        prompt = Prompt(instruction=instruction, demonstrations=demonstrations, question=question, pinned=pinned)
        return self.compress_batch([prompt], **wishes)[0]

    def compress_text(self, text: str, *, question: str = "", **wishes: Unpack[Wishes]) -> CompressionResult:
        """Compress a text that has no parts: it is treated as one demonstration. See `Wishes`.

        Args:
            question: what will be asked about it, so that the answer stays; it is not in the compressed text.
        """
        return self.compress_batch([Prompt(demonstrations=[text], ranked_for=question)], **wishes)[0]

    def compress_messages(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        question: str = "",
        budget: int | None = None,
        rate: float | None = None,
        keep: Sequence[Keep] = (),
        counter: Count | str | None = None,
    ) -> ChatResult:
        """Compress chat messages in OpenAI's form; roles, names, tool calls and attachments stay as they are.

        The system's first message is the instruction, the user's last one the question, each turn between them a
        demonstration. See `Wishes` and `compress_batch`; the budget is for all texts together.

        Args:
            question: what turns are ranked for where that is not the user's last text.
        """
        from terselm.compress.messages import compress_chat

        count = resolve_counter(counter)
        return compress_chat(
            messages,
            Length(budget=budget, rate=rate),
            count=count or self._pipeline.count,
            compress=lambda prompt, tokens: self.compress_batch(
                [replace(prompt, ranked_for=question)], budget=tokens, keep=keep, counter=count
            )[0],
            layout_of=lambda prompt: self._pipeline.layouts.make([prompt], compile_keep(keep))[0],
        )

    def compress_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        budget: int | Sequence[int] | None = None,
        rate: float | Sequence[float] | None = None,
        lengths: Sequence[Length] | None = None,
        keep: Sequence[Keep] = (),
        counter: Count | str | None = None,
    ) -> list[CompressionResult]:
        """Compress many prompts together.

        Args:
            budget: tokens allowed, as ``counter`` counts them; one number for all prompts or one for each.
            rate: instead, the fraction of each prompt's tokens to keep, in (0, 1].
            lengths: instead, a budget or a rate for each prompt.
            keep: what must survive: literal strings, compiled regular expressions, `Preset`.
            counter: tokens of a text as the caller counts them: a name (``cl100k_base``, ``gpt-4o``, what
                `load_tokenizer` takes) or a callable; by default the small LM's.

        Raises:
            PromptError: a prompt is empty.
            BudgetError: both or neither of budget and rate, one out of range, or a budget that cannot be met.
            ConfigError: an unusable ``keep``.
            ContextLengthError: a segment that does not fit into the model's window.
        """
        each = lengths_of(len(prompts), budget, rate, lengths)
        return self._pipeline.run(prompts, each, compile_keep(keep), resolve_counter(counter))

    def warm_up(
        self,
        prompts: Sequence[Prompt] = (),
        *,
        budget: int | Sequence[int] | None = None,
        rate: float | Sequence[float] | None = None,
    ) -> float:
        """Do now what would slow the first prompts down: set libraries up and, on a GPU, record passes.

        A pass is recorded once for each shape, about a tenth of a second each on an H200, so warm up with prompts as
        long, and as many at once, as those that will come. Nothing of them is remembered.

        Args:
            prompts: compressed together, twice; by default one few-shot prompt of 2,000 tokens.
            budget, rate: see `compress_batch`; by default a rate of 0.1.

        Returns:
            the seconds that it took.
        """
        started = time.perf_counter()
        if not prompts:
            usual = files("terselm.data") / "sample/prompts/few_shot_maths.json"
            prompts = [Prompt(**json.loads(usual.read_text("utf-8")))]
        if budget is None and rate is None:
            rate = 0.1
        other = copy.copy(self)
        other._pipeline = Pipeline(self.lm, self.settings, ScoreReader(self._engine, 0))
        for _ in range(2):
            other.compress_batch(prompts, budget=budget, rate=rate)
        return time.perf_counter() - started
