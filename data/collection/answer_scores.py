"""Have a target say how likely given answers are after given prompts; what is known is committed to the ledger.

The record of such a question is ``{"nats": −log p(answer), "tokens": of the answer}``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from terselm.data.collection.label_plan import AnswerQuestion
from terselm.data.collection.ledger import Intent, Ledger, Outcome
from terselm.data.collection.outcome import CollectionProgress, answer_found_likely
from terselm.data.collection.settings import CollectSettings, Price
from terselm.data.logprobs import ScoredText
from terselm.data.schema import PlainText
from terselm.models.chat import chat_text

if TYPE_CHECKING:
    from terselm.data.collection.remote import Remote, Task
    from terselm.models import CausalLM


def score_locally(
    lm: CausalLM,
    ledger: Ledger,
    questions: Sequence[AnswerQuestion],
    attempts: Mapping[str, int],
    progress: CollectionProgress,
    *,
    chat: bool,
) -> None:
    """Score each answer after its prompt, the longest first; each pass of the model is committed before the next.

    Args:
        attempts: that were made before, by key.
        chat: read prompts through the chat template.

    Raises:
        ModelError: the chat template refuses a prompt; or the memory is too small for a single one.
    """
    from terselm.data.logprobs import score_texts

    prompts = prompt_ids(lm, [question.before for question in questions], chat=chat)
    texts = [PlainText(id=question.key, text=question.answer) for question in questions]
    lengths = {question.key: len(ids) for question, ids in zip(questions, prompts, strict=True)}
    intents = {key: Intent(request=key, number=attempts.get(key, 0) + 1) for key in lengths}
    ledger.begin(intents.values())
    for batch in score_texts(lm, texts, prompts=prompts):
        outcomes = [_known(intents[scored.id], scored, lengths[scored.id]) for scored in batch]
        ledger.finish(outcomes)
        for outcome in outcomes:
            progress.update(outcome)


def too_long(lm: CausalLM, questions: Sequence[AnswerQuestion], *, chat: bool) -> dict[str, tuple[int, int]]:
    """By label, the tokens of prompt and answer where these do not fit into the model's window together.

    Raises:
        ModelError: the chat template refuses a prompt.
    """
    answers = lm.tokenizer([question.answer for question in questions], add_special_tokens=False).input_ids
    prompts = prompt_ids(lm, [question.before for question in questions], chat=chat)
    return {
        question.label: (len(ids), len(answer))
        for question, ids, answer in zip(questions, prompts, answers, strict=True)
        if len(ids) + len(answer) > lm.window
    }


def prompt_ids(lm: CausalLM, prompts: Sequence[str], *, chat: bool) -> list[list[int]]:
    """Token ids as the model reads prompts: as its chat template has them, or after the start token.

    Raises:
        ModelError: the chat template refuses a prompt.
    """
    start = [] if chat else [lm.start_id]
    return [[*start, *ids] for ids in rendered_ids(lm.tokenizer, prompts, chat=chat)]


def rendered_ids(tokenizer: Any, prompts: Sequence[str], *, chat: bool) -> list[list[int]]:
    """The same, without the start token of plain text."""
    if not prompts:
        return []
    texts = [chat_text(tokenizer, prompt) for prompt in prompts] if chat else list(prompts)
    return list(tokenizer(texts, add_special_tokens=False, verbose=False).input_ids)


def score_remotely(
    remote: Remote, ledger: Ledger, questions: Sequence[AnswerQuestion], progress: CollectionProgress
) -> str | None:
    """Have an endpoint score prompt and answer as one text; return why it stopped before all were scored, if it did."""
    from terselm.data.collection.remote import ask_all

    tasks = [_task(question, remote.settings) for question in questions]
    return ask_all(remote, ledger, tasks, progress)


def _task(question: AnswerQuestion, settings: CollectSettings) -> Task:
    from terselm.data.collection.remote import score_task

    text = PlainText(id=question.key, text=question.before + question.answer, response_start=len(question.before))
    return replace(score_task(question.key, text, settings), outcome=partial(_told, text, settings))


def _told(text: PlainText, settings: CollectSettings, intent: Intent, raw: bytes, price: Price) -> Outcome:
    """What an endpoint says of a text.

    Raises:
        ValueError: the response does not tell the log-probabilities of the answer.
    """
    from terselm.data.collection.outcome import scored
    from terselm.data.collection.scores import text_scores

    found = text_scores(text, raw, settings.logprobs)
    return answer_found_likely(scored(text, settings.logprobs, intent, raw, price), _nats(found))


def _known(intent: Intent, scored: ScoredText, prompt_tokens: int) -> Outcome:
    nats = _nats(scored)
    used = Outcome(
        request=intent.request,
        number=intent.number,
        outcome="",
        prompt_tokens=prompt_tokens + len(nats),
        completion_tokens=0,
    )
    return answer_found_likely(used, nats)


def _nats(scored: ScoredText) -> list[float]:
    """−log p of each token of the answer; a token belongs to the text that it starts in."""
    nats: list[float] = (-scored.logprobs[scored.starts >= (scored.response_start or 0)]).tolist()
    return nats
