"""The packages and modules of the working tree, as pyproject.toml lists them."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def packages() -> dict[str, Path]:
    """Each listed package with its folder."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    mapping: dict[str, str] = settings["package-dir"]

    def folder(package: str) -> Path:
        if package in mapping:
            return ROOT / mapping[package]
        parent, _, name = package.rpartition(".")
        return folder(parent) / name

    return {package: folder(package) for package in settings["packages"]}


def modules() -> dict[str, Path]:
    """Each importable module with its file; a package stands for its ``__init__.py``."""
    return {
        package if file.stem == "__init__" else f"{package}.{file.stem}": file
        for package, folder in packages().items()
        for file in sorted(folder.glob("*.py"))
    }
