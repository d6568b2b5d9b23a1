"""From names to what they stand for: targets, small LMs, and the ways of shortening a prompt that are compared.

``terselm`` with settings after a colon (``terselm:k=1.2,anchor=0``), the paper's (``terselm:paper``), a part taken out
by name (``terselm:no-iteration``), another small LM (``terselm:model=runs/mine``), or all of these; the baselines of
`terselm.evaluate.baselines`; ``llmlingua``, and the same as ``longllmlingua``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from terselm.compress.length import Count
from terselm.compress.settings import PAPER_INSTRUCTION_RATE, PAPER_QUESTION_RATE, CompressionSettings
from terselm.config import load_config
from terselm.errors import ConfigError
from terselm.evaluate.baselines import BASELINES, Baseline, Rankers, Surprisals, Tools
from terselm.evaluate.methods import EvaluationMethod, Ours
from terselm.evaluate.settings import EvaluateSettings, TargetSettings
from terselm.evaluate.targets import EndpointTarget, LocalTarget, Target
from terselm.models import CausalLM, load_causal_lm

if TYPE_CHECKING:
    from terselm.compress.compressor import PromptCompressor

NAMED = {
    "paper": [
        f"instruction_rate={PAPER_INSTRUCTION_RATE}",
        f"question_rate={PAPER_QUESTION_RATE}",
        "unit=token",
        "rank_by=surprisal",
        "anchor=0",
    ],
    "no-budget-controller": ["ablations.selection=all", "ablations.uniform_rates=true"],
    "no-iteration": ["ablations.one_pass=true"],
    "no-perplexity-selection": ["ablations.selection=random"],
    "uniform-rates": ["ablations.uniform_rates=true"],
    "random-tokens": ["ablations.random_tokens=true"],
    "next-token": ["ablations.next_token=true"],
}
OURS = "terselm"
PEER = "llmlingua"
PEERS: dict[str, dict[str, Any]] = {  # what `compress_prompt` is called with
    PEER: {},
    "longllmlingua": {  # as its authors' examples for questions over documents have it
        "rank_method": "longllmlingua",
        "condition_in_question": "after_condition",
        "reorder_context": "sort",
        "dynamic_context_compression_ratio": 0.3,
        "condition_compare": True,
        "context_budget": "+100",
    },
}
READY = "ready"  # given by the caller


@dataclass(frozen=True, kw_only=True)
class MethodName:
    """A method as the user wrote it, taken apart.

    Attributes:
        text: as the user wrote it.
        kind: ``terselm``, ``llmlingua``, ``longllmlingua`` or a baseline.
        model: the small LM; empty for that of the evaluation.
        settings: of ``terselm``.
    """

    text: str
    kind: str
    model: str = ""
    settings: CompressionSettings = field(default_factory=CompressionSettings)


def parse_method(text: str) -> MethodName:
    """Take a method's name apart.

    Raises:
        ConfigError: an unknown method or setting.
    """
    kind, _, options = text.partition(":")
    known = [OURS, *PEERS, *BASELINES]
    if kind not in known:
        raise ConfigError(f"unknown method {kind!r}; expected one of {', '.join(known)}")
    model, overrides = "", []
    for option in filter(None, options.split(",")):
        key, equals, value = option.partition("=")
        if key == "model" and equals:
            model = value
        elif option in NAMED and kind == OURS:
            overrides += NAMED[option]
        elif equals and kind == OURS:
            overrides.append(option)
        else:
            raise ConfigError(
                f"method {text!r}: {option!r} is no option of {kind}; expected model=NAME"
                + (f", a setting such as k=1.2, or one of {', '.join(NAMED)}" if kind == OURS else "")
            )
    return MethodName(text=text, kind=kind, model=model, settings=load_config(CompressionSettings, None, overrides))


def open_target(settings: TargetSettings, folder: Path) -> Target:
    """Load a local target, or get ready to ask an endpoint.

    Args:
        folder: of the results, where an endpoint's answers are kept unless the settings name another place.
    """
    if settings.base_url:
        return EndpointTarget(settings, folder / "answers.jsonl")
    lm = load_causal_lm(settings.model, device=settings.device, dtype=settings.dtype)
    return LocalTarget(lm, settings.chat)


@dataclass(frozen=True)
class Workshop:
    """Builds methods; each small LM is loaded once.

    Attributes:
        settings: of the evaluation.
        target: a local one may be the small LM too.
        count: what budgets are counted in.
        ready: methods by name that need not be built.
    """

    settings: EvaluateSettings
    target: Target
    count: Count
    ready: Mapping[str, EvaluationMethod]
    _small_lms: dict[str, CausalLM] = field(default_factory=dict, init=False)
    _compressors: dict[str, PromptCompressor] = field(default_factory=dict, init=False)

    @contextmanager
    def method(self, name: MethodName) -> Iterator[EvaluationMethod]:
        """A method that is ready to work; what it holds is let go at the end."""
        settings = self.settings
        model = name.model or settings.model
        if name.kind == READY:
            yield self.ready[name.text]
        elif name.kind in PEERS:
            from terselm.evaluate.peer import Llmlingua

            with closing(Llmlingua(settings.llmlingua, model, settings.device, PEERS[name.kind])) as peer:
                yield peer
        elif name.kind == OURS:
            yield self._ours(name, model, lambda: self._small_lm(model))
        else:
            tools = Tools(
                count=self.count,
                surprisals=Surprisals(lambda: self._small_lm(model)),
                seed=settings.seed,
                ranker=Rankers(lambda: self._small_lm(model), settings.device),
            )
            yield Baseline(shorten=BASELINES[name.kind], tools=tools)

    def oracle(self, name: MethodName) -> EvaluationMethod:
        """The same method with the target itself as the small LM.

        Raises:
            ConfigError: the target is not a local model.
        """
        target = self.target
        if not isinstance(target, LocalTarget):
            raise ConfigError("oracle needs a local target; turn it off")
        return self._ours(name, "", lambda: target.lm)

    def _ours(self, name: MethodName, model: str, open_lm: Callable[[], CausalLM]) -> Ours:
        """Ours under the settings of ``name``, with a small LM; its compressor is known as ``model`` from then on."""
        from terselm.compress.compressor import PromptCompressor

        if model not in self._compressors:
            self._compressors[model] = PromptCompressor(open_lm())
        return Ours(compressor=self._compressors[model].with_settings(name.settings), count=self.count)

    def _small_lm(self, model: str) -> CausalLM:
        if model not in self._small_lms:
            self._small_lms[model] = load_causal_lm(model, device=self.settings.device, dtype=self.settings.dtype)
        return self._small_lms[model]
