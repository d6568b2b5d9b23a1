"""What labels of utility will still use: tokens and cost, as expected and at most.

An answer is scored after many thinned forms of its prompt. How long these are follows from the characters that each
keeps, and from the tokens of the whole prompt: of a local target as it counts them, of an endpoint as it has counted
others, or roughly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from terselm.data.collection.admission import PromptSizes, prompt_bytes
from terselm.data.collection.answer_scores import rendered_ids
from terselm.data.collection.collect import open_ledger
from terselm.data.collection.estimate import (
    BYTES_PER_TOKEN,
    CostEstimate,
    Guess,
    cost_of,
    estimate_requests,
    systematic_sample,
)
from terselm.data.collection.label_plan import AnswerQuestion, PromptToLabel, in_groups
from terselm.data.collection.labelling import Labelling
from terselm.data.collection.labels import plan_labels
from terselm.data.collection.ledger import State
from terselm.data.collection.settings import CollectSettings, Options, Price, PromptScores, read_price
from terselm.data.schema import Message, Role
from terselm.errors import ConfigError

_AT_ONCE = 64  # prompts that are tokenised together


def estimate_labels(
    prompts: Sequence[PromptToLabel],
    out: Path,
    settings: CollectSettings,
    options: Options | None = None,
    *,
    pilot: int = 0,
) -> CostEstimate:
    """Judge by the prompts, and by what the ledger has, what labelling the others will take.

    Args:
        pilot: label so many prompts first, of all lengths; they are paid for, and count.

    Raises:
        ConfigError: as `collect_labels`; or ``pilot`` is negative.
    """
    if pilot < 0:
        raise ConfigError(f"pilot is {pilot}; expected 0 or more prompts")
    options = options or Options()
    price = read_price(options.prices, settings.target)
    plan = plan_labels(prompts, out, settings, options)
    with open_ledger(out, ()) as ledger:
        labelling = Labelling(ledger, prompts, plan, options)
        if pilot:
            labelling.ask(_spread(labelling.unlabelled(), pilot, settings.seed))
        states, uses = ledger.states(), ledger.uses()
        own = list({request.id: request for request in labelling.own.values()}.values())
        answered = [(request, uses[request.id]) for request in own if request.id in uses]
        waiting = [request for request in own if states.get(request.id, State.WAITING) is State.WAITING]
        answers = estimate_requests(answered, waiting, plan.settings, price)
        lengths = [use.completion_tokens for _, use in answered] or [settings.max_new_tokens]
        sizes = (_local_sizes if settings.is_local else _remote_sizes)(labelling, fmean(lengths))
    return _sum(answers, sizes, settings, price)


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """Of all scores that are still to be asked for: how many, tokens read, and what these are known from."""

    count: int
    basis: str
    tokens: Guess


def _local_sizes(labelling: Labelling, answer_tokens: float) -> _Sizes:
    """By the tokens of whole prompts; a thinned one has its share of them, by characters."""
    from terselm.models import load_tokenizer

    settings = labelling.plan.settings
    tokenizer = load_tokenizer(settings.local_name)
    states = labelling.ledger.states()
    count, expected, most = 0, 0.0, 0.0
    for group in in_groups(labelling.prompts, _AT_ONCE):
        asked = [(one, questions) for one in group if (questions := labelling.expected_questions(one, states))]
        whole = [labelling.plan.whole(one) for one, _ in asked]
        for (one, questions), text, ids in zip(
            asked, whole, rendered_ids(tokenizer, whole, chat=labelling.plan.chat), strict=True
        ):
            answer = questions[0].answer.strip()
            known = len(tokenizer(answer, add_special_tokens=False).input_ids) if answer else answer_tokens
            longest = len(ids) + (known if answer else settings.max_new_tokens)
            count += len(questions)
            expected += sum(len(ids) * len(one.before) / max(1, len(text)) + known for one in questions)
            most += len(questions) * longest
    return _Sizes(
        count=count, basis="tokenizer", tokens=Guess(expected=expected, low=expected, high=expected, at_most=most)
    )


def _remote_sizes(labelling: Labelling, answer_tokens: float) -> _Sizes:
    """By the tokens per byte of what the endpoint has scored; else roughly."""
    uses, states, sizes = labelling.ledger.uses(), labelling.ledger.states(), PromptSizes()
    settings = labelling.plan.settings
    known_bytes = known_tokens = 0
    for question in (question for one in labelling.prompts for question in labelling.questions(one)):
        if (use := uses.get(question.key)) is not None and use.prompt_tokens:
            sizes.learn(_message(question), use.prompt_tokens)
            known_bytes += prompt_bytes(_message(question))
            known_tokens += use.prompt_tokens
    density = known_tokens / known_bytes if known_bytes else 1 / BYTES_PER_TOKEN
    count, expected, most = 0, 0.0, 0.0
    for question in (question for one in labelling.prompts for question in labelling.expected_questions(one, states)):
        answer = 0 if question.answer.strip() else 1  # whether it is still to be made
        count += 1
        expected += density * prompt_bytes(_message(question)) + answer * answer_tokens
        most += sizes.bound(_message(question)) + answer * settings.max_new_tokens
    tokens = Guess(expected=expected, low=expected, high=expected if known_bytes else most, at_most=most)
    return _Sizes(count=count, basis="answers" if known_bytes else "bytes", tokens=tokens)


def _message(question: AnswerQuestion) -> list[Message]:
    text = question.before + question.answer
    return [Message(role=Role.USER, content=text)] if text.strip() else []


def _spread(prompts: Sequence[PromptToLabel], count: int, seed: int) -> list[PromptToLabel]:
    """Of every length."""
    return systematic_sample([one for group in in_groups(prompts, _AT_ONCE) for one in group], count, seed)


def _sum(answers: CostEstimate, sizes: _Sizes, settings: CollectSettings, price: Price) -> CostEstimate:
    """Own answers and scores together. vLLM generates a token with each score, ``echo`` none."""
    each = 1 if settings.logprobs.of_texts is PromptScores.VLLM and not settings.is_local else 0
    made = each * sizes.count
    prompt = _plus(answers.prompt_tokens, sizes.tokens)
    completion = _plus(answers.completion_tokens, Guess(expected=made, low=made, high=made, at_most=made))
    return CostEstimate(
        requests=answers.requests + sizes.count,
        answers_known=answers.answers_known,
        prompt_basis=sizes.basis,
        prompt_tokens=prompt,
        completion_tokens=completion,
        cost=cost_of(price, prompt, completion),
    )


def _plus(one: Guess, other: Guess) -> Guess:
    def total(name: str) -> float | None:
        values = getattr(one, name), getattr(other, name)
        return None if None in values else sum(values)

    return Guess(expected=total("expected"), low=total("low"), high=total("high"), at_most=one.at_most + other.at_most)
