"""The suite ``dialogue``: long conversations made from a seed, in which a fact is asked for 40 turns or more later.

Some facts are corrected on the way: then the latest counts, and the older one must not be mistaken for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from terselm.evaluate.tool_output import Owner, holds

_FEWEST_TURNS = 40  # between the fact and the question


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Turns, and a question about one of them.

    Attributes:
        turns: (role, text), ``user`` and ``assistant`` in turn, the question left out.
        question: the last turn, answered by one string of an earlier one.
        answer: that string.
        owner: what the answer is about, as it stands beside it.
        outdated: what the same thing was before it was corrected; empty where it was not.
    """

    turns: tuple[tuple[str, str], ...]
    question: str
    answer: str
    owner: str
    outdated: str

    def kept(self, text: str) -> bool:
        """Whether a compressed conversation still says the answer, what it is about, and after it nothing outdated."""
        is_outdated = bool(self.outdated) and text.rfind(self.outdated) > text.rfind(self.answer)
        return holds(text, self.answer, [Owner(name=self.owner)]) and not is_outdated


_NAMES = ("Amara", "Boris", "Chen", "Dalia", "Emre", "Freya", "Goran", "Hana", "Ines", "Jonas", "Kofi", "Leila")
_TOWNS = ("Bergen", "Porto", "Leeds", "Turin", "Ghent", "Malmo", "Graz", "Brno", "Cork", "Vigo", "Nancy", "Split")
_FOODS = ("celery", "walnuts", "shellfish", "coriander", "aubergine", "buckwheat")
_DISHES = ("lentil soup", "mushroom risotto", "grilled trout", "barley salad", "pumpkin pie", "bean stew")
_SMALL_TALK = (
    ("Can you suggest something to cook for {guests} people on {day}?", "You could make {dish}; it takes {n} minutes."),
    ("How long is the train from {town} to {other}?", "About {n} minutes with one change, if you leave before noon."),
    (
        "What should we visit in {town} if it rains?",
        "The museum by the river; {n} minutes are enough for {name}.",
    ),
    ("Is {dish} fine for {name}?", "I think so, as long as it is served warm, and with bread for {guests}."),
    ("Remind me what we planned for {day}.", "A walk with {name} in {town}, and {dish} in the evening."),
    ("How do I tell {name} that I will be late?", "Write that you come {n} minutes later, and that you bring {dish}."),
)
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def conversations(count: int, seed: int) -> list[Conversation]:
    """``count`` conversations; the same seed gives the same ones."""
    return [_conversation(Random(f"{seed} dialogue {number}")) for number in range(count)]


def _fact(random: Random) -> tuple[str, str, str, str, str]:
    """A sentence with ``{}`` for the value, the question, what it is about, and two values."""
    name, town = random.choice(_NAMES), random.choice(_TOWNS)

    def number(prefix: str) -> str:
        return f"{prefix}{random.randrange(100_000, 999_999)}"

    return random.choice(
        (
            (
                f"The confirmation number of the hotel in {town} is {{}}, please keep it.",
                f"What is the confirmation number of the hotel in {town}?",
                town,
                number("RX-"),
                number("RX-"),
            ),
            (
                f"{name} has locker {{}} at the station.",
                f"Which locker does {name} have at the station?",
                name,
                number("L"),
                number("L"),
            ),
            (
                f"Our budget for {town} is {{}} euros in all.",
                f"What is our budget for {town}?",
                town,
                f"{random.randrange(11, 99)},{random.randrange(100, 999)}",
                f"{random.randrange(11, 99)},{random.randrange(100, 999)}",
            ),
            (
                f"{name} does not eat {{}}, so leave it out of every menu.",
                f"What does {name} not eat?",
                f"{name} does not eat",
                (foods := random.sample(_FOODS, 2))[0],
                foods[1],
            ),
        )
    )


def _small_talk(random: Random, never: str) -> tuple[tuple[str, str], tuple[str, str]]:
    asked, answered = random.choice(_SMALL_TALK)
    town, other = random.sample([town for town in _TOWNS if town not in never], 2)
    values = {
        "name": random.choice([name for name in _NAMES if name not in never]),
        "town": town,
        "other": other,
        "dish": random.choice(_DISHES),
        "day": random.choice(_DAYS),
        "n": random.randrange(15, 95),
        "guests": random.randrange(3, 12),
    }
    return ("user", asked.format(**values)), ("assistant", answered.format(**values))


def _conversation(random: Random) -> Conversation:
    sentence, question, owner, answer, outdated = _fact(random)
    is_corrected = random.random() < 0.4
    stated = [("user", sentence.format(answer)), ("assistant", f"Noted: {sentence.format(answer)}")]
    turns: list[tuple[str, str]] = []
    for _ in range(random.randrange(2, 8)):
        turns += _small_talk(random, question)
    if is_corrected:
        turns += [("user", sentence.format(outdated)), ("assistant", "Noted.")]
        for _ in range(random.randrange(1, 4)):
            turns += _small_talk(random, question)
        stated = [("user", f"I was wrong before. {sentence.format(answer)}"), ("assistant", "Thanks, I changed it.")]
    turns += stated
    for _ in range(random.randrange(_FEWEST_TURNS // 2, _FEWEST_TURNS)):
        turns += _small_talk(random, question)
    return Conversation(
        turns=tuple(turns),
        question=question,
        answer=answer,
        owner=owner,
        outdated=outdated if is_corrected else "",
    )
