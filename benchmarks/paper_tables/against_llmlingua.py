"""llmlingua beside ours: asked once for each prompt, and ours given as many tokens as it took."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from paper_tables.plan import journal_for, matched, methods_of, peer_of, settings_of
from terselm.compress.length import Count, resolve_counter
from terselm.compress.prompt import Prompt
from terselm.evaluate.measurements import JOURNAL
from terselm.evaluate.methods import Compressed, EvaluationMethod
from terselm.evaluate.opening import PEERS, Workshop, open_target, parse_method
from terselm.evaluate.peer import Llmlingua
from terselm.evaluate.run import Evaluation


class Remembering:
    """llmlingua, asked once for each prompt and budget, whichever target then reads the answer."""

    def __init__(self, peers: Sequence[EvaluationMethod], name: str) -> None:
        self._peers = peers
        self._name = name
        self._known: dict[tuple[str, int], Compressed] = {}

    def recall(self, run: Evaluation) -> None:
        """What it said before the run was stopped."""
        journal = run.folder / JOURNAL
        if not journal.exists():
            return
        prompts = {item.id: item.prompt for item in run.items}
        for line in journal.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            if entry.get("method") == self._name:
                self._known[repr(prompts[entry["id"]]), entry["allowed"]] = Compressed(text=entry["text"])

    def compress(self, prompts: Sequence[Prompt], budgets: Sequence[int]) -> list[Compressed]:
        wanted = {(repr(prompt), budget): prompt for prompt, budget in zip(prompts, budgets, strict=True)}
        unknown = [(prompt, *key) for key, prompt in wanted.items() if key not in self._known]

        def ask(number: int) -> None:
            for prompt, text, budget in unknown[number :: len(self._peers)]:
                self._known[text, budget] = self._peers[number].compress([prompt], [budget])[0]

        with ThreadPoolExecutor(len(self._peers)) as pool:
            list(pool.map(ask, range(len(self._peers))))
        return [self._known[key] for key in ((repr(p), b) for p, b in zip(prompts, budgets, strict=True))]


class AsLong:
    """A method that may use as many tokens as llmlingua does."""

    def __init__(self, method: EvaluationMethod, peer: EvaluationMethod, count: Count) -> None:
        self._method = method
        self._peer = peer
        self._count = count

    def compress(self, prompts: Sequence[Prompt], budgets: Sequence[int]) -> list[Compressed]:
        lengths = [self._count(one.text) for one in self._peer.compress(prompts, budgets)]
        return self._method.compress(prompts, lengths)


def measure_peer(options: argparse.Namespace, suite: str, shard: str) -> None:
    """llmlingua for all targets, and ours as long as it."""
    name = peer_of(suite)
    first = settings_of(options, suite, options.target[0], [name])
    count = resolve_counter(first.counter)
    assert count is not None
    with ExitStack() as opened:
        peers = [Llmlingua(first.llmlingua, first.model, options.device, PEERS[name]) for _ in range(options.peers)]
        for peer in peers:
            opened.callback(peer.close)
        remembering = Remembering(peers, name)
        for each in options.target:
            settings = settings_of(options, suite, each, methods_of(options, suite, each, shard))
            folder = journal_for(options, suite, each, shard)
            target = open_target(settings.target, folder)
            workshop = Workshop(settings, target, count, {})
            ready: dict[str, EvaluationMethod] = {name: remembering}
            with ExitStack() as stack:
                for longer, ours in matched(suite).items():
                    method = stack.enter_context(workshop.method(parse_method(ours)))
                    ready[longer] = AsLong(method, remembering, count)
                run = Evaluation(settings, folder, target, ready)
                remembering.recall(run)
                run.measure()
