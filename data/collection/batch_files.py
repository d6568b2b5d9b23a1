"""The files of a batch interface: requests in, answers out, one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from terselm.data.collection.failures import Failure, Reason, Then, of_status
from terselm.data.collection.plan import Request
from terselm.data.rows import dump_object

MOST_REQUESTS = 50_000
MOST_BYTES = 200 * 1_000_000


def request_line(request: Request, body: dict[str, Any], url: str) -> bytes:
    """One request; its answer bears its id."""
    return dump_object({"custom_id": request.id, "method": "POST", "url": url, "body": body}).encode() + b"\n"


def split(
    requests: Sequence[Request],
    line: Callable[[Request], bytes],
    most_requests: int = MOST_REQUESTS,
    most_bytes: int = MOST_BYTES,
) -> Iterator[list[Request]]:
    """Requests that go into one file each, in order."""
    part: list[Request] = []
    size = 0
    for request in requests:
        length = len(line(request))
        if part and (len(part) == most_requests or size + length > most_bytes):
            yield part
            part, size = [], 0
        part.append(request)
        size += length
    if part:
        yield part


def answer_lines(content: bytes) -> Iterator[tuple[str, bytes | None, Failure | None]]:
    """Yield (request, response as it came, failure) of each line; a line that cannot be read is passed over.

    Its request has no answer then, as one that the endpoint left out.
    """
    for line in content.splitlines():
        try:
            value = json.loads(line)
            name = str(value["custom_id"])
            response, error = value.get("response"), value.get("error")
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        if error or not isinstance(response, dict):
            yield name, None, expired(error)
        elif response.get("status_code") != 200:
            yield name, None, of_status(int(response.get("status_code") or 0), response.get("body"), {})
        else:
            yield name, json.dumps(response.get("body"), ensure_ascii=False).encode(), None


def expired(error: Any) -> Failure:
    """The batch ended before this request was answered; it is not charged."""
    message = error.get("message") if isinstance(error, dict) else None
    return Failure(reason=Reason.EXPIRED, then=Then.RETRY, message=str(message or "the batch ended without an answer"))
