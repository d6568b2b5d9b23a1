"""How to compress: the settings, and what they leave open, decided by the prompt."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cache
from typing import Any

from terselm.compress.prompt import Prompt
from terselm.config import refuse
from terselm.errors import PromptError

PAPER_INSTRUCTION_RATE, PAPER_QUESTION_RATE = 0.85, 0.9
EXAMPLES_ANCHOR = 1.0  # see docs/results.md


class UnitKind(StrEnum):
    """The smallest thing that is kept or dropped."""

    AUTO = "auto"  # ranked for a question: sentences, or lines in logs, code and data; otherwise tokens
    TOKEN = "token"
    WORD = "word"
    SENTENCE = "sentence"  # of a demonstration; instruction and question are then cut into words
    LINE = "line"  # likewise
    DEMONSTRATION = "demonstration"  # likewise: each is kept whole or dropped


class AnchorOrder(StrEnum):
    """Which demonstrations are kept whole first."""

    AUTO = "auto"  # of worked examples the most similar to the question, one of each label, then the shortest
    LAST = "last"  # those next to the question
    SHORTEST = "shortest"  # as many as possible


class Order(StrEnum):
    """In which order the demonstrations stand in the compressed prompt."""

    ORIGINAL = "original"
    RANKED = "ranked"  # the best first
    FIRST_AND_LAST = "first_and_last"  # the best first, the second last, and so on: the middle is read least


class RankBy(StrEnum):
    """What decides which demonstrations stay, and which of their sentences or lines."""

    AUTO = "auto"  # see `CompressionSettings`
    SURPRISAL = "surprisal"  # what the small LM does not expect, as LLMLingua has it
    QUESTION = "question"  # how likely the small LM finds the question after it, as LongLLMLingua has it
    BM25 = "bm25"  # words that it shares with the question
    EMBEDDING = "embedding"  # how near its embedding is to the question's
    RERANKER = "reranker"  # what a cross-encoder says of it and the question
    UTILITY = "utility"  # how much a target needs it, as a small LM that was aligned for use has learnt


class Selection(StrEnum):
    """Which demonstrations Stage 1 lets through."""

    PERPLEXITY = "perplexity"  # the most surprising, as the paper has it
    RANDOM = "random"  # as many, in random order
    ALL = "all"  # every one


@dataclass(frozen=True, kw_only=True)
class Ablations:
    """Parts of the algorithm taken out, to measure what they bring; not for use.

    Attributes:
        selection: how demonstrations are selected.
        uniform_rates: instruction, demonstrations and question are all compressed at the same rate; with selection
            ``all`` the budget controller is gone.
        one_pass: tokens are scored given the whole text before them, none of it dropped, and each part is thinned at
            once rather than segment by segment.
        random_tokens: tokens are kept at random instead of by surprisal; the same prompt gives the same choice.
        next_token: a token is kept for the surprisal of the token after it, as the authors' package does.

    Raises:
        ConfigError: an unknown selection.

    Source: Table 3 of arXiv:2310.05736 (all but random demonstrations and next_token).
    """

    selection: Selection = Selection.PERPLEXITY
    uniform_rates: bool = False
    one_pass: bool = False
    random_tokens: bool = False
    next_token: bool = False

    def __post_init__(self) -> None:
        refuse(_to_enum(self, "selection", Selection))


@dataclass(frozen=True, kw_only=True)
class CompressionSettings:
    """The parameters of the algorithm.

    Attributes:
        k: granularity coefficient of the budget controller, above 0; demonstrations are selected until they hold k
            times the tokens that will be kept of them.
        instruction_rate: τ_ins in (0, 1], the kept fraction of the instruction; 1 protects it. None: it is kept whole
            where the budget holds instruction and question, else at the paper's 0.85.
        question_rate: τ_que in (0, 1], the kept fraction of the question; 1 protects it. None: it is kept whole where
            the budget holds it, else at the paper's 0.9.
        segment_size: tokens that are scored before the first of them are dropped, ≥ 1.
        separator: what joins instruction, demonstrations and question; may be empty.
        unit: the smallest thing that is kept or dropped.
        order: of the demonstrations, before Stage 2 reads them.
        rank_by: what demonstrations are ranked by. Unless it is ``surprisal`` or the unit a token or a word, their
            sentences or lines are ranked so, too, and taken whole, the best first. ``utility`` needs no question, but a
            small LM with a utility head. ``auto``: the question (``embedding`` where a ranker is named, else
            ``utility`` where the small LM has a head) where there is one, the demonstrations are not worked examples
            (see ``anchor``), and ``k``, the rates, ``segment_size``, ``unit``, ``order``, ``anchor``, ``anchor_by`` and
            ``ablations`` are as here; else surprisal.
        ranker: the model of ``embedding`` (by default ``minilm-l6``; or a folder or hub id of an encoder) or
            ``reranker`` (a folder or hub id of a cross-encoder).
        contrast: tokens or words are scored by how much less surprising the question makes them, instead of by
            surprisal, in one pass.
        rank_delta: δ in [0, 1]: what the best demonstration that takes part is kept above the common rate, and the
            last below it; those between by rank.
        anchor: share in [0, 1] of what the budget leaves for demonstrations that goes to some of them kept whole, and
            to the end of one more; 1 keeps nothing else. Small targets read that best. None: `EXAMPLES_ANCHOR` where
            the demonstrations are worked examples (see `Prompt.holds_worked_examples`), else, and with ablations, 0.
        anchor_by: which demonstrations these are; ``auto`` is ``shortest`` where ``anchor`` is given.
        cache_bytes: memory for surprisals of earlier prompts, so that repeated demonstrations are not read again.
        ablations: parts of the algorithm taken out.

    Raises:
        ConfigError: values out of their range; all of them are named.

    Source: §4 of arXiv:2310.05736, whose own are `paper_settings`.
    """

    k: float = 2.0
    instruction_rate: float | None = None
    question_rate: float | None = None
    segment_size: int = 100
    separator: str = "\n\n"
    unit: UnitKind = UnitKind.AUTO
    order: Order = Order.ORIGINAL
    rank_by: RankBy = RankBy.AUTO
    ranker: str | None = None
    contrast: bool = False
    rank_delta: float = 0.0
    anchor: float | None = None
    anchor_by: AnchorOrder = AnchorOrder.AUTO
    cache_bytes: int = 64 << 20
    ablations: Ablations = field(default_factory=Ablations)

    @property
    def scores_units(self) -> bool:
        """Whether Stage 2 takes units of demonstrations by what they are worth to the reader, not by surprisal."""
        if self.rank_by is RankBy.SURPRISAL:
            return False
        return self.contrast or self.unit in (UnitKind.AUTO, UnitKind.SENTENCE, UnitKind.LINE)

    @property
    def leaves_thinning_open(self) -> bool:
        """Whether nothing says how demonstrations are thinned."""
        return all(getattr(self, name) == value for name, value in _defaults().items())

    def without_question(self) -> CompressionSettings:
        """The same, but that demonstrations are taken by surprisal."""
        return replace(self, rank_by=RankBy.SURPRISAL, ranker=None, contrast=False, rank_delta=0.0)

    def __post_init__(self) -> None:
        kinds = {"unit": UnitKind, "order": Order, "anchor_by": AnchorOrder, "rank_by": RankBy}
        unknown = [fault for name, kind in kinds.items() for fault in _to_enum(self, name, kind)]
        refuse([*self._out_of_range(), *unknown])

    def _out_of_range(self) -> Iterator[str]:
        if not (math.isfinite(self.k) and self.k > 0):
            yield f"k is {self.k}; expected a number above 0"
        for name in ("instruction_rate", "question_rate"):
            rate = getattr(self, name)
            if rate is not None and not 0 < rate <= 1:
                yield f"{name} is {rate}; expected a fraction in (0, 1]"
        if self.anchor is not None and not 0 <= self.anchor <= 1:
            yield f"anchor is {self.anchor}; expected a share in [0, 1]"
        if self.segment_size < 1:
            yield f"segment_size is {self.segment_size}; expected at least 1 token"
        if self.cache_bytes < 0:
            yield f"cache_bytes is {self.cache_bytes}; expected a number of bytes, 0 for no cache"
        yield from self._ranking_faults()

    def _ranking_faults(self) -> Iterator[str]:
        if not 0 <= self.rank_delta <= 1:
            yield f"rank_delta is {self.rank_delta}; expected a number in [0, 1]"
        if self.ranker is not None and self.rank_by not in (RankBy.AUTO, RankBy.EMBEDDING, RankBy.RERANKER):
            yield f"ranker is {self.ranker!r}, but rank_by is {self.rank_by}, which needs no model; choose embedding"
        if self.rank_by is RankBy.RERANKER and self.ranker is None:
            yield "rank_by is reranker, but no ranker is named; give the folder or hub id of a cross-encoder"
        if self.contrast and self.unit not in (UnitKind.AUTO, UnitKind.TOKEN, UnitKind.WORD):
            yield f"contrast scores tokens or words, but unit is {self.unit}; choose unit token or word"
        if (self.contrast or self.rank_delta) and self.rank_by is RankBy.SURPRISAL:
            name = "contrast" if self.contrast else "rank_delta"
            yield f"{name} needs the question, but rank_by is surprisal; choose rank_by question"
        if self.rank_by not in (RankBy.AUTO, RankBy.SURPRISAL) and self.ablations != Ablations():
            yield f"ablations take parts out of ranking by surprisal, but rank_by is {self.rank_by}; choose surprisal"


@cache
def _defaults() -> dict[str, Any]:
    """Of what says how demonstrations are thinned."""
    default = CompressionSettings()
    return {name: getattr(default, name) for name in _OF_THINNING}


_OF_THINNING = (
    "k",
    "instruction_rate",
    "question_rate",
    "segment_size",
    "unit",
    "order",
    "anchor",
    "anchor_by",
    "ablations",
)


def settings_for(prompt: Prompt, settings: CompressionSettings, *, has_head: bool = False) -> CompressionSettings:
    """The settings with ``rank_by``, ``unit``, ``anchor`` and ``anchor_by`` decided (docs/algorithm.md, §1 and §5).

    Only a unit of sentences or lines may stay open, as `UnitKind.AUTO`: each text then decides. `AnchorOrder.AUTO` is
    left to worked examples that were recognised as such.

    Args:
        has_head: whether the small LM has a utility head.

    Raises:
        PromptError: there is nothing to rank, or no question to rank it for, although the settings ask for that.
    """
    rank_by = settings.rank_by
    if rank_by is RankBy.AUTO:
        rank_by = _rank_by(prompt, settings, has_head=has_head)
    elif rank_by is not RankBy.SURPRISAL:
        _require_ranking(prompt, settings)
    unit, anchor, anchor_by = settings.unit, settings.anchor, settings.anchor_by
    if unit is UnitKind.AUTO and (rank_by is RankBy.SURPRISAL or settings.contrast):
        unit = UnitKind.TOKEN
    if anchor is None:  # with ablations there would be nothing to take parts from
        surprisal = rank_by is RankBy.SURPRISAL and settings.ablations == Ablations()
        anchor = EXAMPLES_ANCHOR if surprisal and prompt.holds_worked_examples else 0.0
    elif anchor_by is AnchorOrder.AUTO:
        anchor_by = AnchorOrder.SHORTEST
    if rank_by is RankBy.SURPRISAL:
        settings = settings.without_question()
    return replace(settings, rank_by=rank_by, unit=unit, anchor=anchor, anchor_by=anchor_by)


def paper_settings(**changes: Any) -> CompressionSettings:
    """What the paper used (§5), but for `changes`."""
    paper = CompressionSettings(
        instruction_rate=PAPER_INSTRUCTION_RATE,
        question_rate=PAPER_QUESTION_RATE,
        unit=UnitKind.TOKEN,
        rank_by=RankBy.SURPRISAL,
        anchor=0.0,
    )
    return replace(paper, **changes)


def _rank_by(prompt: Prompt, settings: CompressionSettings, *, has_head: bool) -> RankBy:
    examples = not prompt.ranked_for and prompt.holds_worked_examples
    asked = settings.contrast or settings.rank_delta > 0 or (settings.leaves_thinning_open and not examples)
    if not (asked and prompt.asks.strip() and any(map(str.strip, prompt.demonstrations))):
        return RankBy.SURPRISAL
    if settings.ranker is not None:
        return RankBy.EMBEDDING
    return RankBy.UTILITY if has_head else RankBy.QUESTION


def _require_ranking(prompt: Prompt, settings: CompressionSettings) -> None:
    rank_by = settings.rank_by
    way_out = "choose rank_by auto or surprisal for such prompts"
    if not prompt.asks.strip() and rank_by is not RankBy.UTILITY:
        raise PromptError(f"rank_by is {rank_by}, but the prompt has no question; give one, or {way_out}")
    if not prompt.asks.strip() and settings.contrast:
        raise PromptError(f"contrast needs a question, but the prompt has none; give one, or {way_out}")
    if not any(map(str.strip, prompt.demonstrations)):
        raise PromptError(f"rank_by is {rank_by}, but the prompt has no demonstrations to rank; {way_out}")


def _to_enum(settings: object, name: str, kind: type[StrEnum]) -> Iterator[str]:
    """Turn a plain string in a frozen dataclass into its enum; yield what is wrong with it, if anything."""
    value = getattr(settings, name)
    try:
        object.__setattr__(settings, name, kind(value))
    except ValueError:
        yield f"{name} is {value!r}; expected one of {', '.join(kind)}"
