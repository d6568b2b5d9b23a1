"""An HTTP service that compresses; requests that wait at the same time are compressed together."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from terselm.compress.bulk.rows import READ_KEYS, PromptRow, read_prompt_row
from terselm.compress.compressor import PromptCompressor
from terselm.compress.result import CompressionResult
from terselm.errors import PromptError, TerseLMError

if TYPE_CHECKING:
    from fastapi import FastAPI

_KEYS = READ_KEYS | {"keep", "counter", "tokens"}


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """A request whose answer is awaited.

    Attributes:
        keep: literal texts that must survive.
        counter: tokenizer that its budget is counted in; None is the small LM's.
    """

    row: PromptRow
    keep: tuple[str, ...] = ()
    counter: str | None = None
    answer: Future[CompressionResult] = field(default_factory=Future)


class Batcher:
    """Compresses in one thread what waits, as much as fits into a batch at once.

    Args:
        most: requests in a batch.
    """

    def __init__(self, compressor: PromptCompressor, most: int) -> None:
        self._compressor = compressor
        self._most = most
        self._waiting: queue.SimpleQueue[Waiting | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="compressor", daemon=True)
        self._thread.start()

    def submit(self, waiting: Waiting) -> Future[CompressionResult]:
        self._waiting.put(waiting)
        return waiting.answer

    def close(self) -> None:
        """Answer what waits, then stop."""
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (first := self._waiting.get()) is not None:
            batch, last = [first], False
            while len(batch) < self._most and not self._waiting.empty():
                if (other := self._waiting.get()) is None:
                    last = True
                    break
                batch.append(other)
            alike: dict[tuple[tuple[str, ...], str | None], list[Waiting]] = {}
            for waiting in batch:
                if not waiting.answer.set_running_or_notify_cancel():  # nobody waits for it any more
                    continue
                alike.setdefault((waiting.keep, waiting.counter), []).append(waiting)
            for group in alike.values():
                self._answer(group)
            if last:
                return

    def _answer(self, group: Sequence[Waiting]) -> None:
        first = group[0]  # the others keep and count alike
        try:
            prompts, lengths = [one.row.prompt for one in group], [one.row.length for one in group]
            results = self._compressor.compress_batch(prompts, lengths=lengths, keep=first.keep, counter=first.counter)
        except Exception as error:
            if len(group) == 1:
                first.answer.set_exception(error)
                return
        else:
            for waiting, result in zip(group, results, strict=True):
                waiting.answer.set_result(result)
            return
        for waiting in group:  # only the one that causes the error gets it
            self._answer([waiting])


def make_app(compressor: PromptCompressor, *, most: int = 64) -> FastAPI:
    """The application: ``POST /compress`` and ``GET /health``.

    A request is a JSON object: ``text``, with the ``question`` that it is ranked for if there is one, or
    ``instruction``, ``demonstrations``, ``question`` and ``pinned``; ``budget`` or ``rate``; and, if wanted, ``keep``,
    ``counter`` and ``"tokens": true`` for the decision on every token. The answer is what `CompressionResult.to_dict`
    gives. What cannot be compressed is answered with status 422 and a sentence.
    """
    from fastapi import Body, FastAPI
    from fastapi.responses import JSONResponse

    batcher = Batcher(compressor, most)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(batcher.close)

    app = FastAPI(title="TerseLM", lifespan=lifespan)

    @app.exception_handler(TerseLMError)
    async def refuse(_: object, error: Exception) -> JSONResponse:
        return JSONResponse({"error": str(error)}, status_code=422)

    @app.post("/compress")
    async def compress(values: dict[str, Any] = Body()) -> dict[str, Any]:  # noqa: B008 (FastAPI's way)
        result = await asyncio.wrap_future(batcher.submit(read(values)))
        return result.to_dict(tokens=bool(values.get("tokens")))

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"model": compressor.lm.name, "window": compressor.lm.window}

    return app


def read(values: dict[str, Any]) -> Waiting:
    """A request as it came.

    Raises:
        PromptError, BudgetError: it is not of the form that `make_app` names.
    """
    if unknown := values.keys() - _KEYS:
        raise PromptError(f"unknown key {min(unknown)!r}; expected some of {', '.join(sorted(_KEYS))}")
    keep = values.get("keep") or []
    if not isinstance(keep, list) or not all(isinstance(text, str) for text in keep):
        raise PromptError(f"keep is {keep!r}; expected a list of strings")
    counter = values.get("counter")
    if counter is not None and not isinstance(counter, str):
        raise PromptError(f"counter is {counter!r}; expected the name of a tokenizer")
    row = {key: value for key, value in values.items() if key in READ_KEYS}
    return Waiting(row=read_prompt_row(1, row), keep=tuple(keep), counter=counter)
