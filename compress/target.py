"""What the caller asks for: a budget or a rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from terselm.compress.counter import Count
from terselm.compress.fit import smallest_budget
from terselm.compress.layout import Layout
from terselm.errors import BudgetError


@dataclass(frozen=True, kw_only=True)
class Target:
    """How long one compressed prompt may be.

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
            given = "both a budget and a rate are" if self.budget is not None else "neither a budget nor a rate is"
            raise BudgetError(f"{given} given; give exactly one of the two")
        if self.budget is not None and (
            isinstance(self.budget, bool) or not isinstance(self.budget, int) or self.budget < 1
        ):
            raise BudgetError(f"the budget is {self.budget!r}; expected a whole number of tokens, at least 1")
        if self.rate is not None and not 0 < self.rate <= 1:
            raise BudgetError(f"the rate is {self.rate!r}; expected a fraction in (0, 1]")

    def tokens(self, original: int, layout: Layout, count: Count) -> int:
        """The budget for a prompt of ``original`` tokens.

        Raises:
            BudgetError: the rate leaves not a single token.
        """
        if self.budget is not None:
            return self.budget
        assert self.rate is not None
        budget = math.floor(self.rate * original)
        if budget < min(1, original):
            smallest = max(1, smallest_budget(layout, count))
            raise BudgetError(
                f"a rate of {self.rate} leaves none of {original} tokens; the smallest budget that could work is "
                f"{smallest}",
                smallest=smallest,
            )
        return budget


def targets(prompts: int, budget: int | Sequence[int] | None, rate: float | Sequence[float] | None) -> list[Target]:
    """One target a prompt, from one number for all or one each.

    Raises:
        BudgetError: not as many numbers as prompts, or a number that `Target` refuses.
    """
    for name, given in (("budgets", budget), ("rates", rate)):
        if isinstance(given, Sequence) and len(given) != prompts:
            raise BudgetError(f"{len(given)} {name} for {prompts} prompts; give one number for all or one for each")
    budgets = budget if isinstance(budget, Sequence) else [budget] * prompts
    rates = rate if isinstance(rate, Sequence) else [rate] * prompts
    return [Target(budget=b, rate=r) for b, r in zip(budgets, rates, strict=True)]
