"""Log-probabilities of given texts, without asking for an answer: from a local target, or an endpoint that tells."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from terselm.data.collection.collect import open_ledger
from terselm.data.collection.ledger import Ledger, State
from terselm.data.collection.outcome import CollectionProgress
from terselm.data.collection.scores import about, stored_scores, text_scores
from terselm.data.collection.settings import CollectSettings, Options, PromptScores
from terselm.data.instructions import load_texts
from terselm.data.logprobs import ScoredText, write_logprobs
from terselm.data.schema import PlainText
from terselm.errors import ConfigError, TargetLLMError


@dataclass(frozen=True, kw_only=True)
class ScoreSummary:
    """What scoring has come to.

    Attributes:
        texts: in the file now.
        reused: of these, how many the ledger had before.
        failed: texts without scores, by id, with the endpoint's reason.
        stopped: why this run ended before everything was scored; None if it did not.
    """

    texts: int
    reused: int
    failed: dict[str, str]
    stopped: str | None
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
    options = options or Options()
    with open_ledger(out, ((key, _asked(text, settings)) for key, text in texts)) as ledger:
        if options.retry_failed:
            ledger.retry([State.FAILED])
        have = _scored(ledger, settings)
        missing = [(key, text) for key, text in texts if key not in have]
        stopped = None
        if missing and settings.is_local:
            from terselm.data.collection.local import score_all
            from terselm.models import load_causal_lm

            lm = load_causal_lm(settings.local_name, device=settings.device, dtype=settings.dtype)
            score_all(lm, ledger, missing, settings.logprobs.top_k)
        elif missing:
            stopped = _ask(ledger, missing, settings, options)
        by_key = dict(texts)
        failed = {by_key[key].id: str(lost.message) for key, lost in ledger.without_record().items() if key in by_key}
        have = _scored(ledger, settings)
        if not any(key in have for key, _ in texts):
            raise TargetLLMError(f"no text was scored: {stopped or next(iter(failed.values()))}")
        count = write_logprobs(out, _scores(ledger, texts, settings), about(settings))
    return ScoreSummary(texts=count, reused=len(texts) - len(missing), failed=failed, stopped=stopped, file=str(out))


def _scored(ledger: Ledger, settings: CollectSettings) -> set[str]:
    if settings.is_local:
        return ledger.scored(settings.logprobs.top_k)
    return {key for key, state in ledger.states().items() if state is State.DONE}


def _ask(
    ledger: Ledger, texts: Sequence[tuple[str, PlainText]], settings: CollectSettings, options: Options
) -> str | None:
    from terselm.data.collection.remote import Remote, ask_all, score_task

    states = ledger.states()
    tasks = [score_task(key, text, settings) for key, text in texts if states[key] is State.WAITING]
    with CollectionProgress(len(tasks), f"Scoring with {settings.target}", "text") as progress:
        return ask_all(Remote(settings, options), ledger, tasks, progress)


def _scores(ledger: Ledger, texts: Sequence[tuple[str, PlainText]], settings: CollectSettings) -> Iterator[ScoredText]:
    if settings.is_local:
        yield from stored_scores(ledger, texts)
        return
    for key, text in texts:
        if (raw := ledger.raw(key)) is not None:
            yield text_scores(text, raw, settings.logprobs)


def _asked(text: PlainText, settings: CollectSettings) -> dict[str, Any]:
    return {"text": text.text, "model": settings.target, "top_k": settings.logprobs.top_k}


def _key(text: PlainText, settings: CollectSettings) -> str:
    asked = json.dumps(_asked(text, settings), sort_keys=True)
    return hashlib.sha256(f"score:{asked}".encode()).hexdigest()[:20]
