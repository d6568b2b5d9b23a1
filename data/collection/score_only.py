"""Log-probabilities of given texts, without asking for an answer: from a local target, or an endpoint that tells."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from terselm.data.collection.client import read_key
from terselm.data.collection.collect import Options, open_ledger
from terselm.data.collection.ledger import Ledger
from terselm.data.collection.scores import about, pack, score_all, stored_scores
from terselm.data.collection.settings import CollectSettings, PromptScores
from terselm.data.collection.token_scores import echoed_scores, vllm_scores
from terselm.data.logprobs import ScoredText, write_logprobs
from terselm.data.sources import load_texts
from terselm.data.texts import PlainText
from terselm.errors import ConfigError, TargetLLMError


@dataclass(frozen=True, kw_only=True)
class ScoreSummary:
    """What scoring has come to.

    Attributes:
        texts: in the file now.
        reused: of these, how many the ledger had before.
        failed: texts without scores, by id, with the endpoint's reason.
    """

    texts: int
    reused: int
    failed: dict[str, str]
    file: str


def score_only(source: str, out: Path, settings: CollectSettings, options: Options | None = None) -> ScoreSummary:
    """Score every text of a source; what the ledger beside ``out`` has already is not scored again.

    Args:
        source: rows with ``text``, or records, which are scored as raw text.
        out: the Parquet file to write, see `LogProbFile`.

    Raises:
        ConfigError: the endpoint is not said to give log-probabilities of texts.
        DataFormatError: a bad row.
        TargetLLMError: there are no scores at all.
    """
    if not settings.is_local and settings.logprobs.of_texts is PromptScores.NONE:
        raise ConfigError(
            "this endpoint is not known to score texts; set logprobs.of_texts=prompt_logprobs (vLLM) or =echo, "
            "or take a local target"
        )
    texts = [(_key(text, settings), text) for text in load_texts(source)]
    with open_ledger(out) as ledger:
        ledger.add((key, _asked(text, settings)) for key, text in texts)
        have = ledger.scored(settings.logprobs.top_k)
        missing = [(key, text) for key, text in texts if key not in have]
        failed = _score(ledger, missing, settings, options or Options()) if missing else {}
        if len(failed) == len(texts):
            raise TargetLLMError(f"no text was scored: {next(iter(failed.values()))}")
        count = write_logprobs(out, stored_scores(ledger, texts), about(settings))
    return ScoreSummary(texts=count, reused=len(texts) - len(missing), failed=failed, file=str(out))


def _score(
    ledger: Ledger, texts: Sequence[tuple[str, PlainText]], settings: CollectSettings, options: Options
) -> dict[str, str]:
    if not settings.is_local:
        return asyncio.run(_Scoring(ledger, settings, options).score(texts))
    from terselm.models import load_causal_lm

    lm = load_causal_lm(settings.local_name, device=settings.device, dtype=settings.dtype)
    score_all(lm, ledger, texts, settings.logprobs.top_k)
    return {}


class _Scoring:
    """One run against an endpoint; texts are asked for anew until they have scores."""

    def __init__(self, ledger: Ledger, settings: CollectSettings, options: Options) -> None:
        self.ledger, self.settings = ledger, settings
        self.key = read_key(settings, options.key_file)
        self.failed: dict[str, str] = {}

    async def score(self, texts: Sequence[tuple[str, PlainText]]) -> dict[str, str]:
        from terselm.data.collection.client import Client

        queue = iter(texts)
        async with Client(self.settings, self.key) as client, asyncio.TaskGroup() as group:
            for _ in range(min(self.settings.limits.concurrency, len(texts))):
                group.create_task(self._work(client, queue))
        return self.failed

    async def _work(self, client: Any, queue: Any) -> None:
        import tenacity

        from terselm.data.collection.client import AskError
        from terselm.data.collection.failures import Then

        limits = self.settings.limits
        for key, text in queue:
            retrying = tenacity.AsyncRetrying(
                stop=tenacity.stop_after_attempt(limits.retries + 1),
                wait=tenacity.wait_random_exponential(multiplier=limits.backoff, max=limits.longest_pause),
                retry=tenacity.retry_if_exception(
                    lambda e: not isinstance(e, AskError) or e.failure.then is Then.RETRY
                ),
                reraise=True,
            )
            try:
                async for attempt in retrying:
                    with attempt:
                        raw = await client.ask(_body(text, self.settings), plain=True)
                        scored = _parse(text, raw, self.settings)
                self.ledger.put_scores([(key, pack(scored))], self.settings.logprobs.top_k)
            except (AskError, ValueError) as error:
                self.failed[text.id] = self.key.mask(str(error))


def _body(text: PlainText, settings: CollectSettings) -> dict[str, Any]:
    top_k = settings.logprobs.top_k
    body: dict[str, Any] = {"model": settings.model, "prompt": text.text, **settings.extra_body}
    if settings.logprobs.of_texts is PromptScores.ECHO:
        return body | {"echo": True, "max_tokens": 0, "logprobs": max(1, top_k)}
    return body | {"prompt_logprobs": top_k, "max_tokens": 1}


def _parse(text: PlainText, raw: bytes, settings: CollectSettings) -> ScoredText:
    if settings.logprobs.of_texts is PromptScores.ECHO:
        return echoed_scores(text.id, text.text, raw)
    return vllm_scores(text.id, text.text, raw, settings.logprobs.top_k)


def _asked(text: PlainText, settings: CollectSettings) -> dict[str, Any]:
    return {"text": text.text, "model": settings.target, "top_k": settings.logprobs.top_k}


def _key(text: PlainText, settings: CollectSettings) -> str:
    asked = json.dumps(_asked(text, settings), sort_keys=True)
    return hashlib.sha256(f"score:{asked}".encode()).hexdigest()[:20]
