"""The user's own prompts: JSON Lines with instruction, demonstrations, question and, where known, answer."""

from __future__ import annotations

from terselm.compress.prompt import Prompt
from terselm.errors import ConfigError
from terselm.evaluate.answers import normalised
from terselm.evaluate.items import Item, Suite
from terselm.evaluate.settings import SuiteSettings
from terselm.evaluate.sources import rows

_KEYS = {"instruction", "demonstrations", "question", "answer"}


def load(settings: SuiteSettings) -> Suite:
    """At most ``settings.questions`` prompts of a file, in its order.

    Raises:
        ConfigError: no file, or a row of another form.
    """
    if settings.data is None:
        raise ConfigError("give a file of prompts (JSON Lines: instruction, demonstrations, question, answer)")
    found = rows(settings.data, "", None, "")[: settings.questions]
    if not found:
        raise ConfigError(f"{settings.data} holds no prompts")
    items = []
    for number, (where, row) in enumerate(found):
        if unknown := sorted(row.keys() - _KEYS):
            raise ConfigError(f"{where}: unknown key {unknown[0]!r}; expected some of {', '.join(sorted(_KEYS))}")
        answer = row.get("answer") or ""
        if not isinstance(answer, str):
            raise ConfigError(f"{where}: the answer is a {type(answer).__name__}; expected a text")
        prompt = Prompt(**{key: row[key] for key in _KEYS - {"answer"} if row.get(key)})
        gold = answer if not answer or answer[0].isspace() else f"\n{answer}"
        items.append(
            Item(id=f"{number}", prompt=prompt, gold=gold, answers=(answer,) if answer else (), group=f"{number}")
        )
    return Suite(
        name="prompts",
        items=items,
        right=lambda text, item: any(normalised(text) == normalised(answer) for answer in item.answers),
    )
