"""Who may import whom; nothing points back.

errors <- files, config, extras, progress, statistics <- models <- data <- compress <- train, evaluate <- cli.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, requires
from importlib.util import resolve_name
from pathlib import Path

import pytest
from package_tree import ROOT, modules, packages

RANK = {
    "terselm.errors": 0,
    "terselm.files": 1,
    "terselm.config": 1,
    "terselm.extras": 1,
    "terselm.progress": 1,
    "terselm.statistics": 1,
    "terselm.moved": 1,
    "terselm.models": 2,
    "terselm.data": 3,
    "terselm.compress": 4,
    "terselm.train": 5,
    "terselm.evaluate": 5,
    "terselm": 6,  # the public names, imported on first use
    "terselm.cli": 7,
    "terselm.__main__": 8,
}
WITH_TORCH = (  # the only places that know tensors, at any depth of a file
    "terselm.models",
    "terselm.train",
    "terselm.compress.engine",
    "terselm.evaluate.targets",
    "terselm.data.generate",
    "terselm.data.slots",
    "terselm.data.collection.local",
)
WITHOUT_TORCH = ("budget", "itpc", "layout", "length", "messages", "prompt", "result", "settings", "utility")


def room(module: str) -> str:
    return ".".join(module.split(".")[:2])


def imported(module: str, file: Path, known: set[str]) -> Iterator[str]:
    """Every module that a file imports, at any depth of the file; ``terselm.__version__`` aside."""
    package = module if file.stem == "__init__" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package) if node.level else str(node.module)
            for alias in node.names:
                if (name := f"{base}.{alias.name}") != "terselm.__version__":
                    yield name if name in known else base


def test_the_reader_sees_every_form_of_import(tmp_path: Path) -> None:
    file = tmp_path / "units.py"
    file.write_text(
        "import terselm.cli\n"
        "from terselm import train, Prompt, __version__\n"
        "if TYPE_CHECKING:\n    from terselm.data.records import Record\n"
        "def f():\n    from .prompt import Piece\n    from .. import errors\n"
    )
    known = {"terselm.train", "terselm.errors", "terselm.data.records"}
    assert set(imported("terselm.compress.units", file, known)) == {
        "terselm.cli",
        "terselm.train",
        "terselm",
        "terselm.data.records",
        "terselm.compress.prompt",
        "terselm.errors",
    }


def test_nothing_points_back() -> None:
    tree = modules()
    assert len(tree) > 10
    strangers = {room(module) for module in tree} - RANK.keys()
    assert not strangers, f"give these a place in RANK: {strangers}"
    wrong = [
        f"{module} imports {target}"
        for module, file in tree.items()
        for target in sorted(set(imported(module, file, set(tree))))
        if target.split(".")[0] == "terselm" and room(target) != room(module)
        # A name that is not ranked is not a module: something of the public names.
        if RANK.get(room(target), RANK["terselm"]) >= RANK[room(module)]
    ]
    assert not wrong, "\n".join(wrong)


def with_torch(tree: dict[str, Path]) -> list[str]:
    """Modules that import torch, or a module below it, outside the places for that."""
    return [
        module
        for module, file in tree.items()
        if any(name.split(".")[0] == "torch" for name in imported(module, file, set(tree)))
        and not any(f"{module}.".startswith(f"{place}.") for place in WITH_TORCH)
    ]


def test_only_a_few_rooms_know_tensors(tmp_path: Path) -> None:
    tree = modules()
    assert not with_torch(tree), f"torch is for {', '.join(WITH_TORCH)}"
    planted = tmp_path / "planted.py"
    planted.write_text("def f():\n    from torch.nn import functional\n")
    wrong = {
        f"terselm.{name}": planted for name in ("compress.planted", "compress.engines", "data.x", "cli.y", "files")
    }
    right = {f"terselm.{name}": planted for name in ("compress.engine.x", "models.y", "train.z", "data.slots")}
    assert with_torch(wrong | right) == list(wrong)


def test_a_script_imports_absolutely() -> None:
    script = modules()["terselm.train.align"]
    relative = [n.lineno for n in ast.walk(ast.parse(script.read_text())) if isinstance(n, ast.ImportFrom) and n.level]
    assert not relative, f"{script} is run as a script; relative imports at lines {relative} would fail"


def test_budget_arithmetic_needs_no_torch() -> None:
    code = (
        "import importlib, json, sys\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "print(json.dumps(sorted({'torch', 'transformers'} & sys.modules.keys())))"
    )
    names = [f"terselm.compress.{name}" for name in WITHOUT_TORCH]
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_train_shadows_nothing() -> None:
    """Run as a script, train/align.py has its own folder first on sys.path."""
    stems = {file.stem for file in packages()["terselm.train"].glob("*.py")} - {"__init__"}
    assert "align" in stems
    assert not stems & sys.stdlib_module_names
    assert not stems & top_level_names_of_dependencies()
    assert not stems & {"kernels", "triton_kernels", "liger_kernel", "flash_attn"}  # transformers tries these


def top_level_names_of_dependencies() -> set[str]:
    """What the dependencies of every extra put into site-packages; by their own names where they are not installed."""
    names: set[str] = set()
    pending, seen = ["terselm"], set()
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        names.add(name.replace("-", "_"))
        try:
            files = distribution(name).files or []
        except PackageNotFoundError:
            continue
        if name != "terselm":
            names |= {file.parts[0].split(".")[0] for file in files if file.suffix == ".py"}
        everything = name == "terselm"  # of others only what they need themselves
        pending += [
            re.match(r"[\w.-]+", line)[0].lower()  # type: ignore[index]
            for line in requires(name) or []
            if everything or "extra ==" not in line
        ]
    return names


@pytest.mark.parametrize("name", ["torch", "peft", "deepspeed", "huggingface_hub", "yaml"])
def test_names_of_dependencies_are_found(name: str) -> None:
    assert name in top_level_names_of_dependencies()


def test_every_module_is_in_a_listed_package() -> None:
    listed = set(packages().values())
    roots = [ROOT / "src" / "terselm", ROOT / "data", ROOT / "compress", ROOT / "train", ROOT / "evaluate"]
    assert set(roots) <= listed
    lost = [file for root in roots for file in root.rglob("*.py") if file.parent not in listed]
    assert not lost, f"add their packages to pyproject.toml: {lost}"
    of_code = [folder for folder in listed if any(folder.glob("*.py"))]  # the others hold data alone
    assert all((folder / "__init__.py").is_file() for folder in of_code)


def test_no_two_classes_have_one_name() -> None:
    homes: dict[str, list[str]] = {}
    for module, file in modules().items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name.lstrip("_"), []).append(module)
    shared = {name: where for name, where in homes.items() if len(where) > 1}
    assert not shared, f"a reader cannot tell these apart: {shared}"
    assert not [name for name in homes if name.endswith("Config")], "settings are called Settings"
