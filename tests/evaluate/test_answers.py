"""Final answers, read out of what models write: at least forty written answers of each kind."""

from __future__ import annotations

import pytest

from terselm.evaluate.answers import (
    answer_right,
    bbh_right,
    claimed,
    holds_answer,
    maths_answer,
    maths_right,
    normalised,
    short_answer_right,
    squad_exact,
    squad_f1,
)

MATHS = [
    ("He had 12, gave 5, so 7 are left.\nThe answer is 7", "7"),
    ("The answer is 7.", "7"),
    ("The answer is $7.", "7"),
    ("The answer is: 7", "7"),
    ("the answer is 7 apples", "7"),
    ("So the answer is 7 apples.\n\nQuestion: 5 more?", "7"),
    ("THE ANSWER IS 42", "42"),
    ("The answer is **42**.", "42"),
    ("The answer is 1,080.", "1,080"),
    ("The answer is $1,234,567.89", "1,234,567.89"),
    ("The answer is 3.50", "3.50"),
    ("The answer is .5", ".5"),
    ("The answer is -3", "-3"),
    ("The answer is 20-5=15", "15"),
    ("The answer is 3/4", "4"),
    ("The answer is 50%", "50"),
    ("The final answer is 18 dollars per day.", "18"),
    ("2+2=4\nThe answer is 4\nThe answer is 5", "4"),
    ("2+2=4\nThe answer is 4\n\nQuestion: what is 9?\nThe answer is 9", "4"),
    ("We get 3 * 4 = 12 and 12 + 1 = 13.\nThe answer is 13\n", "13"),
    ("Therefore, the answer is 16 - 3 - 4 = 9 eggs, or $18", "18"),
    ("She makes 9 * 2 = $18.\n#### 18", "18"),
    ("#### 18", "18"),
    ("#### $1,000", "1,000"),
    ("####18", "18"),
    ("3 + 4 = 7\n#### 7\n#### 8", "7"),
    ("She has 7 apples.", "7"),
    ("She has 7 apples and 3 pears, 10 in all", "10"),
    ("5", "5"),
    ("  12  ", "12"),
    ("It costs $70,000", "70,000"),
    ("x = 3\ny = 4", "4"),
    ("There are 2,3 and 4", "4"),
    ("in 1999 there were 20", "20"),
    ("The answer is seven", None),
    ("I do not know", None),
    ("", None),
    ("\n\n", None),
    ("He paid 3 and got 4 back.\nSo the answer is one.", "4"),
    ("The answer is 5.0", "5.0"),
    ("The answer is 10:05", "05"),
    ("(-4)", "-4"),
    ("10 - 4", "4"),
    ("a) 5-3", "3"),
    ("The answer is 1 000", "000"),
    # as chat models write
    ("So she has:\n\\[ 4 + 10 = 14 \\]\n\nThe final answer is \\boxed{14}.", "14"),
    ("$\\boxed{14}$", "14"),
    ("\\[\n\\boxed{\\$1{,}200.00}\n\\]\nThis holds for all 3 of them.", "1,200.00"),
    ("\\boxed{14 \\text{ apples}}, which is 7 for each", "14"),
    ("first \\boxed{3}, then \\boxed{14}", "14"),
    ("Janet makes **$18** every day from 9 eggs.", "18"),
    ("**Step 1:** 3 + 4 = 7\n\n**Step 2:** 7 * 2 = 14", "14"),
    ("**Step 1:** 3 + 4 = 7\n\nSo there are **14** apples in 2 boxes.", "14"),
    ("The answer is: **14** apples out of 20.", "14"),
    ("The total is 3 + 11.\n\n**Answer:** 14 apples\n\nI checked it 2 times.", "14"),
    ("**Final Answer**: $1,200.00", "1,200.00"),
    ("### Final Answer\n\n14", "14"),
    ("3 + 11 = 14\n\nThe answer is:\n\n14", "14"),
    ("The final answer is:\n\\[ 14 \\]\nCheck: 14 - 3 = 11", "14"),
    ("The answer to the problem is 14 apples.", "14"),
    ("The area is 3 * 4.\nThe answer is 12 m^2.", "12"),
    ("The answer is 12 \\text{ cm}^2", "12"),
    ("Let's break it down:\n\n1. He has 12.\n2. He gives 5.\n\nTherefore, Sam has 7 apples left.", "7"),
]


@pytest.mark.parametrize(("text", "expected"), MATHS)
def test_maths(text: str, expected: str | None) -> None:
    assert maths_answer(text) == expected


def test_numbers_are_compared_by_value() -> None:
    assert len(MATHS) >= 40
    assert maths_right("The answer is 1,080.00", ["1080"])
    assert maths_right("The answer is 5.0", ["5"])
    assert not maths_right("The answer is 5.1", ["5"])
    assert not maths_right("no number", ["5"])


BBH = [
    # an option's letter
    ("So the answer is (A).", "(A)", True),
    ("So the answer is (B).", "(A)", False),
    ("so the answer is (A)", "(A)", True),
    ("So the answer is A.", "(A)", True),
    ("So the answer is **(C)**.", "(C)", True),
    ("So the answer is: (D) 2pm to 6pm.", "(D)", True),
    ("The answer is option (E).", "(E)", True),
    ("(A) is wrong, (B) is right. So the answer is (B).", "(B)", True),
    ("Let me see.\nSo the answer is (B).\n\nQ: next\nSo the answer is (A).", "(B)", True),
    ("(F)", "(F)", True),
    ("I think\n(F)", "(F)", True),
    ("So the answer is (G) Joe finished third.", "(G)", True),
    ("So the answer is none of these.", "(A)", False),
    ("So the answer is Ada.", "(A)", False),
    ("", "(A)", False),
    # yes and no, true and false
    ("We are not where we started. So the answer is No.", "No", True),
    ("So the answer is Yes.", "No", False),
    ("So the answer is yes", "Yes", True),
    ('So the answer is "Yes".', "Yes", True),
    ("So the answer is No, it is not.", "No", True),
    ("So the answer is Not sure.", "No", False),
    ("So the answer is True.", "True", True),
    ("So the answer is False.", "True", False),
    ("So the answer is **False**", "False", True),
    ("= not True = False. So the answer is False.", "False", True),
    ("So the answer is valid.", "valid", True),
    ("So the answer is invalid.", "valid", False),
    ("Yes", "Yes", True),
    # numbers
    ("So the answer is 24.", "24", True),
    ("So the answer is -24.", "-24", True),
    ("So the answer is -24.", "24", False),
    ("So the answer is 1,024.", "1024", True),
    ("So the answer is 8 instruments.", "8", True),
    ("(3 + 5) = 8. So the answer is 8.", "8", True),
    ("So the answer is eight.", "8", False),
    # lists of words and brackets
    ("So the answer is syndrome therefrom.", "syndrome therefrom", True),
    ("So the answer is syndrome, therefrom.", "syndrome therefrom", True),
    ("So the answer is therefrom syndrome.", "syndrome therefrom", False),
    ("So the answer is Syndrome Therefrom", "syndrome therefrom", True),
    ("So the answer is syndrome.", "syndrome therefrom", False),
    ("So the answer is ] ].", "] ]", True),
    ("So the answer is ]].", "] ]", True),
    ("So the answer is ] ) >.", "] ) >", True),
    ("So the answer is > ) ].", "] ) >", False),
    ("So the answer is }.", "}", True),
    # as chat models write
    ("Let me think.\n\n**Answer:** (B)", "(B)", True),
    ("Answer: (B) because (A) is too early", "(B)", True),
    ("**Answer: B**", "(B)", True),
    ("The correct answer is:\n\n(B) 2pm to 6pm\n\nI hope that (A) is clear.", "(B)", True),
    ("The correct option is (C).", "(C)", True),
    ("\\boxed{B}", "(B)", True),
    ("\\[\\boxed{\\text{(B)}}\\]", "(B)", True),
    ("So the answer is \\boxed{24}. It takes 2 steps.", "24", True),
    ("The answer is **8** instruments out of 10.", "8", True),
    ("Therefore, the argument is deductively **invalid**.", "invalid", True),
    ("Therefore, the argument is deductively invalid.", "valid", False),
    ("Therefore, the argument is not valid.", "valid", False),
    ("**Yes**, since you return.", "Yes", True),
    ("**Final answer:** No", "No", True),
    ("The sentence is plausible, so yes.", "Yes", True),
    ("The sorted list is:\n\n**syndrome therefrom**", "syndrome therefrom", True),
]


@pytest.mark.parametrize(("text", "answer", "right"), BBH)
def test_bbh(text: str, answer: str, right: bool) -> None:
    assert len(BBH) >= 40
    assert bbh_right(text, [answer]) is right


@pytest.mark.parametrize(
    ("text", "right"),
    [("2pm to 6pm", True), ("So the answer is 2pm to 6pm.", True), ("10am to 2pm", False), ("a time", False)],
)
def test_options_by_their_text(text: str, right: bool) -> None:
    question = "Q: When?\nOptions:\n(A) 10am to 2pm\n(B) 2pm to 6pm\nA: Let's think step by step."
    assert bbh_right(text, ["(B)"], question) is right


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("So the answer is (A).", "(A)"),
        ("So the answer is 'x y'.", "x y"),
        ("first\nlast line.", "last line"),
        ("", ""),
        ("So the answer is 3.5.", "3.5"),
    ],
)
def test_claimed(text: str, expected: str) -> None:
    assert claimed(text) == expected


ROENTGEN = ["Wilhelm Conrad Röntgen"]
SHORT = [
    ("Wilhelm Conrad Röntgen", ROENTGEN, True),
    ("Wilhelm Conrad Röntgen, of Germany.", ROENTGEN, True),
    (" wilhelm conrad röntgen", ROENTGEN, True),
    ("It was Wilhelm Conrad Röntgen in 1901.", ROENTGEN, True),
    ("Röntgen", ROENTGEN, False),
    ("Wilhelm Röntgen", ROENTGEN, False),
    ("Wilhelm Conrad Röntgens", ROENTGEN, False),
    ("Marie Curie\nWilhelm Conrad Röntgen", ROENTGEN, False),
    ("\nWilhelm Conrad Röntgen", ROENTGEN, True),
    ("", ROENTGEN, False),
    ("   ", ROENTGEN, False),
    ("The Beatles", ["Beatles"], True),
    ("Beatles", ["The Beatles"], True),
    ("a Beatle", ["Beatles"], False),
    ("1901", ["1901"], True),
    ("in 1901", ["1901"], True),
    ("19010", ["1901"], False),
    ("December 14, 1972 UTC", ["14 December 1972", "December 14, 1972"], True),
    ("December 1972", ["14 December 1972", "December 14, 1972"], False),
    ("U.S.A.", ["USA"], True),
    ("the U.S.", ["US"], True),
    ("us all", ["US"], True),
    ("don't", ["dont"], True),
    ("rock-n-roll", ["rocknroll"], True),
    ("New York City", ["New York"], True),
    ("York", ["New York"], False),
    ("New Yorkers", ["New York"], False),
    ("A", ["a"], False),
    ("the the", ["the"], False),
    ("an apple a day", ["apple day"], True),
    ("Queen Elizabeth II", ["Elizabeth II"], True),
    ("Queen Elizabeth I", ["Elizabeth II"], False),
    ("seven", ["7"], False),
    ("7 (seven)", ["7"], True),
    ("7.5", ["7"], False),
    ("$5", ["5"], True),
    ("5%", ["5"], True),
    ("Q: who?\nA: Bob", ["Bob"], False),
    ("Bob!", ["Bob"], True),
    ("'Bob'", ["Bob"], True),
    ("Bob and Alice", ["Alice and Bob"], False),
    ("東京", ["東京"], True),
]


@pytest.mark.parametrize(("text", "answers", "right"), SHORT)
def test_short_answers(text: str, answers: list[str], right: bool) -> None:
    assert len(SHORT) >= 40
    assert short_answer_right(text, answers) is right


@pytest.mark.parametrize(
    ("text", "exact", "f1"),
    [
        ("Wilhelm Conrad Röntgen", True, 1.0),
        ("**Wilhelm Conrad Röntgen**.", True, 1.0),
        ("The answer is: Wilhelm Conrad Röntgen.", True, 1.0),
        ("Röntgen", False, 2 * 1 / 4),
        ("Röntgen Röntgen", False, 2 * 1 / 5),
        ("The prize went to Wilhelm Conrad Röntgen in 1901.", False, 2 * 3 / 11),
        ("Marie Curie", False, 0.0),
        ("", False, 0.0),
    ],
)
def test_squad_measures(text: str, exact: bool, f1: float) -> None:
    assert squad_exact(text, ROENTGEN) is exact
    assert squad_f1(text, ROENTGEN) == pytest.approx(f1)
    assert squad_f1("Bob", ["Alice", "Bob"]) == 1
    assert squad_f1("Bob", []) == 0


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("Paris", True),
        ("**Paris**.", True),
        ("France is in Europe.\n\nThe answer is: Paris.", True),
        ("\\boxed{\\text{Paris}}", True),
        ("Paris\nor London", False),
        ("I think Paris", False),
        ("The answer is London, not Paris", False),
    ],
)
def test_answers_to_ones_own_prompts(text: str, right: bool) -> None:
    assert answer_right(text, ["Paris"]) is right


def test_normalised() -> None:
    assert normalised("The  Quick, brown\tfox's den; a U.S. one.") == "quick brown foxs den us one"


def test_holds_answer_anywhere() -> None:
    assert holds_answer("first line\nwas awarded to Wilhelm Conrad  Röntgen, of", ROENTGEN)
    assert not holds_answer("first line\nwas awarded to Röntgen", ROENTGEN)
