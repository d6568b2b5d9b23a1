"""How long a compressed prompt may be."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from terselm.errors import BudgetError


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
            raise BudgetError(
                f"a rate of {self.rate} leaves none of {original} tokens; the smallest budget that could work is "
                f"{least}",
                smallest=least,
            )
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
