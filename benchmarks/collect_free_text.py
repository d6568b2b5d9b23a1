"""Text that the target writes when it is only given the first words of a sentence: what it is used to reading.

    python benchmarks/collect_free_text.py --datasets FOLDER --count 5000 --out free.jsonl

The words are the first three of sentences in GPT-4's answers; sampled at temperature 1. Answers are kept in a ledger
beside the file, so the same command goes on where it was stopped.
"""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path

import frame
from alignment_quality import domains

from terselm.data.collection.collect import collect
from terselm.data.collection.settings import CollectSettings, PromptTemplate
from terselm.data.instructions import Instruction
from terselm.data.records import Message, Record, Role, read_records, write_records

WORDS = 3  # of a sentence
LEAST = 20  # words of an answer


def main() -> None:
    parser = frame.parser(__doc__, required=True, what="JSON Lines file of records to write")
    parser.add_argument("--datasets", type=Path, required=True, help="folder of the public data sets")
    parser.add_argument("--target", default="gemma3-270m", help="alias, folder or hub id")
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    options = parser.parse_args()
    settings = CollectSettings(
        endpoint=f"local:{options.target}",
        temperatures=[1.0],
        top_p=1.0,
        top_k=0,
        max_new_tokens=options.max_new_tokens,
        templates={"default": PromptTemplate(text="{prompt}")},
    )
    raw = options.out.with_suffix(".raw.jsonl")
    collect(openings(options.datasets)[: options.count], raw, settings)
    long = (record for record in read_records(raw) if len(record.response.split()) > LEAST)
    write_records(options.out, (parted(record) for record in long))


def openings(datasets: Path) -> list[Instruction]:
    """The first words of sentences that are trained on anyway, in a random order, each once."""
    found: dict[str, None] = {}
    for record in domains.training(datasets):
        if not record.id.startswith("gpt4") or record.category == "code":
            continue
        for sentence in re.split(r"(?<=[.!?])\s+|\n+", record.response):
            words = sentence.split()
            if (
                len(words) > WORDS
                and words[0][:1].isupper()
                and all(word.strip(",'").isalpha() for word in words[:WORDS])
            ):
                found.setdefault(" ".join(words[:WORDS]))
    shuffled = sorted(found)
    random.Random(0).shuffle(shuffled)
    return [
        Instruction(id=f"free-{i}", messages=(Message(role=Role.USER, content=words),))
        for i, words in enumerate(shuffled)
    ]


def parted(record: Record) -> Record:
    """The whole text, its first sentence as the prompt."""
    first, rest = domains.halves(f"{record.messages[0].content} {record.response}")
    return replace(record, messages=(Message(role=Role.USER, content=first),), response=rest)


if __name__ == "__main__":
    frame.run(main)
