"""Has the small LM read what the stages ask for: each thing once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from terselm.compress.itpc import ScoreRequest
from terselm.compress.job import Job
from terselm.compress.score_cache import ScoreCache
from terselm.compress.surprisal import SurprisalEngine, too_large

_NOTHING = np.zeros(0, dtype=np.int64)


class Reader:
    """Answers from the cache what was read before, and has the engine read the rest.

    Args:
        cache_bytes: bound on the memory that surprisals of earlier prompts may take.
    """

    def __init__(self, engine: SurprisalEngine, cache_bytes: int) -> None:
        self._engine = engine
        self._cache = ScoreCache(cache_bytes)

    def read_demonstrations(self, jobs: Sequence[Job]) -> None:
        """Surprisals of all demonstrations of these prompts, each by itself; each distinct text once."""
        wanted = {job.layout.pieces[n].text: job.layout.piece_ids(n) for job in jobs for n in job.demonstrations}
        keys = {text: ScoreCache.key(_NOTHING, ids) for text, ids in wanted.items()}
        known = {text: values for text, key in keys.items() if (values := self._cache.get(key)) is not None}
        unread = [text for text in wanted if text not in known]
        for text, values in zip(unread, self._engine.score_texts([wanted[text] for text in unread]), strict=True):
            known[text] = values
            self._cache.put(keys[text], values)
        new = set(unread)
        for job in jobs:
            for n in job.demonstrations:
                text = job.layout.pieces[n].text
                job.coarse[n] = known[text]
                if text in new:
                    job.tokens_read += 1 + len(wanted[text])
                    new.discard(text)
                else:
                    job.tokens_cached += len(wanted[text])

    def run_stage_two(self, jobs: Sequence[Job]) -> None:
        """Take all prompts through Stage 2: together, but for those that may outgrow the window."""
        window = self._engine.window
        left = sorted(jobs, key=lambda job: -job.iteration.longest)
        while left:
            longest = left[0].iteration.longest
            rows = 1 if longest > window else self._engine.rows_at_once(longest)
            self._advance_or_halve(left[:rows])
            left = left[rows:]

    def _advance_or_halve(self, jobs: list[Job]) -> None:
        try:
            self._advance(jobs)
            return
        except torch.OutOfMemoryError:
            if len(jobs) == 1:
                raise too_large(min(jobs[0].iteration.longest, self._engine.window)) from None
        self._engine.give_back_memory()  # here, where the exception no longer holds the frames
        for job in jobs:
            job.iteration.forget()
        half = len(jobs) // 2
        self._advance_or_halve(jobs[:half])
        self._advance_or_halve(jobs[half:])

    def _advance(self, jobs: list[Job]) -> None:
        session = self._engine.session(len(jobs))
        while jobs:
            asked = [self._next_unread(job) for job in jobs]
            going = [row for row, request in enumerate(asked) if request is not None]
            requests = [request for request in asked if request is not None]
            if going and len(going) < len(jobs):
                session.select(going)
            jobs = [jobs[row] for row in going]
            if not jobs:
                break
            for job, request, values in zip(jobs, requests, session.step(requests), strict=True):
                job.tokens_read += len(request.prefix) - request.read + len(request.segment)
                self._cache.put(_key(request), values)
                job.iteration.receive(values)

    def _next_unread(self, job: Job) -> ScoreRequest | None:
        """The next segment that is not in the cache; those before it are answered."""
        while (request := job.iteration.request()) is not None:
            values = self._cache.get(_key(request))
            if values is None:
                return request
            job.tokens_cached += len(values)
            job.iteration.receive(values, from_model=False)
        return None


def _key(request: ScoreRequest) -> bytes:
    return ScoreCache.key(request.prefix, request.segment)
