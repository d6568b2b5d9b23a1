"""What the caller may ask for: a budget or a rate."""

from __future__ import annotations

from terselm.errors import BudgetError


def check_target(budget: int | None, rate: float | None) -> None:
    """Raise `BudgetError` unless exactly one is given, in its range."""
    if (budget is None) == (rate is None):
        given = "both a budget and a rate are" if budget is not None else "neither a budget nor a rate is"
        raise BudgetError(f"{given} given; give exactly one of the two")
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 1):
        raise BudgetError(f"the budget is {budget!r}; expected a whole number of tokens, at least 1")
    if rate is not None and not 0 < rate <= 1:
        raise BudgetError(f"the rate is {rate!r}; expected a fraction in (0, 1]")
