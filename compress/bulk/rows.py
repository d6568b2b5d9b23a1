"""One row of a bulk file: what it asks for, and what it gets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from terselm.compress.length import Length
from terselm.compress.prompt import PROMPT_KEYS, Prompt
from terselm.compress.result import CompressionResult
from terselm.data.rows import Json
from terselm.errors import BudgetError, PromptError

_FORMS = "text (and the question it is for), prompt, or instruction, demonstrations and question"
RESULT_KEYS = ("compressed", "original_tokens", "compressed_tokens", "ratio", "selected")
READ_KEYS = frozenset((*PROMPT_KEYS, "text", "prompt", "budget", "rate"))
"""Keys that are read; all others are passed through."""


@dataclass(frozen=True, kw_only=True)
class PromptRow:
    """What a row asks for.

    Attributes:
        number: of the row, from 1.
    """

    number: int
    prompt: Prompt
    length: Length


def read_prompt_row(
    number: int, row: Mapping[str, Any], budget: int | None = None, rate: float | None = None
) -> PromptRow:
    """What a row asks for; a key whose value is null counts as absent.

    Args:
        number: of the row, from 1.
        row: one prompt, as ``text`` (without parts; a ``question`` beside it is what it is ranked for), as ``prompt``
            (an object with the parts), or as its parts; ``budget`` or ``rate`` where this row's differs.
        budget, rate: for a row that gives neither; at most one of the two.

    Raises:
        PromptError: no prompt, several, or one of the wrong form; or a key that the result needs.
        BudgetError: no budget and no rate, both, or one that `Length` refuses.
    """
    if taken := [key for key in RESULT_KEYS if key in row]:
        raise PromptError(f"the row has a key {taken[0]!r} already, which the result needs; rename it")
    values = _read(row)
    if "budget" in values or "rate" in values:
        budget, rate = _whole(values.get("budget")), values.get("rate")
    if rate is not None and (isinstance(rate, bool) or not isinstance(rate, int | float) or not math.isfinite(rate)):
        raise BudgetError(f"the rate is {rate!r}; expected a fraction in (0, 1]")
    return PromptRow(number=number, prompt=prompt_of(row), length=Length(budget=budget, rate=rate))


def passed_through(row: Mapping[str, Any]) -> Json:
    """What of a row the output repeats."""
    return {key: value for key, value in row.items() if key not in READ_KEYS}


def result_values(result: CompressionResult) -> Json:
    """What a row gets: the values of `RESULT_KEYS`."""
    values = result.to_dict()
    return {"compressed": values["text"]} | {key: values[key] for key in RESULT_KEYS[1:]}


def prompt_of(row: Mapping[str, Any]) -> Prompt:
    """The prompt of a row, in one of the forms that `read_prompt_row` tells.

    Raises:
        PromptError: no prompt, several, or one of the wrong form.
    """
    values = _read(row)
    parts = {key: values[key] for key in PROMPT_KEYS if key in values}
    question = parts.pop("question", "") if "text" in values else ""
    forms = [*(key for key in ("text", "prompt") if key in values), *list(parts)[:1]]
    if len(forms) != 1:
        named = " and ".join(forms) if forms else "no prompt"
        raise PromptError(f"the row holds {named}; expected one of {_FORMS}")
    if "text" in values:
        if not isinstance(values["text"], str):
            raise PromptError(f"text is a {type(values['text']).__name__}; expected a string")
        if not isinstance(question, str):
            raise PromptError(f"question is a {type(question).__name__}; expected a string")
        parts = {"demonstrations": [values["text"]], "ranked_for": question}
    if "prompt" in values:
        parts = _nested(values["prompt"])
    if not isinstance(parts.get("demonstrations", []), list):
        raise PromptError(f"demonstrations is a {type(parts['demonstrations']).__name__}; expected a list of strings")
    return Prompt(**parts)


def _read(row: Mapping[str, Any]) -> Json:
    """What is read of a row; a key whose value is null counts as absent."""
    return {key: value for key, value in row.items() if key in READ_KEYS and value is not None}


def _nested(prompt: Any) -> dict[str, Any]:
    if not isinstance(prompt, dict):
        raise PromptError(
            f"prompt is a {type(prompt).__name__}; expected an object with instruction, demonstrations and question "
            "(a prompt without parts goes under the key text)"
        )
    if unknown := prompt.keys() - set(PROMPT_KEYS):
        raise PromptError(f"prompt has a key {min(unknown)!r}; expected some of {', '.join(PROMPT_KEYS)}")
    return {key: value for key, value in prompt.items() if value is not None}


def _whole(budget: Any) -> Any:
    """A column of whole numbers and nulls often arrives as floats."""
    return int(budget) if isinstance(budget, float) and budget.is_integer() else budget
