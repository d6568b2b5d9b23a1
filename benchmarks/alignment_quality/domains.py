"""Text to train on and held-out text by domain, from public data sets in one folder."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from terselm.data.records import Message, Record, Role

UNSEEN = "wikipedia"  # no such text is trained on


def training(datasets: Path) -> list[Record]:
    """GPT-4's answers, grade-school maths and the questions of BIG-Bench Hard; prompt and response, as they are."""
    records = [r for r in _gpt4(datasets) if not is_held_out(r)]
    records += _gsm8k(datasets, "train")
    for path in sorted((datasets / "bbh/tasks").glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))["examples"]
        records += [_record(f"{path.stem}-{i}", row["input"], row["target"]) for i, row in enumerate(found)]
    return records


def held_out(datasets: Path, texts: int) -> dict[str, list[Record]]:
    """At most so many texts a domain, none of which is trained on."""
    gpt4 = [r for r in _gpt4(datasets) if is_held_out(r)]
    passages = (ctx["text"] for row in _rows(datasets / "nq_open/oracle.jsonl") for ctx in row["ctxs"][:1])
    domains: dict[str, Iterator[Record]] = {
        "gpt4 prose": (r for r in gpt4 if r.category != "code"),
        "gpt4 code": (r for r in gpt4 if r.category == "code"),
        "gsm8k": _gsm8k(datasets, "test"),
        UNSEEN: (_record(f"nq-{i}", *halves(text)) for i, text in enumerate(dict.fromkeys(passages)) if _is_long(text)),
    }
    return {domain: list(itertools.islice(records, texts)) for domain, records in domains.items()}


def _gpt4(datasets: Path) -> Iterator[Record]:
    for i, row in enumerate(_rows(datasets / "gpt4_instructions/train.jsonl")):
        prompt = "\n\n".join(part for part in (row["instruction"], row["input"]) if part.strip())
        yield _record(f"gpt4-{i}", prompt, row["response"], category=row["domain"])


def _gsm8k(datasets: Path, split: str) -> Iterator[Record]:
    for i, row in enumerate(_rows(datasets / f"gsm8k/{split}.jsonl")):
        yield _record(f"gsm8k-{split}-{i}", row["question"], row["answer"])


def _is_long(text: str) -> bool:
    return len(text.split()) > 40


def is_held_out(record: Record) -> bool:
    """One in twenty, by prompt."""
    return hashlib.sha256(record.messages[0].content.encode()).digest()[0] < 256 // 20


def _record(name: str, prompt: str, response: str, category: str | None = None) -> Record:
    message = Message(role=Role.USER, content=prompt)
    return Record(id=name, messages=(message,), response=response, category=category)


def halves(text: str) -> tuple[str, str]:
    """A passage has no prompt; its first sentence stands for one."""
    first, _, rest = text.partition(". ")
    return (f"{first}.", rest) if len(rest.split()) > 20 else (" ".join(text.split()[:5]), " ".join(text.split()[5:]))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
