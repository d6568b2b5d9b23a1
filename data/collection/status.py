"""What a ledger holds, in figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from terselm.data.collection.entries import IMPORTED, State
from terselm.data.collection.ledger import Ledger


def status(path: Path) -> dict[str, Any]:
    """Counts, tokens, cost and failures by class of a ledger that another process may be writing.

    Raises:
        DataFormatError: there is no such ledger, or it is damaged.
    """
    with Ledger(path, read_only=True) as ledger:
        return report(ledger)


def report(ledger: Ledger) -> dict[str, Any]:
    """As `status`, of an open ledger.

    ``requests`` by state; ``without_record`` by reason; ``attempts`` by outcome, those under way as ``open``; tokens
    of all answers, dropped ones too; ``cost`` with what attempts without an answer may have cost.
    """
    states = dict(ledger.query("SELECT state, count(*) FROM requests GROUP BY state"))
    reasons = ledger.query(
        "SELECT reason, count(*) FROM requests WHERE state IN (?, ?, ?) GROUP BY reason ORDER BY 2 DESC",
        (State.FAILED, State.FILTERED, State.DROPPED),
    )
    outcomes = ledger.query("SELECT coalesce(outcome, 'open'), count(*) FROM attempts GROUP BY 1 ORDER BY 2 DESC")
    prompt, completion, cost = ledger.query(
        "SELECT coalesce(sum(prompt_tokens), 0), coalesce(sum(completion_tokens), 0), "
        "coalesce(sum(coalesce(cost, bound_cost)), 0) FROM attempts WHERE outcome IS NOT ?",
        (IMPORTED,),
    )[0]
    batches = dict(ledger.query("SELECT state, count(*) FROM batches GROUP BY state"))
    found: dict[str, Any] = {
        "requests": {state.value: states.get(state.value, 0) for state in State},
        "without_record": dict(reasons),
        "attempts": dict(outcomes),
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "cost": round(cost, 6),
    }
    return found | ({"batches": batches} if batches else {})
