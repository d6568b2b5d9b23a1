"""The engine on a GPU: the fused kernel, recorded passes, and the same choices as on the CPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_families import DEMONSTRATIONS, FAMILIES, INSTRUCTION, QUESTION, family_lm
from transformers import LlamaForCausalLM

from terselm import Prompt, PromptCompressor
from terselm.compress.settings import paper_settings
from terselm.models import CausalLM

pytestmark = pytest.mark.gpu

PROMPTS = [
    Prompt(demonstrations=(DEMONSTRATIONS * 3)[:n], instruction=INSTRUCTION[: 5 * n], question=QUESTION)
    for n in range(10)
]


def on_gpu(lm: CausalLM) -> CausalLM:
    return CausalLM(model=copy.deepcopy(lm.model).cuda(), tokenizer=lm.tokenizer, name=lm.name)


def compressor(lm: CausalLM, *, graphs: bool = True) -> PromptCompressor:
    made = PromptCompressor(lm, settings=paper_settings(segment_size=20, cache_bytes=0))
    if not graphs:
        made._reader._engine._graphs = None
    return made


def kept(results: list[Any]) -> list[list[bool]]:
    return [[token.kept for token in result.tokens] for result in results]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 7), (5, 4096), (33, 49152), (3, 262145)])
def test_the_fused_kernel(rows: int, vocabulary: int, dtype: torch.dtype) -> None:
    from terselm.models.surprisal_kernel import nll, nll_and_slopes

    torch.manual_seed(0)
    logits = (torch.randn(rows, vocabulary, device="cuda") * 8).to(dtype)
    targets = torch.randint(0, vocabulary, (rows,), device="cuda")
    expected = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    assert torch.allclose(nll(logits, targets).double(), expected, atol=1e-4, rtol=1e-5)
    slopes = logits.double().softmax(-1)
    slopes[torch.arange(rows), targets] -= 1
    nats, found = nll_and_slopes(logits.clone(), targets, None)
    assert torch.allclose(nats.double(), expected, atol=1e-4, rtol=1e-5)
    assert torch.allclose(found.double(), slopes, atol=1e-5, rtol=1e-2 if dtype != torch.float32 else 1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_recorded_passes_choose_as_the_cpu_does(name: str) -> None:
    lm = family_lm(name)
    expected = kept(compressor(lm).compress_batch(PROMPTS, rate=0.4))
    recorded = compressor(on_gpu(lm))
    for _ in range(2):  # the second time every pass is a replay
        assert kept(recorded.compress_batch(PROMPTS, rate=0.4)) == expected
    assert kept([recorded.compress_batch([prompt], rate=0.4)[0] for prompt in PROMPTS]) == expected
    assert recorded._reader._engine._graphs is not None
    assert recorded._reader._engine._graphs._graphs


def test_without_recording() -> None:
    lm = family_lm("llama")
    expected = kept(compressor(lm).compress_batch(PROMPTS, rate=0.4))
    assert kept(compressor(on_gpu(lm), graphs=False).compress_batch(PROMPTS, rate=0.4)) == expected


def test_memory_does_not_grow_with_vocabulary_times_tokens() -> None:
    lm = family_lm("llama")
    config = copy.deepcopy(lm.model.config)
    config.vocab_size = 50_000
    wide = CausalLM(model=LlamaForCausalLM(config).eval(), tokenizer=lm.tokenizer, name="wide")
    engine = compressor(on_gpu(wide))._reader._engine
    texts = [torch.randint(0, 50_000, (500,)).numpy() for _ in range(256)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    engine.score_texts(texts)
    assert torch.cuda.max_memory_allocated() - before < 2 << 30  # all logits at once would be 25 GB
