"""What importing costs: torch and transformers only where they are used, extras never at import."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

import pytest
from package_tree import modules
from packaging.requirements import Requirement

REPORT = "import json, sys; print(json.dumps(sorted({'torch', 'transformers'} & sys.modules.keys())), file=sys.stderr)"
COMMAND = f"""
import sys
from importlib.metadata import entry_points
(script,) = entry_points(group="console_scripts", name="terselm")
sys.argv = ["terselm", *sys.argv[1:]]
try:
    script.load()()
finally:
    {REPORT}
"""

# The environment of the tests holds every extra; this makes the ones outside the base dependencies unfindable.
BASE_ONLY = """
import importlib, json, sys, traceback
from importlib.machinery import PathFinder

allowed, names = json.loads(sys.stdin.read())

class BaseOnly:
    find_distributions = PathFinder.find_distributions

    @staticmethod
    def find_spec(name, path=None, target=None):
        top = name.partition(".")[0]
        stdlib = top.startswith("_sysconfigdata")  # its name differs from system to system
        return PathFinder.find_spec(name, path, target) if stdlib or top in allowed else None

sys.meta_path = [BaseOnly if finder is PathFinder else finder for finder in sys.meta_path]
failed = {}
for name in names:
    try:
        importlib.import_module(name)
    except BaseException:
        failed[name] = traceback.format_exc(limit=-3)
print(json.dumps(failed))
"""


def test_import_terselm_is_light() -> None:
    done = subprocess.run([sys.executable, "-c", f"import terselm; {REPORT}"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "[]\n")


@pytest.mark.parametrize("arguments", [["--help"], ["compress", "--help"], ["publish", "--help"]])
def test_help_is_light(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", COMMAND, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
    assert done.stderr.splitlines()[-1] == "[]"


def test_every_module_imports_with_the_base_dependencies_alone() -> None:
    allowed = sorted(base_names() | sys.stdlib_module_names | {"terselm"})
    assert not {"peft", "accelerate", "datasets", "fastapi", "pytest"} & set(allowed)
    assert {"torch", "transformers", "yaml"} <= set(allowed)
    done = subprocess.run(
        [sys.executable, "-c", BASE_ONLY],
        input=json.dumps([allowed, sorted(modules())]),
        capture_output=True,
        text=True,
        check=True,
    )
    failed = json.loads(done.stdout.splitlines()[-1])
    assert not failed, "\n".join(f"{name}:\n{trace}" for name, trace in failed.items())


def test_a_missing_extra_is_refused() -> None:
    allowed = sorted(base_names() | sys.stdlib_module_names)
    done = subprocess.run(
        [sys.executable, "-c", BASE_ONLY], input=json.dumps([allowed, ["peft"]]), capture_output=True, text=True
    )
    assert "No module named 'peft'" in json.loads(done.stdout)["peft"]


def base_names() -> set[str]:
    """The top-level modules of the distributions that ``pip install terselm`` brings, without any extra."""
    closure: set[tuple[str, str]] = set()
    pending = [("terselm", "")]
    while pending:
        if (current := pending.pop()) in closure:
            continue
        closure.add(current)
        name, extra = current
        try:
            lines = requires(name) or []
        except PackageNotFoundError:  # a marker for another platform
            continue
        for requirement in map(Requirement, lines):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                pending += [(normal(requirement.name), wanted) for wanted in ("", *sorted(requirement.extras))]
    distributions = {name for name, _ in closure}
    return {
        module
        for module, owners in packages_distributions().items()
        if any(normal(owner) in distributions for owner in owners)
    }


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
