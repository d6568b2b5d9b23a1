"""What a line belongs to, by hand."""

from __future__ import annotations

import re

import pytest

from terselm.compress.context import in_context, unit_kind
from terselm.compress.settings import UnitKind

JSON = """{
  "services": {
    "payments": {
      "host": "10.0.0.7",
      "port": 8443
    }
  },
  "users": [
    {
      "name": "ada",
      "role": "admin"
    },
    {
      "name": "bob",
      "role": "guest"
    }
  ]
}
"""
YAML = "services:\n  - name: payments\n    port: 8443\n  - name: mail\n    port: 25\n"
TRACE = """Traceback (most recent call last):
  File "app.py", line 3, in main
    run()
  File "run.py", line 9, in run
    raise KeyError(name)
KeyError: 'payments'
"""
DIFF = """diff --git a/app.py b/app.py
--- a/app.py
+++ b/app.py
@@ -1,3 +1,3 @@
 import os
-PORT = 80
+PORT = 8443
@@ -20,2 +20,2 @@
-DEBUG = 1
+DEBUG = 0
"""
TABLE = "Results\n\n| name | port |\n|---|---|\n| payments | 8443 |\n| mail | 25 |\n"
LOG = "2024-05-06 10:01:02 INFO start\n2024-05-06 10:01:03 ERROR lost\n  at db.connect\n2024-05-06 10:01:04 INFO stop\n"
LISTING = "total 8\n-rw-r--r-- 1 root root 12 May  6 10:01 a.txt\ndrwxr-xr-x 2 root root 4096 May  6 10:01 src\n"
PROSE = "A first sentence of some words that goes on. A second one follows it.\nA new line of plain words ends here.\n"
MARKDOWN = (
    "# Ports\nThe payments service listens on 8443 in all of our regions. The others do not.\n## Mail\nMail uses 25.\n"
)


def contexts(text: str) -> dict[str, str]:
    lines = text.splitlines(keepends=True)
    return {line.strip(): seen.text for line, seen in zip(lines, in_context(text, lines), strict=True)}


def chain(text: str, line: str) -> list[str]:
    """The lines that are kept with one."""
    lines = text.splitlines(keepends=True)
    seen = in_context(text, lines)
    number: int | None = next(i for i, other in enumerate(lines) if line in other)
    kept = []
    while number is not None:
        kept.append(lines[number].strip())
        number = seen[number].parent
    return kept[::-1]


@pytest.mark.parametrize("text", [JSON, YAML, TRACE, DIFF, TABLE, LOG, LISTING])
def test_data_code_and_logs_are_cut_into_lines(text: str) -> None:
    assert unit_kind(text) is UnitKind.LINE


@pytest.mark.parametrize("text", [PROSE, MARKDOWN, "", "One word", "Document [1](Title: A) It is so. It was so.\n"])
def test_prose_is_cut_into_sentences(text: str) -> None:
    assert unit_kind(text) is UnitKind.SENTENCE


def test_a_value_stands_under_its_keys() -> None:
    assert chain(JSON, "8443") == ["{", '"services": {', '"payments": {', '"port": 8443']
    assert contexts(JSON)['"port": 8443'] == '"services": "payments": "port": 8443'


def test_members_of_a_nameless_object_belong_to_the_first() -> None:
    assert chain(JSON, "guest") == ["{", '"users": [', "{", '"name": "bob",', '"role": "guest"']
    assert chain(YAML, "25") == ["services:", "- name: mail", "port: 25"]


def test_lines_belong_to_their_hunk_frame_table_and_entry() -> None:
    assert chain(DIFF, "+DEBUG") == ["+++ b/app.py", "@@ -20,2 +20,2 @@", "+DEBUG = 0"]
    assert chain(TRACE, "raise") == [
        "Traceback (most recent call last):",
        'File "run.py", line 9, in run',
        "raise KeyError(name)",
    ]
    assert chain(TRACE, "KeyError: ") == ["KeyError: 'payments'"]
    assert chain(TABLE, "8443") == ["| name | port |", "| payments | 8443 |"]
    assert chain(LOG, "at db") == ["2024-05-06 10:01:03 ERROR lost", "at db.connect"]
    assert chain(LOG, "stop") == ["2024-05-06 10:01:04 INFO stop"]


def test_sentences_are_read_after_headings_and_titles() -> None:
    sentences = ["# Ports\n", "The payments service listens.", " Others do not.\n", "## Mail\n", "Mail uses 25.\n"]
    seen = in_context("".join(sentences), sentences)
    assert [each.parent for each in seen] == [None, 0, 0, 0, 3]
    assert seen[4].text == "# Ports ## Mail Mail uses 25."
    cats = ["Document [3](Title: Cats (animals)) They sleep.", " They eat."]
    assert [each.text for each in in_context("".join(cats), cats)] == [cats[0], "(Cats (animals)) They eat."]
    assert [each.parent for each in in_context("".join(cats), cats)] == [None, None]


def test_brackets_alone_say_nothing() -> None:
    lines = JSON.splitlines(keepends=True)
    silent = [
        line.strip() for line, seen in zip(lines, in_context(JSON, lines), strict=True) if not seen.says_something
    ]
    assert set(silent) == {"{", "}", "},", "]"}


def test_indentation_counts_where_tokens_join_it_with_the_line_end_before() -> None:
    units = re.split(r"(?<=\n)(?!\s)|(?<=\n  )(?!\s)|(?<=\n    )(?!\s)|(?<=\n      )(?!\s)", JSON)
    units, lines = units[:-1], JSON.splitlines(keepends=True)
    assert "".join(units) == JSON
    assert [unit.strip() for unit in units] == [line.strip() for line in lines] != units
    assert [seen.parent for seen in in_context(JSON, units)] == [seen.parent for seen in in_context(JSON, lines)]
