"""Ask a target that runs in this process, batch by batch, with the same ledger as for an endpoint."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from terselm.data.collection.ledger import ANSWERED, Intent, Ledger, Outcome, State
from terselm.data.collection.outcome import CollectionProgress, drawn
from terselm.data.collection.plan import Request, local_prompt
from terselm.data.collection.settings import CollectSettings
from terselm.data.generate import Answer, Engine, Limits, Query, encode, generate
from terselm.data.schema import PlainText
from terselm.errors import TargetLLMError
from terselm.models import CausalLM
from terselm.models.chat import ChatMode
from terselm.models.memory import free_bytes, in_halves, kv_bytes
from terselm.progress import Progress

_log = logging.getLogger(__name__)
_MOST = 1024  # answers together
_ON_A_CPU = 32
_SHARE = 0.7  # of the free memory
_CACHE_COPIES = 2  # a cache that grows is copied
_LOGIT_COPIES = 6  # as they come, in float32, sorted, and their probabilities
_MOST_THROUGH_SLOTS = 1 << 13  # answers that one set of slots is refilled for
_COMMIT_SECONDS = 1.0  # between two commits of what the slots answer


def answer_all(
    lm: CausalLM,
    ledger: Ledger,
    pending: Sequence[Request],
    settings: CollectSettings,
    progress: CollectionProgress,
    engine: Engine = Engine.AUTO,
) -> None:
    """Generate until each request has a record or is dropped; answers are committed as they become known.

    A sampled answer with a fault (see `faults`) is drawn again with the next seed, once all others have been drawn.
    One that still loops after the last draw is cut after its first cycle; with another fault, it is dropped. A greedy
    answer has but one draw.

    Raises:
        ContextLengthError: a prompt and its answer do not fit into the model's window; before anything is generated.
        ConfigError: the model needs a template.
        ModelError: the chat template refuses a prompt.
        TargetLLMError: there is not memory enough for a single answer.
    """
    limits = Limits(max_new_tokens=settings.max_new_tokens, top_p=settings.top_p, top_k=settings.top_k)
    prompts = {request.id: local_prompt(request, lm.tokenizer) for request in pending}
    lengths = {name: len(encode(lm, prompt, settings.max_new_tokens)) for name, prompt in prompts.items()}
    _say_form(lm, pending, settings)
    attempts, draws = Counter(ledger.attempts()), Counter(ledger.attempts([ANSWERED]))
    answers = (_RefilledAnswers if _takes_slots(lm, engine) else _BatchedAnswers)(lm, settings.batch_size)
    while pending:
        again: list[Request] = []
        for batch in _batches(pending, lengths, answers, settings.max_new_tokens):
            attempts.update(request.id for request in batch)
            draws.update(request.id for request in batch)
            intents = [Intent(request=request.id, number=attempts[request.id]) for request in batch]
            ledger.begin(intents)
            queries = [_query(request, prompts[request.id], draws[request.id]) for request in batch]
            for known in answers.each(queries, limits):
                outcomes = [
                    _outcome(batch[index], intents[index], answer, draws[batch[index].id], settings)
                    for index, answer in known
                ]
                ledger.finish(outcomes)
                for outcome, (index, _) in zip(outcomes, known, strict=True):
                    progress.update(outcome)
                    if outcome.state is State.WAITING:
                        again.append(batch[index])
        pending = again


def _outcome(request: Request, intent: Intent, answer: Answer, draw: int, settings: CollectSettings) -> Outcome:
    last = draw >= settings.attempts or request.temperature == 0
    return drawn(request, intent, answer, draw=draw, last=last)


def _say_form(lm: CausalLM, pending: Sequence[Request], settings: CollectSettings) -> None:
    """Say that a collection goes on in plain templates with a chat model, since it was begun so."""
    plain = any(request.template is not None for request in pending)
    if plain and settings.chat == ChatMode.AUTO and getattr(lm.tokenizer, "chat_template", None):
        _log.info("%s has a chat template, but this collection was begun without it and goes on so", lm.name)


def _batches(
    pending: Sequence[Request], lengths: Mapping[str, int], answers: _RefilledAnswers | _BatchedAnswers, new_tokens: int
) -> Iterator[list[Request]]:
    """Longest prompts first; a prompt of less than half the tokens of a batch's first goes into the next batch."""
    batch: list[Request] = []
    most = 0
    for request in sorted(pending, key=lambda request: (-lengths[request.id], request.id)):
        if batch and (len(batch) >= most or 2 * lengths[request.id] < lengths[batch[0].id]):
            yield batch
            batch = []
        if not batch:
            most = answers.rows(lengths[request.id] + new_tokens)
        batch.append(request)
    yield batch


def _query(request: Request, prompt: str | tuple[int, ...], draw: int) -> Query:
    return Query(
        prompt=prompt,
        temperature=request.temperature,
        seed=request.seed + draw - 1,
        stop=tuple(request.template.stop) if request.template else (),
    )


def _takes_slots(lm: CausalLM, engine: Engine) -> bool:
    """Whether answers are decoded in slots: on a GPU, where the model suits them."""
    if engine is Engine.LOOP or (engine is Engine.AUTO and lm.model.device.type != "cuda"):
        return False
    from terselm.data.slots import UnsuitableModelError, decode

    try:
        list(decode(lm, [Query(prompt="", temperature=0.0, seed=0)], Limits(max_new_tokens=1)))
    except UnsuitableModelError as error:
        _log.warning("%s is decoded step by step, which is slower: %s", lm.name, error)
        return False
    return True


class _RefilledAnswers:
    """Answers from slots that are refilled, so that none waits for the longest of a batch.

    Args:
        lm: the model that generates.
        asked: the user's number of slots; None for what the memory allows.
    """

    def __init__(self, lm: CausalLM, asked: int | None) -> None:
        self._lm = lm
        self._asked = asked

    def rows(self, tokens: int) -> int:
        """How many answers go through one set of slots."""
        return _MOST_THROUGH_SLOTS

    def each(self, queries: Sequence[Query], limits: Limits) -> Iterator[list[tuple[int, Answer]]]:
        """Answers with the indices of their queries, in groups to be committed together.

        Raises:
            TargetLLMError: the memory is too small for one.
        """
        import torch

        from terselm.data.slots import decode

        group: list[tuple[int, Answer]] = []
        since = time.monotonic()
        try:
            for found in decode(self._lm, queries, limits, slots=self._asked):
                group.append(found)
                if time.monotonic() - since >= _COMMIT_SECONDS:
                    yield group
                    group, since = [], time.monotonic()
        except torch.OutOfMemoryError:
            raise _too_large(self._lm) from None
        if group:
            yield group


class _BatchedAnswers:
    """Answers in batches that are decoded together: as many as fit, and fewer once they turn out not to.

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

    def each(self, queries: Sequence[Query], limits: Limits) -> Iterator[list[tuple[int, Answer]]]:
        """All answers with the indices of their queries, made in halves where the memory is too small for all.

        Raises:
            TargetLLMError: it is too small for one.
        """

        def read(part: Sequence[Query]) -> list[Answer]:
            if len(part) < min(len(queries), self._most):  # the memory was too small for more
                self._most = len(part)
                _log.info("out of memory with %s answers together; going on with %s", len(queries), self._most)
            return generate(self._lm, part, limits, engine=Engine.LOOP)

        yield list(enumerate(in_halves(read, queries, lambda _: _too_large(self._lm))))


def _too_large(lm: CausalLM) -> TargetLLMError:
    return TargetLLMError(
        f"the memory of {lm.model.device} is too small for one answer; lower max_new_tokens, or shorten the prompts"
    )


def score_all(
    lm: CausalLM,
    ledger: Ledger,
    texts: Sequence[tuple[str, PlainText]],
    top_k: int,
    prompts: Sequence[Sequence[int]] | None = None,
) -> None:
    """Score (key in the ledger, text), after these prompts if there are any; each pass is committed before the next."""
    from terselm.data.collection.scores import pack
    from terselm.data.logprobs import score_texts

    with Progress(len(texts), f"Scoring with {lm.name}", "text") as progress:
        for batch in score_texts(lm, [replace(text, id=key) for key, text in texts], top_k, prompts):
            ledger.put_scores(((scored.id, pack(scored)) for scored in batch), top_k)
            progress.update(len(batch))


def score_records(load: Callable[[], CausalLM], ledger: Ledger, requests: Sequence[Request], top_k: int) -> None:
    """Score the records of these requests where the ledger has no scores of them.

    In a chat the answer is scored after the prompt as it was asked; else prompt and answer, as raw text.

    Args:
        load: gives the target; not called where nothing is missing.
    """
    from terselm.data.collection.scores import text_of, unscored

    missing = set(unscored(ledger, [request.id for request in requests], top_k))
    for chat in (False, True):
        if part := [request for request in requests if request.id in missing and request.chat is chat]:
            lm = load()
            texts = [(request.id, text_of(ledger, request)) for request in part]
            prompts = [encode(lm, local_prompt(request, lm.tokenizer), 0) for request in part] if chat else None
            score_all(lm, ledger, texts, top_k, prompts)
