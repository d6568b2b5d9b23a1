"""Ask a target that runs in this process, batch by batch, with the same ledger as for an endpoint."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from terselm.data.collection.ledger import ANSWERED, Intent, Ledger, State
from terselm.data.collection.outcome import CollectionProgress, drawn
from terselm.data.collection.plan import Request, prompt_text
from terselm.data.collection.settings import CollectSettings
from terselm.data.generate import Answer, Limits, Query, encode, generate
from terselm.data.schema import PlainText
from terselm.errors import TargetLLMError
from terselm.models import CausalLM
from terselm.models.memory import free_bytes, in_halves, kv_bytes
from terselm.progress import Progress

_log = logging.getLogger(__name__)
_MOST = 1024  # answers together
_ON_A_CPU = 32
_SHARE = 0.7  # of the free memory
_CACHE_COPIES = 2  # a cache that grows is copied
_LOGIT_COPIES = 6  # as they come, in float32, sorted, and their probabilities


def answer_all(
    lm: CausalLM, ledger: Ledger, pending: Sequence[Request], settings: CollectSettings, progress: CollectionProgress
) -> None:
    """Generate until each request has a record or is dropped; every batch is committed before the next begins.

    A sampled answer with a fault (see `faults`) is drawn again with the next seed, once all others have been drawn.
    One that still loops after the last draw is cut after its first cycle; with another fault, it is dropped. A greedy
    answer has but one draw.

    Raises:
        ContextLengthError: a prompt and its answer do not fit into the model's window; before anything is generated.
        ConfigError: the model needs a template.
        TargetLLMError: there is not memory enough for a single answer.
    """
    limits = Limits(max_new_tokens=settings.max_new_tokens, top_p=settings.top_p, top_k=settings.top_k)
    prompts = {request.id: prompt_text(request, lm.tokenizer) for request in pending}
    lengths = {name: len(encode(lm, prompt, settings.max_new_tokens)) for name, prompt in prompts.items()}
    attempts, draws = Counter(ledger.attempts()), Counter(ledger.attempts([ANSWERED]))
    size = _BatchSize(lm, settings.batch_size)
    while pending:
        again: list[Request] = []
        for batch in _batches(pending, lengths, size, settings.max_new_tokens):
            attempts.update(request.id for request in batch)
            draws.update(request.id for request in batch)
            intents = [Intent(request=request.id, number=attempts[request.id]) for request in batch]
            ledger.begin(intents)
            answers = size.generate([_query(r, prompts[r.id], draws[r.id]) for r in batch], limits)
            outcomes = []
            for request, intent, answer in zip(batch, intents, answers, strict=True):
                draw = draws[request.id]
                last = draw >= settings.attempts or request.temperature == 0
                outcomes.append(drawn(request, intent, answer, draw=draw, last=last))
                if outcomes[-1].state is State.WAITING:
                    again.append(request)
            ledger.finish(outcomes)
            for outcome in outcomes:
                progress.update(outcome)
        pending = again


def _batches(
    pending: Sequence[Request], lengths: Mapping[str, int], size: _BatchSize, new_tokens: int
) -> Iterator[list[Request]]:
    """Longest prompts first; a prompt of less than half the tokens of a batch's first goes into the next batch."""
    batch: list[Request] = []
    most = 0
    for request in sorted(pending, key=lambda request: (-lengths[request.id], request.id)):
        if batch and (len(batch) >= most or 2 * lengths[request.id] < lengths[batch[0].id]):
            yield batch
            batch = []
        if not batch:
            most = size.rows(lengths[request.id] + new_tokens)
        batch.append(request)
    yield batch


def _query(request: Request, prompt: str, draw: int) -> Query:
    return Query(
        prompt=prompt,
        temperature=request.temperature,
        seed=request.seed + draw - 1,
        stop=tuple(request.template.stop) if request.template else (),
    )


class _BatchSize:
    """How many answers are generated together: as many as fit, and fewer once they turn out not to.

    Args:
        lm: the model that generates.
        asked: the user's number; None for what the memory allows.
    """

    def __init__(self, lm: CausalLM, asked: int | None) -> None:
        self._lm = lm
        self._asked = asked
        self._most = asked or _MOST

    def rows(self, tokens: int) -> int:
        """How many rows of so many tokens, prompt and answer, fit."""
        model = self._lm.model
        if self._asked is not None:
            return self._most
        if model.device.type != "cuda":
            return min(self._most, _ON_A_CPU)
        logits = 4 * int(model.config.get_text_config().vocab_size)
        row = _CACHE_COPIES * kv_bytes(model, model.dtype) * tokens + _LOGIT_COPIES * logits
        return max(1, min(self._most, int(_SHARE * free_bytes(model.device) // row)))

    def generate(self, queries: Sequence[Query], limits: Limits) -> list[Answer]:
        """As `generate`, in halves where the memory is too small for all.

        Raises:
            TargetLLMError: it is too small for one.
        """

        def read(part: Sequence[Query]) -> list[Answer]:
            if len(part) < min(len(queries), self._most):  # the memory was too small for more
                self._most = len(part)
                _log.info("out of memory with %s answers together; going on with %s", len(queries), self._most)
            return generate(self._lm, part, limits)

        def too_large(query: Query) -> TargetLLMError:
            return TargetLLMError(
                f"the memory of {self._lm.model.device} is too small for one answer; lower max_new_tokens, or "
                "shorten the prompts"
            )

        return in_halves(read, queries, too_large)


def score_all(lm: CausalLM, ledger: Ledger, texts: Sequence[tuple[str, PlainText]], top_k: int) -> None:
    """Score (key in the ledger, text); each pass is committed before the next begins."""
    from terselm.data.collection.scores import pack
    from terselm.data.score import score_texts

    with Progress(len(texts), f"Scoring with {lm.name}", "text") as progress:
        for batch in score_texts(lm, [replace(text, id=key) for key, text in texts], top_k):
            ledger.put_scores(((scored.id, pack(scored)) for scored in batch), top_k)
            progress.update(len(batch))


def score_records(load: Callable[[], CausalLM], ledger: Ledger, requests: Sequence[str], top_k: int) -> None:
    """Score the records of these requests, as raw text, where the ledger has no scores of them.

    Args:
        load: gives the target; not called where nothing is missing.
    """
    from terselm.data.collection.scores import text_of, unscored

    if missing := unscored(ledger, requests, top_k):
        score_all(load(), ledger, [(name, text_of(ledger, name)) for name in missing], top_k)
