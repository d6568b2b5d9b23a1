"""Which answers are not fit to learn from, and where a loop is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from terselm.data.faults import Fault, copied_share, cut_loop, find_fault

GOOD = [
    "mice",
    ", ".join(str(number) for number in range(60)),
    "\n".join(f"{n} x 7 = {7 * n}" for n in range(1, 11)),
    "\n".join(f"Week {n}: Run {4 * n} kilometres in the park." for n in range(1, 9)),
    "No, no, no! He said no and meant no.",
    "| name | legs |\n|---|---|\n| cow | 4 |\n| hen | 2 |\n| ant | 6 |",
    "day,loaves,rolls\nMonday,12,30\nTuesday,15,22\nWednesday,9,41",
    "def sign(n):\n    if n > 0:\n        return 1\n    if n < 0:\n        return -1\n    return 0",
    "- Ann Lee: nurse\n- Bo Lee: pilot\n- Cy Lee: cook",
    "1. Play in the park.\n2. Play outside in a big umbrella.\n3. Play outside in a big umbrella.",
    "The cat sat. The cat slept. The cat ate. The cat left, and nobody knew why.",
    "我们今天去公园散步。天气很好。",
]
LOOPS = {
    "1. Wear a helmet.\n" + "".join(f"{n}. Wear a belt at night.\n" for n in range(2, 7)): (
        "1. Wear a helmet.\n2. Wear a belt at night."
    ),
    "A: I have a kettle here.\nB: I have a kettle here.\n" * 4 + "A: I have": "A: I have a kettle here.",
    "Rain falls on a roof\n" * 6: "Rain falls on a roof",
    "The value is 1" + "0" * 60: "The value is 10",
    "I have to say that I have to say that I have to say that I have to say": "I have to say that",
    # Not in a row, and each time under another letter.
    "A) Bring bread, cheese and two apples.\nB) Sing.\nC) Bring bread, cheese and two apples.\nD) Dance.\n"
    "E) Bring bread, cheese and two apples.": "A) Bring bread, cheese and two apples.\nB) Sing.",
    # One long sentence, said twice.
    "Bees use their sense of smell to find the way back to the hive. They are good at it. "
    "Bees use their sense of smell to find the way back to the hive.": (
        "Bees use their sense of smell to find the way back to the hive. They are good at it."
    ),
    "1. 1. 1. " * 9: "",
    "天气很好。" * 20: "天气很好。",
}
COUNTING = {
    "".join(f"{n}.{n}." for n in range(10, 40)): "",
    "\n".join(f"{n}. I will do it." for n in range(1, 21)) + "\n21. I will d": "1. I will do it.",
    "5 days = 5 * 5 = 1.56 km\n"
    + "".join(f"{n} km = {n} * 5 = {n}.5 km\n" for n in range(2, 19)): "5 days = 5 * 5 = 1.56 km",
    "\n".join(f"| host {n} | 10.0.0.{n} |" for n in range(1, 40)) + "\n| host 4": "| host 1 | 10.0.0.1 |",
}
TEMPLATE = (
    "### Instruction:\nPlan a day.\n\n### Response:\nMove the furniture into the middle and cover it.\n\n{prompt}"
)


@pytest.mark.parametrize("text", GOOD)
def test_a_good_answer_has_no_fault_and_is_not_cut(text: str) -> None:
    assert find_fault(text, "Tell me.", TEMPLATE) is None
    assert cut_loop(text) == text


@pytest.mark.parametrize("text", LOOPS)
def test_a_loop_is_found_and_cut_after_its_first_cycle(text: str) -> None:
    assert find_fault(text, "Tell me.", TEMPLATE) is Fault.LOOP
    assert cut_loop(text) == LOOPS[text]


@pytest.mark.parametrize("text", COUNTING)
def test_in_an_answer_without_an_end_numbers_are_equal(text: str) -> None:
    assert find_fault(text, "Tell me.", TEMPLATE, unfinished=True) is Fault.LOOP
    assert cut_loop(text, unfinished=True) == COUNTING[text]


@given(st.text("ab \n.1ßİ", max_size=120), st.booleans())
def test_what_is_left_of_a_loop_is_a_beginning_of_it(text: str, unfinished: bool) -> None:
    assert text.strip().startswith(cut_loop(text, unfinished=unfinished).strip())


@pytest.mark.parametrize("text", ["", " \n", "...", "|---|"])
def test_nothing_said_is_empty(text: str) -> None:
    assert find_fault(text, "Tell me.", TEMPLATE) is Fault.EMPTY


def test_a_worked_example_is_a_copy() -> None:
    assert find_fault("1. Move the furniture into the middle and cover it.", "Plan a week.", TEMPLATE) is Fault.COPY
    assert find_fault("Move the table into the middle and call everyone.", "Plan a week.", TEMPLATE) is None


def test_the_prompt_said_again_is_an_echo_and_a_quotation_is_none() -> None:
    passage = "The bridge was built in 1887. It stands on nine piers. It is painted every seven years by four men."
    prompt = f"Read the text.\n\n{passage}\n\nHow often is it painted?"
    assert find_fault(passage, prompt, "") is Fault.ECHO
    assert find_fault(prompt, prompt, "") is Fault.ECHO
    assert find_fault("It is painted every seven years by four men.", prompt, "") is None
    assert find_fault("Every seven years.", prompt, "") is None


def test_the_copied_share_counts_runs_of_five_words() -> None:
    assert copied_share("one two three four five six", "Zero, ONE two; three four five.") == 0.5
    assert copied_share("one two three four", "one two three four") == 0.0
