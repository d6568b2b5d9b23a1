"""What is evaluated, and how."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from terselm.compress.length import Count
from terselm.config import refuse
from terselm.errors import ConfigError
from terselm.evaluate.items import Item, full_text
from terselm.models.chat import ChatMode

_SHOTS = {"half": 0.5, "quarter": 0.25, "one": 1.0}


class SuiteName(StrEnum):
    """The benchmarks."""

    GSM8K = "gsm8k"
    BBH = "bbh"
    NQ = "nq"
    SHAREGPT = "sharegpt"
    ARXIV = "arxiv"
    TOOLS = "tools"  # generated
    DIALOGUE = "dialogue"  # generated
    LONGBENCH = "longbench"
    MEETINGBANK = "meetingbank"
    QMSUM = "qmsum"
    PROMPTS = "prompts"  # the user's own


_GENERATED = (SuiteName.TOOLS, SuiteName.DIALOGUE)
_RANGE = re.compile(r"\d*:\d*")


class Distractors(StrEnum):
    """Which passages stand beside that with the answer; none of them holds an accepted answer."""

    RANDOM = "random"  # any
    HARDEST = "hardest"  # those that BM25 finds nearest to the question


@dataclass(frozen=True, kw_only=True)
class SuiteSettings:
    """Which questions, from where.

    Attributes:
        name: the suite.
        questions: how many; of BBH and LongBench, for each task; of tool output, for each kind.
        sets: how many demonstration sets GSM8K's questions are shared out among; each is drawn from the training rows.
        shots: demonstrations in a set.
        documents: passages in a prompt of NQ.
        distractors: which passages of other questions stand in a prompt of NQ.
        tasks: those of BBH or LongBench, or kinds of tool output, to use; none for all.
        seed: of every draw.
        rows: which rows of the data are used at all, such as "1000:2000" (from 0, without the last) or ":1000"; empty
            for all. So that questions to train with and to test with share nothing, not even passages.
        data: a local file (GSM8K's test rows, NQ, ShareGPT, arXiv, LongBench, MeetingBank, QMSum, own prompts) or
            folder (BBH); None for the hub.
        train: GSM8K's training rows; None for the hub.
        prompt: a file of demonstrations separated by blank lines (GSM8K), or the folder of BBH's chain-of-thought
            prompts; replaces drawn demonstrations.

    Raises:
        ConfigError: a number below 1; rows that are no range, or of a suite that is generated.
    """

    name: SuiteName = SuiteName.GSM8K
    questions: int = 200
    sets: int = 10
    shots: int = 9
    documents: int = 10
    distractors: Distractors = Distractors.RANDOM
    tasks: list[str] = field(default_factory=list)
    seed: int = 0
    rows: str = ""
    data: Path | None = None
    train: Path | None = None
    prompt: Path | None = None

    def __post_init__(self) -> None:
        faults = [
            f"suite.{name} is {getattr(self, name)}; expected at least 1"
            for name in ("questions", "sets", "shots", "documents")
            if getattr(self, name) < 1
        ]
        if self.rows and not _RANGE.fullmatch(self.rows):
            faults.append(f"suite.rows is {self.rows!r}; expected a range such as '1000:2000', '1000:' or ':1000'")
        if self.rows and self.name in _GENERATED:
            faults.append(f"suite.rows is for rows of a file; {self.name} is generated: another suite.seed, other rows")
        refuse(faults)

    @property
    def used_rows(self) -> slice:
        """Of the data."""
        first, _, end = self.rows.partition(":")
        return slice(int(first) if first else None, int(end) if end else None)


@dataclass(frozen=True, kw_only=True)
class TargetSettings:
    """The model that reads the prompts.

    Attributes:
        model: of a local target, what `load_causal_lm` takes; of an endpoint, the name it goes by there.
        chat: whether a local target reads prompts, and writes answers, through its chat template: the prompt is a turn
            of the user, and the answer is judged as it stands, not cut at the suite's stop strings. ``auto``: where it
            has a template. An endpoint does as ``api`` says; with ``always`` its answers are not cut either.
        base_url: of an OpenAI-compatible endpoint; empty for a local model.
        counter: tokenizer that an endpoint's tokens are counted in; a local target has its own.
        device: of a local model.
        dtype: of a local model.
        api: of an endpoint: ``chat``, or ``completions``, which gives it the prompt as plain text.
        key_file: holds an endpoint's key; else OPENAI_API_KEY does.
        ledger: beside which file an endpoint's answers are kept, so that none is asked for twice, not by another
            evaluation either; by default in the folder of results.
        prices: price table in YAML, for ``max_cost``.
        max_cost: an endpoint is asked for nothing more once it has cost so much.
        concurrency: most requests in flight.
        price: of a million prompt tokens, in whatever currency, to say what is saved; 0 leaves that out.
    """

    model: str = "qwen2.5-coder-1.5b"
    chat: ChatMode = ChatMode.AUTO
    base_url: str = ""
    counter: str = "cl100k_base"
    device: str = "auto"
    dtype: str = "auto"
    api: str = "chat"
    key_file: Path | None = None
    ledger: Path | None = None
    prices: Path | None = None
    max_cost: float | None = None
    concurrency: int = 16
    price: float = 0.0

    def __post_init__(self) -> None:
        refuse(self._faults())

    def _faults(self) -> Iterator[str]:
        if self.api not in ("chat", "completions"):
            yield f"target.api is {self.api!r}; expected chat or completions"
        if self.chat not in list(ChatMode):
            yield f"target.chat is {self.chat!r}; expected one of {', '.join(ChatMode)}"
        against = {"always": "completions", "never": "chat"}.get(self.chat)
        if self.base_url and self.api == against:
            other = "chat" if against == "completions" else "completions"
            yield f"target.chat is {self.chat}, but the endpoint's target.api is {self.api}; choose api {other}"


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """One evaluation.

    Attributes:
        suite: the questions.
        target: the model that reads them.
        methods: how prompts are shortened; see `terselm.evaluate.opening`.
        budgets: "1-shot", "half-shot", "quarter-shot" or "2.5-shot" (instruction, question and so many mean
            demonstrations), "300" (tokens) or "0.2" (a share of the prompt's tokens).
        counter: the tokenizer that all tokens are counted in; empty for the target's. In the small LM's own, what it
            has read of shared demonstrations can be used again, which is faster.
        compare: the method that all others are compared with; empty for the first.
        model: the small LM of methods that name none.
        device: of the small LM.
        dtype: of the small LM.
        llmlingua: interpreter of an environment with llmlingua, or a folder that pip installed it into.
        score: whether −log p of the gold answer is measured; needs a local target.
        generate: whether the target answers.
        references: whether the bare question and the whole prompt are measured too; scores need them.
        oracle: whether the words that ours keeps are compared with those that the target itself, as compressor, keeps.
        bert_score: encoder that BERTScore compares texts with, such as ``roberta-large`` or a folder; empty for none.
        batch: prompts that are compressed, and committed to disk, together.
        seed: of random methods and of intervals.

    Raises:
        ConfigError: no methods or budgets, or neither score nor generate; all mistakes in one.
    """

    suite: SuiteSettings = field(default_factory=SuiteSettings)
    target: TargetSettings = field(default_factory=TargetSettings)
    methods: list[str] = field(default_factory=lambda: ["terselm", "truncate", "demonstrations-random"])
    budgets: list[str] = field(default_factory=lambda: ["1-shot", "half-shot", "quarter-shot"])
    counter: str = ""
    compare: str = ""
    model: str = "smollm2-135m"
    device: str = "auto"
    dtype: str = "auto"
    llmlingua: Path | None = None
    score: bool = True
    generate: bool = False
    references: bool = True
    oracle: bool = False
    bert_score: str = ""
    batch: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        refuse(self._faults())

    def _faults(self) -> Iterator[str]:
        if not self.methods or not self.budgets:
            yield "there are no methods or no budgets; name at least one of each"
        if len(set(self.methods)) < len(self.methods):
            yield "a method is named twice; name each once"
        yield from _budget_faults(self.budgets)
        if self.compare and self.compare not in self.methods:
            yield f"compare is {self.compare!r}; expected one of the methods: {', '.join(self.methods)}"
        if not self.score and not self.generate:
            yield "neither score nor generate is on, so there is nothing to measure; turn one on"
        if self.score and not self.references:
            yield "scores are relative to the bare question and the whole prompt; leave references on"
        if self.batch < 1:
            yield f"batch is {self.batch}; expected at least 1"


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """One search.

    Attributes:
        prompts: JSON Lines: instruction, demonstrations, question and, where known, answer.
        target: the model that reads the prompts; a local one.
        model: the small LM.
        budget: such as "300", "1-shot" or "0.2" (see `parse_budget`); or empty, with a quality.
        quality: instead, the share of the gain that must be left, in (0, 1]; the smallest budget is looked for.
        minutes: after which no new settings are tried.
        questions: at most so many of the prompts.
        device: of both models.
        seed: of intervals.

    Raises:
        ConfigError: both or neither of budget and quality, or one out of range.
    """

    prompts: Path
    target: TargetSettings = field(default_factory=TargetSettings)
    model: str = "smollm2-135m"
    budget: str = ""
    quality: float = 0.0
    minutes: float = 10.0
    questions: int = 50
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        refuse(self._faults())

    def _faults(self) -> Iterator[str]:
        if bool(self.budget) == bool(self.quality):
            yield "give exactly one of a budget and a quality"
        yield from _budget_faults([self.budget] if self.budget else [])
        if not 0 <= self.quality <= 1:
            yield f"quality is {self.quality}; expected a share of the gain, in (0, 1]"
        if self.minutes <= 0 or self.questions < 1:
            yield "minutes and questions must be above 0"


@dataclass(frozen=True, kw_only=True)
class EvaluationBudget:
    """How long prompts may be, as the paper names it, in the target's tokens: exactly one of the figures is given.

    Attributes:
        name: as the user wrote it.
        shots: mean demonstrations beside the instruction and the question.
        tokens: for each prompt.
        rate: share of each prompt's tokens.
    """

    name: str
    shots: float | None = None
    tokens: int | None = None
    rate: float | None = None

    def of(self, item: Item, count: Count) -> int:
        """Tokens for one prompt, at least 1."""
        if self.tokens is not None:
            return self.tokens
        if self.rate is not None:
            return max(1, math.floor(self.rate * count(full_text(item.prompt))))
        assert self.shots is not None
        demonstrations = [count(f"\n\n{text}") for text in item.prompt.demonstrations if text]
        mean = sum(demonstrations) / len(demonstrations) if demonstrations else 0.0
        return max(1, count(full_text(item.bare)) + math.floor(self.shots * mean))


def parse_budget(text: str) -> EvaluationBudget:
    """Read "1-shot", "half-shot", "2.5-shot", "300" or "0.2".

    Raises:
        ConfigError: none of these.
    """
    name = text.strip()
    if match := re.fullmatch(r"(half|quarter|one|\d+(?:\.\d+)?)[- ]shot", name):
        return EvaluationBudget(name=name, shots=_SHOTS.get(match[1]) or float(match[1]))
    if re.fullmatch(r"[1-9]\d*", name):
        return EvaluationBudget(name=name, tokens=int(name))
    if re.fullmatch(r"0?\.\d+", name) and float(name) > 0:
        return EvaluationBudget(name=name, rate=float(name))
    raise ConfigError(
        f"{text!r} is not a budget; expected '1-shot', 'half-shot', a number of tokens such as '300', or a share of "
        "the prompt's tokens such as '0.2'"
    )


def _budget_faults(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        try:
            parse_budget(text)
        except ConfigError as error:
            yield str(error)
