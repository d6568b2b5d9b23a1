"""Held-out text of the target: how well a model predicts it, and how sure a difference is.

Bits per byte, because it can be compared across tokenizers: total nats / ln 2 / total UTF-8 bytes of the scored text.
Only the response is scored; the start and end tokens, which stand for no text, are not. Of labelled prompts it is the
demonstrations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from terselm.data.records import Record, prompt_hash
from terselm.data.utility import LabelledPrompt
from terselm.errors import ConfigError
from terselm.progress import Progress
from terselm.statistics import CONFIDENCE, RATIOS, RESAMPLES, Floats, kept_overlap, most_surprising, ratio
from terselm.train.examples import EncodedRecords, Example, render_record
from terselm.train.labelled import documents_hash, plain_text
from terselm.train.packing import MODEL_INPUTS, collate, pack_lengths
from terselm.train.settings import Template
from terselm.train.surprisals import Readings, surprisals_of


@dataclass(frozen=True)
class _Scored:
    """The prompt that a text belongs to, what of it is scored, and the whole."""

    prompt: str
    text: str
    raw: str


@dataclass(frozen=True, eq=False)
class HeldOutText:
    """What is scored, summed by prompt: the answers to one prompt are not independent of each other.

    Attributes:
        text: the encoded records.
        prompt_of: ``(records,)`` int64, the prompt that each record answers.
        tokens: ``(prompts,)`` float64, scored tokens.
        text_bytes: ``(prompts,)`` float64, UTF-8 bytes of their text.
        raw: the whole text of each record, prompt and response, as the compressor would read it.
    """

    text: EncodedRecords
    prompt_of: NDArray[np.int64]
    tokens: NDArray[np.float64]
    text_bytes: NDArray[np.float64]
    raw: tuple[str, ...] = ()

    @classmethod
    def of(cls, records: Sequence[Record], text: EncodedRecords) -> HeldOutText:
        """Of records: their responses are scored."""
        texts = [render_record(record, Template.RAW) for record in records]
        scored = [
            _Scored(prompt_hash(record.messages), record.response, text.prompt + text.response)
            for record, text in zip(records, texts, strict=True)
        ]
        return cls._of(scored, text)

    @classmethod
    def of_labels(cls, labels: Sequence[LabelledPrompt], text: EncodedRecords) -> HeldOutText:
        """Of labelled prompts: their demonstrations are scored, after the question."""
        scored = [
            _Scored(documents_hash(label), "".join(label.demonstrations), plain_text(label, question=False).response)
            for label in labels
        ]
        return cls._of(scored, text)

    @classmethod
    def _of(cls, scored: Sequence[_Scored], text: EncodedRecords) -> HeldOutText:
        """Count tokens and bytes; a record that the encoding dropped counts for neither."""
        known: dict[str, int] = {}
        prompt_of = np.array([known.setdefault(each.prompt, len(known)) for each in scored], dtype=np.int64)
        tokens, text_bytes = np.zeros(len(known)), np.zeros(len(known))
        for example in text.examples:
            tokens[prompt_of[example.record]] += example.counted.sum()
        for record in {example.record for example in text.examples}:
            text_bytes[prompt_of[record]] += len(scored[record].text.encode())
        return cls(text, prompt_of, tokens, text_bytes, tuple(each.raw for each in scored))

    def halves(self, seed: int) -> tuple[HeldOutText, HeldOutText]:
        """Two parts by prompt: one to choose the best weights by, the other to report on.

        Raises:
            ConfigError: there is but one prompt.
        """
        prompts = np.flatnonzero(self.tokens > 0)
        if len(prompts) < 2:
            raise ConfigError(
                "evaluation.every needs at least two held-out prompts, one to choose by and one to report on; raise "
                "evaluation.held_out or add records"
            )
        drawn = np.random.default_rng(seed).permutation(prompts)
        middle = len(drawn) // 2
        return self._part(drawn[:middle]), self._part(drawn[middle:])

    def _part(self, prompts: NDArray[np.int64]) -> HeldOutText:
        place = np.full(len(self.tokens), -1)
        place[np.sort(prompts)] = np.arange(len(prompts))
        prompt_of = place[self.prompt_of]
        kept = np.flatnonzero(prompt_of >= 0)
        record = {int(old): new for new, old in enumerate(kept)}
        examples = [replace(e, record=record[e.record]) for e in self.text.examples if e.record in record]
        text = replace(self.text, examples=examples, tokens=sum(map(len, examples)))
        tokens, text_bytes = self.tokens[np.sort(prompts)], self.text_bytes[np.sort(prompts)]
        return HeldOutText(text, prompt_of[kept], tokens, text_bytes, tuple(self.raw[old] for old in kept))

    def nll_per_token(self, nats: NDArray[np.float64]) -> float:
        return float(nats.sum() / self.tokens.sum())

    def bits_per_byte(self, nats: NDArray[np.float64]) -> float:
        return float(nats.sum() / math.log(2) / self.text_bytes.sum())


def score_held_out(
    model: Any, held_out: HeldOutText, *, row_length: int, rows_per_pass: int, rank: int, processes: int
) -> NDArray[np.float64]:
    """Nats of each prompt's responses; every process scores its share and gets the whole.

    Args:
        model: as `give_surprisals` leaves it.
        held_out: what to score.
        row_length: tokens in a packed row.
        rows_per_pass: rows scored at once by a process.
        rank: of this process.
        processes: how many there are.

    Returns:
        ``(prompts,)`` float64.
    """
    nats = np.zeros(len(held_out.tokens))
    examples = held_out.text.examples
    readings = read_examples(
        model, examples, row_length=row_length, rows_per_pass=rows_per_pass, rank=rank, processes=processes
    )
    for place, part, _ in readings:
        nats[held_out.prompt_of[examples[place].record]] += part.sum()
    return gather_sums(nats, processes)


@torch.no_grad()  # inference mode would leave tensors behind that a sharded model cannot train with
def read_examples(
    model: Any, examples: Sequence[Example], *, row_length: int, rows_per_pass: int, rank: int, processes: int
) -> list[tuple[int, Floats, Floats]]:
    """This process's share of some examples: place, nats of the counted tokens, scores of the units (if any).

    Args:
        model: as `give_surprisals` leaves it.
        examples: what to read.
        row_length: tokens in a packed row.
        rows_per_pass: rows read at once by a process.
        rank: of this process.
        processes: how many there are.
    """
    model.eval()
    device = next(model.parameters()).device
    shape = (rows_per_pass, row_length) if device.type == "cuda" else None  # one shape to compile for
    rows = pack_lengths(list(map(len, examples)), row_length)
    passes = math.ceil(math.ceil(len(rows) / processes) / rows_per_pass)  # as many in each: sharded models need it
    own = rows[rank::processes]
    bar = Progress(passes, "scoring held-out text", "pass") if rank == 0 else None
    found: list[tuple[int, Floats, Floats]] = []
    for index in range(passes):
        mine = own[index * rows_per_pass : (index + 1) * rows_per_pass]
        batch = collate([[examples[place] for place in row] for row in mine or rows[:1]], shape=shape)
        output = model(**{name: batch[name].to(device) for name in MODEL_INPUTS})
        if bar is not None:
            bar.update()
        if not mine:
            continue  # it was for the others
        places = [place for row in mine for place in row]
        nats = surprisals_of(output).double().cpu()
        scores = output.scores.double().cpu() if isinstance(output, Readings) else nats.new_zeros(0)
        counts = [int(examples[place].counted.sum()) for place in places]
        units = [_units(examples[place]) if len(scores) else 0 for place in places]
        for place, part, values in zip(places, torch.split(nats, counts), torch.split(scores, units), strict=True):
            found.append((place, part.numpy(), values.numpy()))
    if bar is not None:
        bar.close()
    return found


def kept_overlap_with_target(
    model: Any, held_out: HeldOutText, *, row_length: int, rows_per_pass: int, rank: int, processes: int
) -> float:
    """Of the words of responses that the target would keep at 2, 5 and 10×, the share that the model would keep.

    The arguments are those of `score_held_out`; the text has the target's opinion.
    """
    sums = np.zeros(2)  # words that both keep, words kept
    examples = held_out.text.examples
    readings = read_examples(
        model, examples, row_length=row_length, rows_per_pass=rows_per_pass, rank=rank, processes=processes
    )
    for place, nats, _ in readings:
        example = examples[place]
        guide = None if example.guide is None else example.guide.piece(slice(None), own=example.counted)
        if guide is None or not len(guide.nats):
            continue
        words = guide.words[example.counted]
        ours = np.bincount(words[words >= 0], weights=nats[words >= 0], minlength=len(guide.nats))
        for times in RATIOS:
            kept = len(most_surprising(guide.nats, 1 / times))
            sums += [kept_overlap(ours, guide.nats, 1 / times) * kept, kept]
    both, kept_by_target = gather_sums(sums, processes)
    return float(both / kept_by_target) if kept_by_target else 0.0


def gather_sums(values: Floats, processes: int) -> Floats:
    """The sum over all processes, in each."""
    if processes == 1:
        return values
    from accelerate.utils import gather_object

    return np.asarray(np.sum(gather_object([values]), axis=0))


def _units(example: Example) -> int:
    return 0 if example.labels is None else len(example.labels.ends)


def compare_scores(
    held_out: HeldOutText, before: NDArray[np.float64], after: NDArray[np.float64], seed: int
) -> dict[str, Any]:
    """Both measures before and after, and the difference in bits per byte with its 95% confidence interval.

    The interval is that of the percentile bootstrap over prompts, paired: each resample takes the same prompts before
    and after (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).
    """
    change = ratio((after - before) / math.log(2), held_out.text_bytes, seed=seed)
    return {
        "before": {"nll_per_token": held_out.nll_per_token(before), "bits_per_byte": held_out.bits_per_byte(before)},
        "after": {"nll_per_token": held_out.nll_per_token(after), "bits_per_byte": held_out.bits_per_byte(after)},
        "difference": {
            "nll_per_token": held_out.nll_per_token(after - before),
            "bits_per_byte": held_out.bits_per_byte(after - before),
            "bits_per_byte_interval": [change.low, change.high],
            "confidence": CONFIDENCE,
            "resamples": RESAMPLES,
        },
        "prompts": len(held_out.tokens),
        "records": len(held_out.prompt_of),
        "tokens": int(held_out.tokens.sum()),
        "bytes": int(held_out.text_bytes.sum()),
    }
