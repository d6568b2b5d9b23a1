"""Many commits as one: each waits for the disk, and a disk is slow."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from terselm.data.collection.ledger import Ledger

Change = Callable[[], None]


class Commits:
    """Gathers the changes that arrive while the last group is being written, and commits them together."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._waiting: list[tuple[Change, asyncio.Future[None]]] = []
        self._task: asyncio.Task[None] | None = None

    async def commit(self, change: Change) -> None:
        """Return once the change is on disk; it will get there even if the caller is cancelled.

        Raises:
            TargetLLMError: it cannot be written.
        """
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((change, future))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._write())
        await future

    async def close(self) -> None:
        """Wait for what is under way."""
        if self._task is not None:
            await self._task

    async def _write(self) -> None:
        while self._waiting:
            group, self._waiting = self._waiting, []
            error: BaseException | None = None
            try:
                await asyncio.to_thread(self._apply, [change for change, _ in group])
            except Exception as raised:
                error = raised
            for _, future in group:
                if future.done():  # its caller was cancelled
                    continue
                if error is None:
                    future.set_result(None)
                else:
                    future.set_exception(error)

    def _apply(self, changes: list[Change]) -> None:
        with self._ledger.transaction():
            for change in changes:
                change()
