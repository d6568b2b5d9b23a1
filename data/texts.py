"""Plain texts, as a model reads them: of records, and of the user's own."""

from __future__ import annotations

from dataclasses import dataclass

from terselm.data.schema import Record


@dataclass(frozen=True, kw_only=True)
class PlainText:
    """A text to score; `response_start` as in `ScoredText`."""

    id: str
    text: str
    response_start: int | None = None


def record_text(record: Record) -> PlainText:
    """The text of a record as the compressor reads it: the messages and the response, with blank lines between."""
    prompt = "".join(f"{message.content}\n\n" for message in record.messages)
    return PlainText(id=record.id, text=prompt + record.response, response_start=len(prompt))
