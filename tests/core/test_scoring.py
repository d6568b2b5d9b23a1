"""Scores of given tokens: both window rules beside a pass a token, batches, skips, and what hooks into them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from fakes import random_lm

from terselm.models import CausalLM, scoring
from terselm.models.memory import free_bytes, kv_bytes
from terselm.models.reading import cache_argument, cache_of, last_states
from terselm.models.scoring import RowScorer, Window, token_batches

GENERATOR = np.random.default_rng(0)
ROWS = [GENERATOR.integers(3, 300, size) for size in (7, 120, 0, 1, 64, 33)]


def one_by_one(lm: CausalLM, ids: np.ndarray) -> np.ndarray:
    """−log p of each token, from the whole logits."""
    row = torch.tensor([[lm.start_id, *ids.tolist()]])
    with torch.no_grad():
        log_p = lm.model(input_ids=row).logits[0].double().log_softmax(-1)
    return -log_p[np.arange(len(ids)), ids].numpy()


def expected(lm: CausalLM, ids: np.ndarray, window: Window) -> np.ndarray:
    """By the definition of each rule, token by token."""
    room = lm.window - 1
    nats = []
    for place in range(len(ids)):
        if window is Window.PIECES:
            begin = place // room * room
        else:
            step = room - room // 2
            begin = max(0, -(-(place + 1 - room) // step)) * step
        nats.append(one_by_one(lm, ids[begin : place + 1])[-1])
    return np.array(nats)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma"])
@pytest.mark.parametrize("window", Window)
def test_both_window_rules(kind: str, window: Window) -> None:
    lm = random_lm(kind, window=33)
    scores = dict(RowScorer(lm).score(ROWS, window=window))
    assert sorted(scores) == list(range(len(ROWS)))
    for number, row in enumerate(ROWS):
        np.testing.assert_allclose(scores[number].nats, expected(lm, row, window), atol=2e-4)
        assert scores[number].top_nats is None


@pytest.mark.parametrize("window", Window)
def test_what_is_skipped_is_read(window: Window) -> None:
    lm = random_lm("llama", window=33)
    skips = [3, 90, 0, 1, 64, 10]
    scores = dict(RowScorer(lm).score(ROWS, skips=skips, window=window))
    for number, (row, skip) in enumerate(zip(ROWS, skips, strict=True)):
        np.testing.assert_allclose(scores[number].nats, expected(lm, row, window)[skip:], atol=2e-4)


def test_the_likeliest_tokens() -> None:
    lm = random_lm("llama", window=33)
    scores = dict(RowScorer(lm).score(ROWS, top_k=4))
    for number, row in enumerate(ROWS):
        top, ids, nats = scores[number].top_nats, scores[number].top_ids, scores[number].nats
        assert top is not None
        assert ids is not None
        assert top.shape == ids.shape == (len(row), 4)
        assert (np.diff(top, axis=1) >= 0).all()
        among = ids == row[:, None]
        np.testing.assert_allclose(top[among], nats[among.any(axis=1)], atol=1e-5)


def test_rows_come_as_passes_complete_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scoring._TOKENS_AT_ONCE, "cpu", 130)
    passes = list(RowScorer(random_lm("llama")).passes(ROWS))
    assert [[number for number, _ in done] for done in passes] == [[2], [1], [4], [5], [0], [3]]


def test_states_may_come_from_elsewhere() -> None:
    lm = random_lm("llama")
    shapes = []

    def states_of(ids: np.ndarray) -> torch.Tensor | None:
        shapes.append(ids.shape)
        return last_states(lm.model, torch.from_numpy(ids.copy())) if len(shapes) % 2 else None

    usual, ours = dict(RowScorer(lm).score(ROWS)), dict(RowScorer(lm, states_of=states_of).score(ROWS))
    assert len(shapes) > 1
    for number, scores in usual.items():
        np.testing.assert_array_equal(ours[number].nats, scores.nats)


def test_too_little_memory_is_given_back_and_halved() -> None:
    lm = random_lm("llama")
    given_back = []

    def states_of(ids: np.ndarray) -> None:
        if len(ids) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    rows = [ROWS[0]] * 4
    scorer = RowScorer(lm, states_of=states_of, give_back=lambda: given_back.append(1))
    scores = dict(scorer.score(rows))
    assert len(given_back) == 3  # 4 rows, then 2 and 2
    np.testing.assert_allclose(scores[3].nats, expected(lm, ROWS[0], Window.OVERLAP), atol=2e-4)


def test_batches_hold_rows_of_like_length() -> None:
    lengths = GENERATOR.integers(1, 500, 400).tolist()
    batches = list(token_batches(lengths, 2000))
    assert sorted(index for batch in batches for index in batch) == list(range(400))
    for batch in batches:
        longest = lengths[batch[0]]
        assert len(batch) * longest <= 2000
        assert all(lengths[index] >= (1 - 0.15) * longest or lengths[index] == longest for index in batch) or (
            sum(longest - lengths[index] for index in batch) == 0
        )
    assert all(lengths[a[-1]] >= lengths[b[0]] for a, b in pairwise(batches))
    assert list(token_batches([5000], 2000)) == [[0]]
    assert len(list(token_batches(lengths, 1 << 20, free_padding=1 << 20))) == 1


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma"])
def test_bytes_of_a_tokens_keys_and_values_are_those_of_a_real_cache(kind: str) -> None:
    lm = random_lm(kind)
    cache = cache_of(lm.model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=True))
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert kv_bytes(lm.model, torch.float32) * 3 == held
    assert kv_bytes(lm.model.config, torch.bfloat16) * 6 == held
    assert free_bytes(torch.device("cpu")) == 2 << 30


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma"])
def test_the_cache_goes_by_the_name_that_the_model_takes(kind: str) -> None:
    lm = random_lm(kind)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        whole = lm.model(input_ids=ids).logits[:, -1]
        before = lm.model(input_ids=ids[:, :3], use_cache=True)
        after = lm.model(input_ids=ids[:, 3:], use_cache=True, **cache_argument(lm.model, cache_of(before)))
    torch.testing.assert_close(after.logits[:, -1], whole)


def test_the_cache_goes_by_either_name() -> None:
    class Old:
        def forward(self, input_ids: object, past_key_values: object = None) -> None: ...

    class New:
        def forward(self, input_ids: object, cache: object = None) -> None: ...

    assert cache_argument(Old(), 1) == {"past_key_values": 1}
    assert cache_argument(New(), 1) == {"cache": 1}
