"""The ways of shortening a prompt that are compared, by name.

``terselm`` with settings after a colon (``terselm:k=1.2,anchor=0``), the paper's (``terselm:paper``), a part taken out
by name (``terselm:no-iteration``), another small LM (``terselm:model=runs/mine``), or all of these; the baselines of
`terselm.evaluate.baselines`; ``llmlingua``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from terselm.compress.prompt import Prompt
from terselm.compress.settings import PAPER_INSTRUCTION_RATE, PAPER_QUESTION_RATE, CompressionSettings
from terselm.config import load_config
from terselm.errors import ConfigError

if TYPE_CHECKING:
    from terselm.compress.result import CompressionResult

NAMED = {
    "paper": [f"instruction_rate={PAPER_INSTRUCTION_RATE}", f"question_rate={PAPER_QUESTION_RATE}", "anchor=0"],
    "no-budget-controller": ["ablations.selection=all", "ablations.uniform_rates=true"],
    "no-iteration": ["ablations.one_pass=true"],
    "no-perplexity-selection": ["ablations.selection=random"],
    "uniform-rates": ["ablations.uniform_rates=true"],
    "random-tokens": ["ablations.random_tokens=true"],
    "next-token": ["ablations.next_token=true"],
}
OURS = "terselm"
PEER = "llmlingua"
READY = "ready"  # given by the caller


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """A shortened prompt; ``result`` says what became of each token, where the method is ours."""

    text: str
    result: CompressionResult | None = field(default=None, repr=False)


class Method(Protocol):
    """A way of shortening prompts."""

    def compress(self, prompts: Sequence[Prompt], budgets: Sequence[int]) -> list[Compressed]:
        """Shorten each prompt to its budget, in the target's tokens."""
        ...


@dataclass(frozen=True, kw_only=True)
class MethodName:
    """A method as the user wrote it, taken apart.

    Attributes:
        kind: ``terselm``, ``llmlingua`` or a baseline.
        model: the small LM; empty for that of the evaluation.
        settings: of ``terselm``.
    """

    text: str
    kind: str
    model: str = ""
    settings: CompressionSettings = field(default_factory=CompressionSettings)


def parse_method(text: str) -> MethodName:
    """Take a method's name apart.

    Raises:
        ConfigError: an unknown method or setting.
    """
    from terselm.evaluate.baselines import BASELINES

    kind, _, options = text.partition(":")
    known = [OURS, PEER, *BASELINES]
    if kind not in known:
        raise ConfigError(f"unknown method {kind!r}; expected one of {', '.join(known)}")
    model, overrides = "", []
    for option in filter(None, options.split(",")):
        key, given, value = option.partition("=")
        if key == "model" and given:
            model = value
        elif option in NAMED and kind == OURS:
            overrides += NAMED[option]
        elif given and kind == OURS:
            overrides.append(option)
        else:
            raise ConfigError(
                f"method {text!r}: {option!r} is no option of {kind}; expected model=NAME"
                + (f", a setting such as k=1.2, or one of {', '.join(NAMED)}" if kind == OURS else "")
            )
    return MethodName(text=text, kind=kind, model=model, settings=load_config(CompressionSettings, None, overrides))
