"""What the settings leave open, decided by the prompt (docs/algorithm.md, §5)."""

from __future__ import annotations

from dataclasses import replace

from terselm.compress.budget import BudgetController
from terselm.compress.prompt import Prompt
from terselm.compress.settings import EXAMPLES_ANCHOR, Ablations, CompressionSettings, RankBy, UnitKind
from terselm.errors import PromptError

_DEFAULT = CompressionSettings()
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


def settings_for(prompt: Prompt, settings: CompressionSettings) -> CompressionSettings:
    """The settings with ``rank_by``, ``unit`` and ``anchor`` decided.

    Only a unit of sentences or lines may stay open, as `UnitKind.AUTO`: each text then decides.

    Raises:
        PromptError: there is nothing to rank, or no question to rank it for, although the settings ask for that.
    """
    rank_by = settings.rank_by
    if rank_by is RankBy.AUTO:
        rank_by = _rank_by(prompt, settings)
    elif rank_by is not RankBy.SURPRISAL:
        _require_ranking(prompt, rank_by)
    unit, anchor = settings.unit, settings.anchor
    if unit is UnitKind.AUTO and (rank_by is RankBy.SURPRISAL or settings.contrast):
        unit = UnitKind.TOKEN
    if anchor is None:  # with ablations there would be nothing to take parts from
        surprisal = rank_by is RankBy.SURPRISAL and settings.ablations == Ablations()
        anchor = anchor_for(prompt) if surprisal else 0.0
    if rank_by is RankBy.SURPRISAL:
        settings = _without_question(settings)
    return replace(settings, rank_by=rank_by, unit=unit, anchor=anchor)


def otherwise(
    controller: BudgetController, settings: CompressionSettings, asked: CompressionSettings
) -> CompressionSettings | None:
    """Other settings where those that the prompt alone decided do not suit its budget; None where they do.

    Worked examples none of which fits whole are thinned by lines: the end of one example shows a target little.
    Where not even one sentence or line fits, demonstrations are thinned by tokens.

    Args:
        controller: with ``settings``, which `settings_for` made of ``asked``.
    """
    if not leaves_thinning_open(asked) or asked.rank_by is not RankBy.AUTO:
        return None
    if settings.anchor == EXAMPLES_ANCHOR and not controller.holds_whole_demonstration:
        return replace(settings, unit=UnitKind.LINE, anchor=0.0)
    if settings.unit is UnitKind.AUTO and not controller.fits_any():
        return replace(_without_question(settings), unit=UnitKind.TOKEN)
    return None


def leaves_thinning_open(settings: CompressionSettings) -> bool:
    """Whether nothing in the settings says how demonstrations are thinned."""
    return all(getattr(settings, name) == getattr(_DEFAULT, name) for name in _OF_THINNING)


def anchor_for(prompt: Prompt) -> float:
    """The share where the settings name none: `EXAMPLES_ANCHOR` for worked examples, else 0.

    Worked examples are at least two demonstrations that all begin as the question does, with a word such as
    "Question:" or "###": one that is not all letters.
    """
    texts = [prompt.question, *filter(str.strip, prompt.demonstrations)]
    opening, *others = (text.split(maxsplit=1)[:1] for text in texts)
    labelled = bool(opening) and not opening[0].isalpha()
    return EXAMPLES_ANCHOR if labelled and len(others) > 1 and all(other == opening for other in others) else 0.0


def _without_question(settings: CompressionSettings) -> CompressionSettings:
    return replace(settings, rank_by=RankBy.SURPRISAL, ranker=None, contrast=False, rank_delta=0.0)


def _rank_by(prompt: Prompt, settings: CompressionSettings) -> RankBy:
    examples = not prompt.ranked_for and anchor_for(prompt) > 0
    asked = settings.contrast or settings.rank_delta > 0 or (leaves_thinning_open(settings) and not examples)
    if not (asked and prompt.asks.strip() and any(map(str.strip, prompt.demonstrations))):
        return RankBy.SURPRISAL
    return RankBy.QUESTION if settings.ranker is None else RankBy.EMBEDDING


def _require_ranking(prompt: Prompt, rank_by: RankBy) -> None:
    way_out = "choose rank_by auto or surprisal for such prompts"
    if not prompt.asks.strip():
        raise PromptError(f"rank_by is {rank_by}, but the prompt has no question; give one, or {way_out}")
    if not any(map(str.strip, prompt.demonstrations)):
        raise PromptError(f"rank_by is {rank_by}, but the prompt has no demonstrations to rank; {way_out}")
