"""Objectives: each equal to its formula in float64, in value and in gradient; and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from terselm.errors import ConfigError
from terselm.train.examples import NO_WORD, Example, Guide, UnitLabels
from terselm.train.objectives import Mixture
from terselm.train.settings import ObjectiveSettings
from terselm.train.trainer import Collator, StepCounts

VOCABULARY, TOP = 50, 4
Losses = Callable[[Example, NDArray[np.float64]], tuple[float, float]]


def guided(length: int, seed: int) -> Example:
    """Words of one to three tokens, some without an opinion; likeliest tokens for most positions."""
    draw = np.random.default_rng(seed)
    words = np.sort(draw.integers(0, length // 2, length))
    words = np.unique(words, return_inverse=True)[1]
    words[draw.random(length) < 0.2] = NO_WORD
    words[0] = NO_WORD
    numbers = np.unique(words[words >= 0], return_inverse=True)[1]
    words[words >= 0] = numbers
    top_ids = np.argsort(draw.random((length, VOCABULARY)), axis=1)[:, :TOP]
    top = np.log(draw.dirichlet(np.ones(TOP + 1), length)[:, :TOP])
    unknown = draw.random(length) < 0.3
    unknown[0] = True
    top_ids[unknown], top[unknown] = -1, -np.inf
    top_ids[-1, 2:], top[-1, 2:] = -1, -np.inf  # the target gave fewer
    counted = draw.random(length) < 0.5
    counted[0] = False
    guide = Guide(
        words=words.astype(np.int32),
        nats=draw.gamma(1.0, 3.0, numbers.max() + 1).astype(np.float32),
        top_ids=top_ids.astype(np.int32),
        top_logprobs=top.astype(np.float32),
    )
    return Example(draw.integers(0, VOCABULARY, length), counted, seed, guide)


EXAMPLES = [guided(40, 1), guided(17, 2), guided(300, 3)]
ROWS = [[EXAMPLES[0], EXAMPLES[1]], [EXAMPLES[2]]]


def by_word(example: Example, log_q: Tensor) -> Tensor:
    """Surprisal of each word, one by one."""
    assert example.guide is not None
    values = []
    for word in range(len(example.guide.nats)):
        tokens = np.flatnonzero(example.guide.words == word)
        values.append(-sum(log_q[t, example.ids[t]] for t in tokens))
    return torch.stack(values)


def kept(nats: Sequence[float], ratio: int) -> set[int]:
    order = sorted(range(len(nats)), key=lambda word: (-nats[word], word))
    return set(order[: max(1, round(len(nats) / ratio))])


def nll(example: Example, log_q: Tensor) -> tuple[Tensor, float]:
    places = np.flatnonzero(example.counted)
    return -sum(log_q[t, example.ids[t]] for t in places), float(len(places))


def matching(example: Example, log_q: Tensor, beta: float = 1.0, near: float = 0.0) -> tuple[Tensor, float]:
    assert example.guide is not None
    target = example.guide.nats.astype(float)
    total, weights = torch.zeros((), dtype=torch.float64), 0.0
    for s, t in zip(by_word(example, log_q), target, strict=True):
        edges = [min(target[w] for w in kept(target, ratio)) for ratio in (2, 5, 10)]
        weight = 1 + near * sum(math.exp(-abs(t - edge)) for edge in edges) / 3
        d = (s - t).abs()
        total = total + weight * (d**2 / (2 * beta) if d < beta else d - beta / 2)
        weights += weight
    return total, weights


def near_threshold(example: Example, log_q: Tensor) -> tuple[Tensor, float]:
    return matching(example, log_q, beta=0.5, near=3.0)


def ranking(example: Example, log_q: Tensor) -> tuple[Tensor, float]:
    assert example.guide is not None
    s, target = by_word(example, log_q), example.guide.nats.astype(float)
    total, pairs = torch.zeros((), dtype=torch.float64), 0
    for ratio in (2, 5, 10):
        above = kept(target, ratio)
        for i in range(len(s)):
            for j in range(len(s)):
                if i in above and j not in above and i // 128 == j // 128:
                    total = total + torch.log1p(torch.exp(-(s[i] - s[j])))
                    pairs += 1
    return total, float(pairs)


def divergence(example: Example, log_q: Tensor) -> tuple[Tensor, float]:
    assert example.guide is not None
    assert example.guide.top_ids is not None
    assert example.guide.top_logprobs is not None
    total, count = torch.zeros((), dtype=torch.float64), 0
    for t in range(len(example)):
        known = [k for k in range(TOP) if example.guide.top_ids[t, k] >= 0]
        if not known:
            continue
        count += 1
        p = np.exp(example.guide.top_logprobs[t, known].astype(float))
        q = log_q[t, example.guide.top_ids[t, known]]
        total = total + sum(a * (math.log(a) - b) for a, b in zip(p, q, strict=True))
        rest = 1 - p.sum()
        total = total + rest * (math.log(rest) - torch.log(1 - q.exp().sum()))
    return total, float(count)


CASES = [
    (ObjectiveSettings(), [(1.0, nll)]),
    (ObjectiveSettings(nll=0, matching=2.0, target="t"), [(2.0, matching)]),
    (
        ObjectiveSettings(nll=0, matching=1.0, turning_point=0.5, near_threshold=3.0, target="t"),
        [(1.0, near_threshold)],
    ),
    (ObjectiveSettings(nll=0, ranking=1.0, target="t"), [(1.0, ranking)]),
    (ObjectiveSettings(nll=0, divergence=1.0, target="t"), [(1.0, divergence)]),
    (
        ObjectiveSettings(nll=0.3, matching=1.0, ranking=0.5, divergence=0.7, target="t"),
        [(0.3, nll), (1.0, matching), (0.5, ranking), (0.7, divergence)],
    ),
]


@pytest.mark.parametrize(("settings", "formulas"), CASES)
def test_it_equals_the_formula_in_float64(settings: ObjectiveSettings, formulas: list[tuple[float, Losses]]) -> None:
    torch.manual_seed(0)
    logits = {example.record: torch.randn(len(example), VOCABULARY, dtype=torch.float64) * 2 for example in EXAMPLES}
    for value in logits.values():
        value.requires_grad_()
    expected = torch.zeros((), dtype=torch.float64)
    for weight, formula in formulas:
        found = [formula(example, logits[example.record].log_softmax(-1)) for example in EXAMPLES]  # type: ignore[arg-type]
        expected = expected + weight * sum(total for total, _ in found) / sum(count for _, count in found)
    objective = Mixture.of(settings)
    batch = Collator(objective=objective)(ROWS)
    log_q = torch.zeros(*batch["input_ids"].shape, VOCABULARY, dtype=torch.float64)
    for index, row in enumerate(ROWS):
        start = 0
        for example in row:  # the place before a token predicts it
            log_q[index, start : start + len(example) - 1] = logits[example.record][1:].log_softmax(-1)
            start += len(example)
    wanted = batch["wanted"] if batch["wanted"].dim() == 2 else batch["wanted"][:, None]
    surprisals = -log_q.flatten(0, 1)[batch["at"]].gather(1, wanted).float()
    surprisals = surprisals if batch["wanted"].dim() == 2 else surprisals[:, 0]
    units = StepCounts.of(ROWS, rows_per_step=2, objective=objective).units[0]
    loss = objective.loss(surprisals, batch, units.tolist())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    ours = torch.autograd.grad(loss, list(logits.values()), retain_graph=True)
    theirs = torch.autograd.grad(expected, list(logits.values()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


def test_the_losses_of_passes_add_up_to_that_of_the_step() -> None:
    settings = ObjectiveSettings(nll=0.3, matching=1.0, ranking=0.5, divergence=0.7, target="t", near_threshold=1.0)
    objective = Mixture.of(settings)
    units = StepCounts.of(ROWS, rows_per_step=2, objective=objective)
    assert units.tokens.tolist() == [357]

    def loss(rows: list[list[Example]]) -> float:
        batch = Collator(objective=objective, width=400)(rows)
        generator = np.random.default_rng(0)
        table = torch.tensor(generator.gamma(1.0, 3.0, (1000, VOCABULARY)), dtype=torch.float32) + 1.5
        positions = batch["position_ids"].flatten()[batch["at"]]
        return float(objective.loss(table[positions[:, None], batch["wanted"]], batch, units.units[0].tolist()))

    assert loss(ROWS) == pytest.approx(sum(loss([row]) for row in ROWS), rel=1e-5)


def test_examples_without_an_opinion_count_for_the_likelihood_alone() -> None:
    plain = Example(np.arange(6), np.array([False, True, True, True, False, False]), 0)
    objective = Mixture.of(ObjectiveSettings(nll=1.0, matching=1.0, target="t"))
    batch = Collator(objective=objective)([[plain]])
    units = StepCounts.of([[plain]], rows_per_step=1, objective=objective).units[0]
    assert units.tolist() == [3.0, 0.0]
    assert float(objective.loss(torch.tensor([1.0, 2.0, 3.0]), batch, units.tolist())) == 2.0


def labelled(ends: list[int], values: list[float], share: float = 1.0) -> Example:
    labels = UnitLabels(ends=np.array(ends, np.int32), values=np.array(values, np.float32), share=share)
    return Example(np.arange(12), np.zeros(12, dtype=np.bool_), 0, None, labels)


def utility_loss(rows: list[list[Example]], scores: Tensor, units: list[float]) -> Tensor:
    objective = Mixture.of(ObjectiveSettings(nll=0.0, utility=1.0))
    batch = Collator(objective=objective, width=40)(rows)
    return objective.loss(torch.zeros(0), {**batch, "scores": scores}, units)


def test_the_utility_of_three_units_by_hand() -> None:
    """u = (1, 0, −1), z = (0, 0.5, 0): pairs (1, 2), (2, 3) of weight 1, (1, 3) of weight 2."""
    softplus = lambda x: math.log1p(math.exp(x))  # noqa: E731
    order = (softplus(0.5) + softplus(-0.5) + 2 * softplus(0.0)) / 4
    size = (0.5 + 0.125 + 0.5) / 3
    found = utility_loss([[labelled([3, 6, 9], [1.0, 0.0, -1.0])]], torch.tensor([0.0, 0.5, 0.0]), [1.0])
    assert float(found) == pytest.approx(order + size)


def test_utilities_equal_a_reference_over_pairs() -> None:
    """Prompts of different sizes in different rows, a window of half of a prompt, a single unit, a text without."""
    draw = np.random.default_rng(0)
    sizes, shares = [4, 1, 7, 2], [1.0, 0.5, 0.5, 1.0]
    examples = [
        labelled(list(range(1, n + 1)), draw.normal(size=n).tolist(), s) for n, s in zip(sizes, shares, strict=True)
    ]
    plain = Example(np.arange(6), np.zeros(6, dtype=np.bool_), 0)
    rows = [[examples[0], plain, examples[1]], [plain], [examples[2], examples[3]]]
    scores = torch.tensor(draw.normal(size=sum(sizes)), dtype=torch.float32, requires_grad=True)
    expected = torch.zeros((), dtype=torch.float64)
    parts = scores.double().split(sizes)
    for example, z in zip(examples, parts, strict=True):
        assert example.labels is not None
        u = example.labels.values.astype(float)
        weights = {(i, j): u[i] - u[j] for i in range(len(u)) for j in range(len(u)) if u[i] > u[j]}
        loss = sum(
            ((z[i] - u[i]).abs() - 0.5) if abs(float(z[i] - u[i])) >= 1 else (z[i] - u[i]) ** 2 / 2
            for i in range(len(u))
        )
        loss = loss / len(u)
        if weights:
            terms = [w * torch.log1p(torch.exp(z[j] - z[i])) for (i, j), w in weights.items()]
            loss = loss + sum(terms) / sum(weights.values())
        expected = expected + example.labels.share * loss
    expected = expected / 3
    units = StepCounts.of(rows, rows_per_step=3, objective=Mixture.of(ObjectiveSettings(nll=0, utility=1))).units[0]
    assert units.tolist() == [3.0]
    loss = utility_loss(rows, scores, units.tolist())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(loss, scores)[0], torch.autograd.grad(expected, scores)[0], atol=1e-6, rtol=1e-4
    )


def test_a_pass_without_labelled_prompts_still_gives_the_head_a_gradient() -> None:
    """As processes that wait for each other's gradients need it."""
    scores = torch.zeros(0, requires_grad=True)
    plain = Example(np.arange(6), np.zeros(6, dtype=np.bool_), 0)
    loss = utility_loss([[plain]], scores, [3.0])
    assert loss.item() == 0.0
    (gradient,) = torch.autograd.grad(loss, scores)
    assert gradient.shape == (0,)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"utility": -1.0}, "objective.utility is -1.0; expected at least 0"),
        ({"question_dropped": 2.0}, r"objective.question_dropped is 2.0; expected a share in \[0, 1\]"),
        ({"nll": 0.0}, "all weights of objective are 0"),
        ({"matching": 1.0}, "objective.matching compares with the target; set objective.target"),
        ({"ranking": 1.0, "target": "a", "log_probabilities": "b"}, "objective.ranking compares with the target"),
        ({"nll": -1.0}, "objective.nll is -1.0; expected at least 0"),
        ({"top_k": 0}, "objective.top_k is 0"),
    ],
)
def test_mistakes(settings: dict[str, float | str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ObjectiveSettings(**settings)  # type: ignore[arg-type]
