"""How prompts are cut for labels of utility, against the units that demonstrations are ranked by."""

from __future__ import annotations

import json
import random

import pytest
from fakes import random_lm
from hypothesis import given, settings
from hypothesis import strategies as st

from terselm.compress.context import in_context
from terselm.compress.label_units import cut_text, label_units
from terselm.compress.layout import LayoutMaker
from terselm.compress.prompt import Part, Prompt
from terselm.compress.settings import CompressionSettings, UnitKind
from terselm.errors import PromptError
from terselm.evaluate.settings import SuiteName, SuiteSettings
from terselm.evaluate.suites import load_suite

PROSE = "(Title: A) First one. Second, with more words in it! Third?"
DATA = json.dumps({"services": [{"name": "a", "port": 1}, {"name": "b", "port": 2}]}, indent=2)


def test_sentences_and_lines() -> None:
    cut = label_units(Prompt(instruction="Read.", demonstrations=[PROSE, "", DATA], question="Which?"))
    assert cut.unit_texts()[:3] == ["(Title: A) First one.", " Second, with more words in it!", " Third?"]
    assert [
        text for number, text in zip(cut.units, cut.unit_texts(), strict=True) if number[0] == 2
    ] == DATA.splitlines(keepends=True)
    port = cut.unit_texts().index('      "port": 2\n')
    above = []
    while port >= 0:
        above.append(cut.unit_texts()[port].strip())
        port = cut.parents[port]
    assert above == ['"port": 2', '"name": "b",', "{", '"services": [', "{"]
    assert (cut.instruction, cut.question) == ("Read.", "Which?")
    assert cut.text() == f"Read.\n\n{PROSE}\n\n{DATA}\n\nWhich?"


def test_a_question_beside_a_text_is_the_question() -> None:
    assert label_units(Prompt(demonstrations=[PROSE], ranked_for="Which?")).question == "Which?"


def test_they_are_the_units_that_ranking_sees() -> None:
    """Those of the compressor begin where tokens do: every byte is one here."""
    lm = random_lm()
    texts = [PROSE, DATA, "# Head\n\nText under it, which is long. And more.\n\n## Sub\nEven more text here."]
    maker = LayoutMaker(lm.tokenizer.backend_tokenizer, CompressionSettings())
    prompt = Prompt(demonstrations=texts)
    (layout,) = maker.make([prompt], [], [UnitKind.AUTO])
    cut = label_units(prompt)
    assert len(cut.units) == len(layout)
    for start, (_, mine, _) in zip(layout.starts.tolist(), cut.units, strict=True):
        assert abs(start - mine) <= 3
    assert [piece.part for piece in layout.pieces] == [Part.DEMONSTRATION] * 3


@pytest.mark.parametrize(("texts", "said"), [(["One sentence."], "hold one unit only"), (["", ""], "hold no text")])
def test_one_unit_is_too_few(texts: list[str], said: str) -> None:
    with pytest.raises(PromptError, match=f"the demonstrations {said}; a utility needs two"):
        label_units(Prompt(demonstrations=texts, question="Which?"))


def test_longer_prompts_have_fewer_units() -> None:
    lines = [f"key{number}: {'x' * (number % 7)}\n" for number in range(300)]
    cut = label_units(Prompt(demonstrations=["".join(lines), PROSE]))
    assert len(cut.units) == 64
    assert cut.text() == f"{''.join(lines)}\n\n{PROSE}"
    lengths = [end - start for number, start, end in cut.units if number == 0]
    assert max(lengths) <= 3 * min(lengths)


def test_what_merged_units_belong_to() -> None:
    text = "a:\n  b: 1\n  c: 2\nd:\n  e: 3\n  f: 4\n"
    whole = label_units(Prompt(demonstrations=[text]))
    assert whole.parents == (-1, 0, 0, -1, 3, 3)
    cut = label_units(Prompt(demonstrations=[text]), most=4)
    assert cut.unit_texts() == ["a:\n  b: 1\n", "  c: 2\n", "d:\n  e: 3\n", "  f: 4\n"]
    assert cut.parents == (-1, 0, -1, 2)


def test_more_demonstrations_than_units() -> None:
    cut = label_units(Prompt(demonstrations=["One. Two."] * 70))
    assert len(cut.units) == 70
    assert cut.parents == (-1,) * 70


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text('ab .\n:{}"#é', max_size=60), min_size=1, max_size=4), most=st.integers(1, 8))
def test_units_cover_every_text(texts: list[str], most: int) -> None:
    spans = [cut_text(text) for text in texts]
    assert ["".join(text[start:end] for start, end in cut) for text, cut in zip(texts, spans, strict=True)] == texts
    if sum(map(len, spans)) < 2:
        return
    prompt = Prompt(demonstrations=texts)
    if sum(map(bool, texts)) < 2 and most < 2:
        return
    cut = label_units(prompt, most)  # which checks itself
    assert len(cut.units) == min(sum(map(len, spans)), max(most, sum(map(bool, texts))))


def test_a_parent_of_a_merged_unit_is_that_of_its_first_that_has_one() -> None:
    """Against the parents of the units that were merged."""
    chance = random.Random(0)
    text = "".join(f"{'  ' * chance.randrange(4)}k{n}: {chance.randrange(99)}\n" for n in range(40))
    spans = cut_text(text)
    plain = in_context(text, [text[a:b] for a, b in spans])
    cut = label_units(Prompt(demonstrations=[text]), most=15)
    starts = [start for start, _ in spans]
    group_of = [next(g for g, (_, a, b) in enumerate(cut.units) if a <= start < b) for start in starts]
    for number, parent in enumerate(cut.parents):
        members = [unit for unit, group in enumerate(group_of) if group == number]
        owners = [plain[unit].parent for unit in members]
        outside = [owner for owner in owners if owner is not None and group_of[owner] != number]
        assert parent == (group_of[outside[0]] if outside else -1)


def test_the_suites_can_be_cut() -> None:
    for name in (SuiteName.TOOLS, SuiteName.DIALOGUE):
        for item in load_suite(SuiteSettings(name=name, questions=3, seed=5)).items:
            cut = label_units(item.prompt)
            assert 2 <= len(cut.units) <= max(64, len(item.prompt.demonstrations))
