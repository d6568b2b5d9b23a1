"""The ledger alone knows its tables: no other file of the project holds SQL or opens a database."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from package_tree import modules

SQL = re.compile(
    r"\b(SELECT\b.+\bFROM|INSERT\b.+\bINTO|UPDATE\s+\w+\s+SET|DELETE\s+FROM|CREATE\s+(TABLE|INDEX)|PRAGMA)\b", re.DOTALL
)
LEDGER = "terselm.data.collection.ledger"


def sql_in(file: Path) -> list[str]:
    """Every string that looks like a statement, every call that executes one, and every import of sqlite3."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and SQL.search(node.value):
            lines.append(f"line {node.lineno}: {node.value[:60]!r}")
        if isinstance(node, ast.Attribute) and node.attr in ("execute", "executemany", "executescript"):
            lines.append(f"line {node.lineno}: {node.attr}")
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None)]
            lines += [f"line {node.lineno}: imports sqlite3" for name in names if name == "sqlite3"]
    return lines


def test_no_statement_outside_the_ledger() -> None:
    tree = modules()
    assert len(sql_in(tree[LEDGER])) > 20
    wrong = [f"{module}, {line}" for module, file in tree.items() if module != LEDGER for line in sql_in(file)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("import sqlite3", 1),
        ("from sqlite3 import connect", 1),
        ("db.execute('select state, count(*) from requests')", 1),
        ("q = f'UPDATE batches SET state={x}'", 1),
        ("say('Select a model from the list of five')", 0),
        ("say('Inserted two rows')", 0),
    ],
)
def test_the_search_sees_statements(tmp_path: Path, code: str, count: int) -> None:
    (tmp_path / "a.py").write_text(code)
    assert len(sql_in(tmp_path / "a.py")) == count
