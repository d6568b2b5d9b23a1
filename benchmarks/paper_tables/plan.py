"""What is measured: methods by shard, the settings of an evaluation, and where its journal lies."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from terselm.evaluate.measurements import JOURNAL
from terselm.evaluate.settings import Distractors, EvaluateSettings, SuiteName, SuiteSettings, TargetSettings
from terselm.models.chat import ChatMode

THINNED = "anchor=0"  # the question whole, demonstrations token by token
OURS = [
    "terselm",
    "terselm:paper",
    f"terselm:{THINNED}",
    *(f"terselm:{THINNED},{more}" for more in (
        "k=1.5",
        "k=1.2",
        "k=1",
        "unit=word",
        "unit=sentence",
        "unit=line",
        "unit=demonstration",
        "segment_size=400",
    )),
    *(f"terselm:anchor={more}" for more in (
        "0.3",
        "0.5",
        "0.5,unit=line",
        "0.5,unit=sentence",
        "0.7",
        "1,anchor_by=last",
        "1,unit=demonstration",
    )),
]  # fmt: skip
ABLATED = [
    "no-budget-controller",
    "no-iteration",
    "no-perplexity-selection",
    "uniform-rates",
    "random-tokens",
    "next-token",
]
BASELINES = [
    "truncate",
    "truncate-end",
    "random-words",
    "demonstrations-random",
    "demonstrations-last",
    "demonstrations-perplexity",
    "demonstrations-similar",
    "sentences-random",
    "selective-context",
    "selective-sentences",
]
OURS_NQ = [  # over documents: ranked for the question
    "terselm",
    "terselm:ranker=minilm-l6",
    *(f"terselm:rank_by={by}" for by in (
        "bm25",
        "question,unit=demonstration",
        "question,unit=line",
        "question,unit=token",
        "question,contrast=true,rank_delta=0.3,order=ranked",  # as LongLLMLingua has it
        "surprisal,unit=sentence",
        "surprisal,unit=token",
    )),
]  # fmt: skip
BASELINES_NQ = [
    "truncate",
    "random-words",
    "sentences-random",
    "bm25-sentences",
    "minilm-sentences",
    "question-sentences",
    "documents-ranked",
    "documents-bm25",
    "selective-sentences",
]
LOOKUPS = {  # one string of a tool's output or of a conversation is asked for
    "ours": ["terselm", "terselm:ranker=minilm-l6", "terselm:rank_by=bm25", "terselm:rank_by=surprisal"],
    "baselines": ["truncate", "sentences-random", "bm25-sentences", "minilm-sentences", "question-sentences"],
}
RANKED = {"nq": {"ours": OURS_NQ, "baselines": BASELINES_NQ}, "tools": LOOKUPS, "dialogue": LOOKUPS}
ALIGNMENT = "alignment"
PEER = "peer"
SHARDS = ("ours", "ablated", "baselines", PEER)  # of methods, each for a process of its own
REFERENCES = "references"  # the bare question and the whole prompt, which all are compared with
BUDGETS = {"nq": ["0.5", "0.25", "0.1", "0.05"], "tools": ["0.25", "0.1"], "dialogue": ["0.25", "0.1"]}
SHOTS = ["1-shot", "half-shot", "quarter-shot"]
NQ_DOCUMENTS = 20


def folder_of(options: argparse.Namespace, *job: str) -> Path:
    return Path(options.out) / "-".join(map(name_of, job))


def name_of(model: str) -> str:
    return model.partition("=")[0]


def weights_of(model: str) -> str:
    return model.partition("=")[2] or model


def journal_for(options: argparse.Namespace, suite: str, target: str, shard: str) -> Path:
    """The folder of a shard, whose journal begins with what every shard needs and one has measured."""
    folder = folder_of(options, suite, target, shard)
    known = folder_of(options, suite, target, REFERENCES) / JOURNAL
    if shard not in (REFERENCES, ALIGNMENT) and known.exists() and not (folder / JOURNAL).exists():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(known, folder / JOURNAL)
    return folder


def alignment_pairs(options: argparse.Namespace) -> dict[str, list[str]]:
    """By granularity: the small LM as it was, and aligned."""
    models = options.small, options.aligned
    return {
        name: [f"terselm:model={weights_of(model)},{THINNED}{k}" for model in models]
        for name, k in (("k2", ""), ("k1.2", ",k=1.2"))
    }


def peer_of(suite: str) -> str:
    """llmlingua, over documents with its settings for questions."""
    return "longllmlingua" if suite == "nq" else "llmlingua"


def matched(suite: str) -> dict[str, str]:
    """By name, what may be as long as llmlingua's text of the same prompt: it does not keep to a budget."""
    return {f"{name}, as long as {peer_of(suite)}": name for name in ("terselm", "truncate")}


def budgets_of(options: argparse.Namespace, suite: str) -> list[str]:
    return options.budgets.split(",") if options.budgets else BUDGETS.get(suite, SHOTS)


def shards_of(options: argparse.Namespace, suite: str) -> set[str]:
    """Documents are not thinned by surprisal, so there is nothing that the ablations could take out."""
    peer = options.llmlingua and suite not in ("tools", "dialogue")
    optional = {PEER: peer, ALIGNMENT: options.aligned, "ablated": suite not in RANKED}
    return {shard for shard in options.shards or (*SHARDS, ALIGNMENT) if optional.get(shard, True)}


def methods_of(options: argparse.Namespace, suite: str, target: str, shard: str) -> list[str]:
    if shard == REFERENCES:
        return ["truncate"]
    if shard == PEER:
        return [peer_of(suite), *matched(suite)]
    if named := {"ours": options.methods, "baselines": options.baselines}.get(shard):
        return list(named.split())
    if suite in RANKED and shard in ("ours", "baselines"):
        return RANKED[suite][shard]
    if shard == "ours":
        ours = list(OURS)
        if target != options.small:  # else it has compressed already
            ours += [f"terselm:model={weights_of(target)},{THINNED}{k}" for k in ("", ",k=1.2")]
        return ours
    if shard == ALIGNMENT:
        return [method for pair in alignment_pairs(options).values() for method in pair]
    if shard == "ablated":
        return [f"terselm:{part}" for part in ABLATED] + ["terselm:paper,next-token"]
    return BASELINES


def settings_of(options: argparse.Namespace, suite: str, target: str, methods: Sequence[str]) -> EvaluateSettings:
    data = options.data
    suites = {
        "gsm8k": SuiteSettings(
            name=SuiteName.GSM8K,
            questions=options.questions,
            sets=options.sets,
            data=data / "gsm8k" / "test.jsonl",
            train=data / "gsm8k" / "train.jsonl",
        ),
        "bbh": SuiteSettings(
            name=SuiteName.BBH,
            questions=options.bbh_questions,
            tasks=[task for task in options.bbh_tasks.split(",") if task],
            data=data / "bbh" / "tasks",
            prompt=data / "bbh" / "cot_prompts",
        ),
        "nq": SuiteSettings(
            name=SuiteName.NQ,
            questions=options.nq_questions,
            documents=NQ_DOCUMENTS,
            distractors=Distractors.HARDEST,
            data=data / "nq_open" / "oracle.jsonl",
        ),
        "tools": SuiteSettings(name=SuiteName.TOOLS, questions=options.tool_questions),
        "dialogue": SuiteSettings(name=SuiteName.DIALOGUE, questions=6 * options.tool_questions),
    }
    return EvaluateSettings(
        suite=suites[suite],
        target=TargetSettings(
            model=weights_of(target), chat=ChatMode(options.chat), device=options.device, dtype=options.dtype
        ),
        methods=list(methods),
        budgets=budgets_of(options, suite),
        counter=weights_of(options.small),
        model=weights_of(options.small),
        device=options.device,
        dtype=options.dtype,
        llmlingua=options.llmlingua,
        score=not options.answers_only,
        generate=options.generate or options.answers_only,
        oracle=bool(options.aligned) and set(methods) <= set(methods_of(options, suite, target, ALIGNMENT)),
        batch=options.batch,
    )
