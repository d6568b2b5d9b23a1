"""The locks in requirements/: what they pin serves pyproject.toml, and nothing is left to the day of installation."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from importlib.metadata import distributions
from typing import Any

import pytest
from package_tree import ROOT
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

FOLDER = ROOT / "requirements"
LOCKS = ("build", "demo", "dev", "deepspeed")
SYSTEMS = [
    {"python_version": python, "python_full_version": f"{python}.9", "sys_platform": system, "platform_system": name}
    for python in ("3.11", "3.12", "3.13")
    for system, name in (("linux", "Linux"), ("darwin", "Darwin"))
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXCLUDED = {line for line in (FOLDER / "excluded.txt").read_text().splitlines() if not line.startswith("#")} | {"torch"}


def pins(lock: str) -> list[tuple[Requirement, str]]:
    """Each pin of a lock with its hashes."""
    text = re.sub(r"^ *#.*\n", "", (FOLDER / f"{lock}.txt").read_text(encoding="utf-8"), flags=re.MULTILINE)
    entries = text.replace("\\\n", " ").splitlines()
    parts = [entry.partition(" --hash=") for entry in entries if entry]
    return [(Requirement(pin), mark + hashes) for pin, mark, hashes in parts]


def versions(lock: str, system: dict[str, str]) -> dict[str, Version]:
    """What a lock installs on a system.

    Raises:
        AssertionError: two versions of one package.
    """
    environment: dict[str, Any] = {**default_environment(), **system}
    chosen = [pin for pin, _ in pins(lock) if pin.marker is None or pin.marker.evaluate(environment)]
    found = {canonicalize_name(pin.name): Version(str(pin.specifier).removeprefix("==")) for pin in chosen}
    assert len(found) == len(chosen)
    return found


def asked(*extras: str) -> Iterator[Requirement]:
    """What pyproject.toml asks for with these extras, and with the extras that they name."""
    optional = PROJECT["optional-dependencies"]
    for line in [*PROJECT["dependencies"], *(line for extra in extras for line in optional[extra])]:
        requirement = Requirement(line)
        if requirement.name == PROJECT["name"]:
            yield from asked(*requirement.extras)
        else:
            yield requirement


def asked_in_file(name: str) -> Iterator[Requirement]:
    for line in (FOLDER / f"{name}.in").read_text(encoding="utf-8").splitlines():
        if line.startswith("-r "):
            yield from asked_in_file(line.removeprefix("-r ").removesuffix(".in"))
        elif not line.startswith("#"):
            yield Requirement(line)


@pytest.mark.parametrize("lock", LOCKS)
def test_every_package_has_one_version_and_its_hashes(lock: str) -> None:
    assert "make lock" in (FOLDER / f"{lock}.txt").read_text(encoding="utf-8").splitlines()[1]
    for pin, hashes in pins(lock):
        assert re.fullmatch(r"==[^*,]+", str(pin.specifier)), pin
        assert re.fullmatch(r"( *--hash=sha256:[0-9a-f]{64})+ *", hashes), pin
        assert pin.name not in EXCLUDED
        assert not pin.name.startswith(("nvidia-", "cuda-"))


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.name)
def test_no_package_index_is_named(path: Any) -> None:
    text = path.read_text(encoding="utf-8")
    assert "://" not in text
    assert "index" not in text
    assert "find-links" not in text


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: f"{system['python_version']}-{system['sys_platform']}")
@pytest.mark.parametrize(("lock", "extra"), [("demo", "train"), ("dev", "dev"), ("deepspeed", None), ("build", None)])
def test_it_serves_what_is_asked(lock: str, extra: str | None, system: dict[str, str]) -> None:
    locked = versions(lock, system)
    for requirement in [*(asked(extra) if extra else ()), *asked_in_file(lock)]:
        if requirement.name in EXCLUDED or (requirement.marker and not requirement.marker.evaluate(dict(system))):
            continue
        name = canonicalize_name(requirement.name)
        assert name in locked, f"{requirement} is not in requirements/{lock}.txt; run `make lock`"
        assert requirement.specifier.contains(locked[name]), (
            f"{name} {locked[name]} is not {requirement}; run `make lock`"
        )


def test_deepspeed_has_the_range_of_its_extra() -> None:
    assert list(asked_in_file("deepspeed")) == [one for one in asked("deepspeed") if one.name == "deepspeed"]


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: f"{system['python_version']}-{system['sys_platform']}")
def test_the_locks_agree(system: dict[str, str]) -> None:
    dev = versions("dev", system)
    assert versions("demo", system).items() <= dev.items()
    assert versions("build", system).items() <= dev.items()
    for name, version in versions("deepspeed", system).items():
        assert dev.get(name, version) == version


def test_it_holds_what_its_packages_need() -> None:
    """As far as these packages are installed here in their locked versions."""
    here = default_environment()
    system = {name: str(here[name]) for name in SYSTEMS[0]}  # type: ignore[literal-required]
    locked = versions("deepspeed", system) | versions("dev", system)
    read = 0
    for distribution in distributions():
        name = canonicalize_name(distribution.name)
        if locked.get(name) != Version(distribution.version):
            continue
        read += 1
        for requirement in map(Requirement, distribution.requires or []):
            wanted = canonicalize_name(requirement.name)
            if wanted in EXCLUDED or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
                continue
            assert wanted in locked, f"{name} needs {requirement}"
            assert requirement.specifier.contains(locked[wanted], prereleases=True), f"{name} needs {requirement}"
    assert read > 0
