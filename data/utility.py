"""Labelled prompts: how much each sentence or line of a prompt helps a target to say its answer.

What alignment for use learns from. A prompt is cut into some 64 *units* at most; some of them are left out, again and
again, and each time the target says how likely it finds the answer. Ridge regression of that on what was kept gives
each unit's *utility*: the surrogate of ContextCite (arXiv:2409.00729). docs/data.md describes the file, `read_labels`
reads it. Nothing here knows models: `terselm.data.collection.labels` asks the target.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from terselm.data.rows import Json, dump_object, each_once, read_objects
from terselm.data.schema import check_count, check_text
from terselm.errors import DataFormatError
from terselm.files import atomic_file
from terselm.statistics import Floats

MOST_UNITS = 64
"""Of a prompt of no more demonstrations; else each of them is one."""
_SEPARATOR = "\n\n"
_DRAWS = 20  # for each mask that is wanted, until they are all different
_PROMPT_KEYS = ("instruction", "demonstrations", "question")
_KEYS = ("id", "prompt", "units", "parents", "utility", "answer", "target", "masks", "nats_whole", "nats_none")

Masks = NDArray[np.bool_]
Unit = tuple[int, int, int]
"""Number of the demonstration, and the unit's first character in it and the one after its last."""


@dataclass(frozen=True, kw_only=True)
class CutPrompt:
    """A prompt whose demonstrations are cut into units.

    Attributes:
        units: at least 2 and at most 64, or as many as demonstrations, in order; those of a demonstration cover it
            without gaps.
        parents: of each unit the one that it is not kept without, an earlier one of the same demonstration; −1 for
            none.

    Raises:
        ValueError: a text is none, or a unit or parent is not as it should be.
    """

    instruction: str = ""
    demonstrations: tuple[str, ...]
    question: str = ""
    units: tuple[Unit, ...]
    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        for text in (self.instruction, self.question, *self.demonstrations):
            if not isinstance(text, str):
                raise ValueError(f"a part of the prompt is {type(text).__name__}; expected a string")
        most = max(MOST_UNITS, len(list(filter(None, self.demonstrations))))
        if not 2 <= len(self.units) <= most:
            raise ValueError(
                f"the prompt has {len(self.units)} unit{'s' * (len(self.units) != 1)}; expected 2 to {most} sentences "
                "or lines, which can be kept without each other"
            )
        self._check_units()
        self._check_parents()

    def text(self, kept: ArrayLike | None = None) -> str:
        """The prompt as the target reads it where these units are kept; question and instruction always are.

        Args:
            kept: ``(m,)`` bool; None for all.
        """
        chosen = np.ones(len(self.units), bool) if kept is None else np.asarray(kept, bool)
        pieces = [""] * len(self.demonstrations)
        for (number, start, end), is_kept in zip(self.units, chosen.tolist(), strict=True):
            if is_kept:
                pieces[number] += self.demonstrations[number][start:end]
        return _SEPARATOR.join(filter(None, [self.instruction, *pieces, self.question]))

    def unit_texts(self) -> list[str]:
        """``m`` texts."""
        return [self.demonstrations[number][start:end] for number, start, end in self.units]

    def _check_units(self) -> None:
        at = (0, 0)  # where the next unit begins
        for place, (number, start, end) in enumerate(self.units):
            while at[0] < len(self.demonstrations) and at[1] == len(self.demonstrations[at[0]]):
                at = (at[0] + 1, 0)
            if at[0] == len(self.demonstrations):
                raise ValueError(f"units[{place}] is {[number, start, end]}, but the demonstrations end before it")
            if (number, start) != at or not start < end <= len(self.demonstrations[number]):
                raise ValueError(
                    f"units[{place}] is {[number, start, end]}; expected one that begins at character {at[1]} of "
                    f"demonstration {at[0]}, which has {len(self.demonstrations[at[0]])}: units cover demonstrations "
                    "without gaps"
                )
            at = (number, end)
        number, end = at
        if end < len(self.demonstrations[number]) or any(self.demonstrations[number + 1 :]):
            raise ValueError(f"the units end at character {end} of demonstration {number}, and there is more text")

    def _check_parents(self) -> None:
        if len(self.parents) != len(self.units):
            raise ValueError(f"parents has {len(self.parents)} entries for {len(self.units)} units")
        for place, parent in enumerate(self.parents):
            if not -1 <= parent < place or (parent >= 0 and self.units[parent][0] != self.units[place][0]):
                raise ValueError(
                    f"parents[{place}] is {parent}; expected the number of an earlier unit of the same demonstration, "
                    "or -1"
                )


@dataclass(frozen=True, kw_only=True)
class LabelledPrompt(CutPrompt):
    """A prompt with what each of its units is worth to a target; the attributes of `CutPrompt` besides.

    Attributes:
        id: unique in its file.
        utility: ``m`` numbers, nats: how much −log p(answer) falls when the unit is kept.
        answer: what the target was to say.
        target: the model that was asked.
        masks: how many ways of leaving units out the utilities were fitted to.
        nats_whole: −log p(answer) after the whole prompt.
        nats_none: −log p(answer) after instruction and question alone.

    Raises:
        ValueError: as `CutPrompt`; a blank text, a number that is none or not finite, or no masks.
    """

    id: str
    utility: tuple[float, ...]
    answer: str
    target: str
    masks: int
    nats_whole: float
    nats_none: float

    def __post_init__(self) -> None:
        for name in ("id", "answer", "target"):
            check_text(name, getattr(self, name))
        super().__post_init__()
        if len(self.utility) != len(self.units):
            raise ValueError(f"utility has {len(self.utility)} entries for {len(self.units)} units")
        for value in self.utility:
            _check_number("utility", value)
        check_count("masks", self.masks, least=1)
        for name in ("nats_whole", "nats_none"):
            _check_number(name, getattr(self, name))
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 0")

    def to_json(self) -> Json:
        """One line of a file, such as `from_json` reads back."""
        return {
            "id": self.id,
            "prompt": {
                "instruction": self.instruction,
                "demonstrations": list(self.demonstrations),
                "question": self.question,
            },
            "units": [list(unit) for unit in self.units],
            "parents": list(self.parents),
            "utility": list(self.utility),
            "answer": self.answer,
            "target": self.target,
            "masks": self.masks,
            "nats_whole": self.nats_whole,
            "nats_none": self.nats_none,
        }

    @classmethod
    def from_json(cls, value: Json, path: Path | str = "labels", line: int | None = None) -> LabelledPrompt:
        """Read an object that `to_json` made; keys that it does not know are passed over.

        Args:
            path, line: where it stands, for complaints.

        Raises:
            DataFormatError: it is not one.
        """
        try:
            return cls(**_values(value))
        except ValueError as error:
            raise DataFormatError(path, line, str(error)) from None


def is_labelled(value: Json) -> bool:
    """Whether an object of a file looks like a labelled prompt."""
    return "utility" in value and "units" in value


def read_labels(path: Path | str) -> list[LabelledPrompt]:
    """Read a file of labelled prompts (JSON Lines).

    Raises:
        DataFormatError: no such file, none in it, a bad line, or an id that came before.
    """
    path = Path(path)
    labels = ((number, LabelledPrompt.from_json(value, path, number)) for number, value in read_objects(path))
    return each_once(path, labels, "labelled prompts")


def write_labels(path: Path | str, labels: Iterable[LabelledPrompt]) -> int:
    """Write a file of labelled prompts, which appears complete or not at all; return how many.

    Raises:
        OSError: the disk is full or the folder is not writable; the file is then as it was.
    """
    count = 0
    with atomic_file(Path(path)) as file:
        for label in labels:
            file.write(dump_object(label.to_json()) + "\n")
            count += 1
    return count


def draw_masks(parents: Sequence[int], count: int, seed: int | str) -> Masks:
    """Ways of keeping about half of the units, none without what it belongs to; each comes once.

    In a random order, units are kept with all that they belong to until half of them are. Units that were kept seldom
    so far come rather earlier, so that even few masks leave out, and keep, each unit. Where there are no more than
    ``count`` subsets of the units at all, these are all the ways, from nothing to everything.

    Args:
        parents: ``m`` numbers, as in `CutPrompt`.
        count: K, the most masks.
        seed: equal seeds, equal masks.

    Returns:
        ``(≤ K, m)``.
    """
    size = len(parents)
    if size < 63 and 1 << size <= count:
        every = ((np.arange(1 << size)[:, None] >> np.arange(size)) & 1).astype(bool)
        has_parent = np.flatnonzero(np.asarray(parents) >= 0)
        whole = every[:, np.asarray(parents)[has_parent]] | ~every[:, has_parent]
        return np.asarray(every[whole.all(axis=1)])
    chance = random.Random(f"masks:{seed}")
    found: dict[bytes, Masks] = {}
    times = np.zeros(size)  # that each was kept
    for _ in range(_DRAWS * count):
        mask = _half(parents, (times + 1) / (len(found) + 2), chance)
        if mask.tobytes() not in found:
            found[mask.tobytes()] = mask
            times += mask
        if len(found) == count:
            break
    return np.stack(list(found.values()))


def fit_utilities(masks: Masks, nats: ArrayLike, ridge: float) -> Floats:
    """How much −log p falls with each unit: ridge regression with an intercept, which is not shrunk.

    Args:
        masks: ``(K, m)``, what was kept.
        nats: ``(K,)``, −log p(answer) for each.
        ridge: weight of the squared utilities against the squared errors; above 0.

    Returns:
        ``(m,)``, in nats; 0 for a unit that all masks keep, or none does.
    """
    kept = masks.astype(np.float64)
    kept -= kept.mean(axis=0)
    fall = -np.asarray(nats, np.float64)
    fall = fall - fall.mean()
    # K equations in place of m: there are often fewer masks than units
    dual = np.linalg.solve(kept @ kept.T + ridge * np.eye(len(kept)), fall)
    return np.asarray(kept.T @ dual)


def _half(parents: Sequence[int], shares: Floats, chance: random.Random) -> Masks:
    """``(m,)``: units in a random order, each with all that it belongs to, until half are kept.

    Args:
        shares: ``(m,)``, of the masks so far that kept each unit; the less, the earlier.
    """
    size = len(parents)
    wanted = (size + chance.randrange(2)) // 2
    mask = np.zeros(size, bool)
    order = np.argsort([chance.random() + share for share in shares.tolist()], kind="stable")
    for unit in order.tolist():
        if mask.sum() >= wanted:
            break
        while unit >= 0 and not mask[unit]:
            mask[unit] = True
            unit = parents[unit]
    return mask


def _values(value: Json) -> dict[str, Any]:
    """The arguments of `LabelledPrompt` in a JSON object."""
    if missing := [key for key in _KEYS if key not in value]:
        raise ValueError(f"missing key {missing[0]!r}; a labelled prompt has {', '.join(_KEYS)}")
    prompt = value["prompt"]
    if not isinstance(prompt, dict) or not isinstance(prompt.get("demonstrations"), list):
        raise ValueError("prompt is not an object with a list of demonstrations")
    if unknown := prompt.keys() - set(_PROMPT_KEYS):
        raise ValueError(f"prompt has a key {min(unknown)!r}; expected some of {', '.join(_PROMPT_KEYS)}")
    for key in ("units", "parents", "utility"):
        if not isinstance(value[key], list):
            raise ValueError(f"{key} is {type(value[key]).__name__}; expected a list")
    for unit in value["units"]:
        if not isinstance(unit, list) or len(unit) != 3 or not all(map(_is_whole, unit)):
            raise ValueError(f"units holds {unit!r}; expected [demonstration, start, end]")
    for parent in value["parents"]:
        if not _is_whole(parent):
            raise ValueError(f"parents holds {parent!r}; expected whole numbers")
    parts = {key: part for key, part in prompt.items() if key != "demonstrations"}
    return parts | {
        "id": value["id"],
        "demonstrations": tuple(prompt["demonstrations"]),
        "units": tuple(map(tuple, value["units"])),
        "parents": tuple(value["parents"]),
        "utility": tuple(value["utility"]),
        **{key: value[key] for key in ("answer", "target", "masks", "nats_whole", "nats_none")},
    }


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} holds {value!r}; expected a finite number")
