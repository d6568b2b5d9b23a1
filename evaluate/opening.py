"""Opening what an evaluation works with: the target, the small LMs, the methods."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from terselm.compress.counter import Count
from terselm.errors import ConfigError
from terselm.evaluate.methods import OURS, PEER, READY, Method, MethodName
from terselm.evaluate.settings import EvaluateSettings, TargetSettings
from terselm.evaluate.targets import LocalTarget, Target
from terselm.models import CausalLM, load_causal_lm

if TYPE_CHECKING:
    from terselm.compress.compressor import PromptCompressor


def open_target(settings: TargetSettings, folder: Path) -> Target:
    """Load a local target, or get ready to ask an endpoint.

    Args:
        folder: of the results, where an endpoint's answers are kept unless the settings name another place.
    """
    if settings.base_url:
        from terselm.evaluate.endpoint import EndpointTarget

        return EndpointTarget(settings, folder / "answers.jsonl")
    return LocalTarget(load_causal_lm(settings.model, device=settings.device, dtype=settings.dtype))


class Workshop:
    """Builds methods; each small LM is loaded once.

    Args:
        target: a local one may be the small LM too.
        count: what budgets are counted in.
        ready: methods by name that need not be built.
    """

    def __init__(self, settings: EvaluateSettings, target: Target, count: Count, ready: Mapping[str, Method]) -> None:
        self._settings = settings
        self._target = target
        self._count = count
        self._ready = ready
        self._small_lm = cache(self._load)
        self._compressor = cache(self._load_compressor)
        self._target_compressor = cache(self._build_target_compressor)

    @contextmanager
    def method(self, name: MethodName) -> Iterator[Method]:
        """A method that is ready to work; what it holds is let go at the end."""
        settings = self._settings
        if name.kind == READY:
            yield self._ready[name.text]
        elif name.kind == PEER:
            from terselm.evaluate.peer import Llmlingua

            peer = Llmlingua(settings.llmlingua, name.model or settings.model, settings.device)
            try:
                yield peer
            finally:
                peer.close()
        elif name.kind == OURS:
            yield self._ours(name)
        else:
            yield self._baseline(name)

    def oracle(self, name: MethodName) -> Method:
        """The same method with the target itself as the small LM.

        Raises:
            ConfigError: the target is not a local model.
        """
        if not isinstance(self._target, LocalTarget):
            raise ConfigError("oracle needs a local target; turn it off")
        return self._ours(name, as_target=True)

    def _ours(self, name: MethodName, *, as_target: bool = False) -> Method:
        from terselm.evaluate.ours import Ours

        compressor = self._target_compressor() if as_target else self._compressor(name.model or self._settings.model)
        return Ours(compressor=compressor.with_settings(name.settings), count=self._count)

    def _baseline(self, name: MethodName) -> Method:
        from terselm.evaluate.baselines import BASELINES, Baseline, Tools
        from terselm.evaluate.ours import Surprisals

        model = name.model or self._settings.model
        reader: list[Surprisals] = []  # made when it is first needed

        def surprisals(text: str, spans: object) -> list[float]:
            if not reader:
                reader.append(Surprisals(self._small_lm(model)))
            return reader[0](text, spans)  # type: ignore[arg-type]

        tools = Tools(count=self._count, surprisals=surprisals, seed=self._settings.seed)
        return Baseline(shorten=BASELINES[name.kind], tools=tools)

    def _load(self, model: str) -> CausalLM:
        return load_causal_lm(model, device=self._settings.device, dtype=self._settings.dtype)

    def _load_compressor(self, model: str) -> PromptCompressor:
        from terselm.compress.compressor import PromptCompressor

        return PromptCompressor(self._small_lm(model))

    def _build_target_compressor(self) -> PromptCompressor:
        from terselm.compress.compressor import PromptCompressor

        assert isinstance(self._target, LocalTarget)
        return PromptCompressor(self._target.lm)
