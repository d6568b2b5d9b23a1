"""Old import paths go on working, and say where their contents are now."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from package_tree import modules

import terselm
from terselm.moved import MOVED, RENAMED


@pytest.mark.parametrize("old", MOVED)
def test_an_old_module_is_found_where_it_is_now(old: str) -> None:
    assert f"terselm.{old}" not in modules(), "it is there: take it out of the list"
    for home in MOVED[old].split():
        assert f"terselm.{home}" in modules()
    sys.modules.pop(f"terselm.{old}", None)
    with pytest.warns(DeprecationWarning, match=rf"terselm\.{old} has moved to terselm\.{MOVED[old].split()[0]}"):
        importlib.import_module(f"terselm.{old}")


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_name_stands_for_the_new_one(old: str) -> None:
    module, _, name = f"terselm.{old}".rpartition(".")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert getattr(importlib.import_module(module), name).__name__ == RENAMED[old]


def test_users_paths_as_users_write_them() -> None:
    code = (
        "from terselm.compress.protect import Preset\n"
        "from terselm.compress.evaluation.runner import Run\n"
        "from terselm.train.config import AlignConfig\n"
        "import terselm.compress.target as target\n"
        "from terselm.compress.prompt import Preset as now\n"
        "assert Preset is now and target.Target(budget=3).budget == 3\n"
        "print(Run.__name__, AlignConfig.__name__)\n"
    )
    done = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True)
    assert done.stdout == "Evaluation AlignSettings\n", done.stderr
    assert (
        "<string>:1: DeprecationWarning: terselm.compress.protect has moved to terselm.compress.prompt" in done.stderr
    )


def test_what_never_was_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("terselm.compress.evaluation.nothing")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from terselm.compress import protect
    with pytest.raises(AttributeError, match=r"has moved to terselm\.compress\.prompt, which has no 'Nothing'"):
        protect.Nothing  # noqa: B018


def test_an_installation_without_the_list_says_what_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "terselm").mkdir()
    shutil.copy(terselm.__file__, tmp_path / "terselm")
    done = subprocess.run(
        [sys.executable, "-c", "import terselm.extras"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(tmp_path)},
    )
    assert done.stderr.endswith("ModuleNotFoundError: No module named 'terselm.moved'\n")
