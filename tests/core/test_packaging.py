"""The wheel and the sdist that users get."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from package_tree import ROOT, modules, packages

from terselm.models.aliases import ALIASES

pytestmark = pytest.mark.slow
_SAFELY: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # from 3.11.4 on
NOT_SOURCE = (".*", "build", "dist", "runs", "*.egg-info", "__pycache__")


@dataclass(frozen=True)
class Built:
    wheel: Path
    sdist: Path
    wheel_of_sdist: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Both distributions, built from a copy of the working tree."""
    source = tmp_path_factory.mktemp("source") / "terselm"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    wheel = build("--wheel", source, tmp_path_factory.mktemp("wheel"))
    sdist = build("--sdist", source, tmp_path_factory.mktemp("sdist"))
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, **_SAFELY)
    (folder,) = unpacked.iterdir()
    return Built(wheel, sdist, build("--wheel", folder, tmp_path_factory.mktemp("wheel_of_sdist")))


def build(kind: str, source: Path, out: Path) -> Path:
    command = [sys.executable, "-m", "build", "--no-isolation", kind, "--outdir", out, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (product,) = out.iterdir()
    return product


def contents(wheel: Path) -> dict[str, str]:
    """Each file's SHA-256; the list of the files themselves (RECORD) aside."""
    with zipfile.ZipFile(wheel) as archive:
        return {
            name: hashlib.sha256(archive.read(name)).hexdigest()
            for name in archive.namelist()
            if not name.endswith(("/", ".dist-info/RECORD"))
        }


def test_the_wheel_holds_terselm_and_nothing_else(built: Built) -> None:
    assert {name.split("/")[0] for name in contents(built.wheel)} == {
        "terselm",
        "terselm-" + built.wheel.name.split("-")[1] + ".dist-info",
    }
    assert built.wheel.name.endswith("-py3-none-any.whl")


def test_the_wheel_holds_every_module_and_every_sample(built: Built) -> None:
    expected = {f"terselm/{path}" for path in ["py.typed", *packaged_files(), *requirements_of_aliases()]}
    assert len(expected) > 20
    found = {name for name in contents(built.wheel) if name.startswith("terselm/")}
    assert found == expected


def packaged_files() -> list[str]:
    sample = packages()["terselm.data"] / "sample"
    samples = [f"data/sample/{f.relative_to(sample).as_posix()}" for f in sample.rglob("*") if f.is_file()]
    assert samples
    paths = {name: name.split(".")[1:] for name in modules()}
    return samples + [
        "/".join([*parts, "__init__.py"] if name in packages() else [*parts[:-1], f"{parts[-1]}.py"])
        for name, parts in paths.items()
    ]


def requirements_of_aliases() -> list[str]:
    """With the hashes of wheels; an error message tells users to install by them."""
    names = [alias.hashes.name for alias in ALIASES.values() if alias.reupload]
    assert names
    return [f"models/requirements/{name}" for name in names]


def test_licence_and_metadata(built: Built) -> None:
    files = contents(built.wheel)
    licence = hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest()
    assert [digest for name, digest in files.items() if name.endswith("licenses/LICENSE")] == [licence]
    with zipfile.ZipFile(built.wheel) as archive:
        (name,) = (name for name in files if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(name).decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata
    assert metadata.endswith((ROOT / "README.md").read_text(encoding="utf-8"))


def test_the_sdist_builds_the_same_wheel(built: Built) -> None:
    assert contents(built.wheel_of_sdist) == contents(built.wheel)


def test_the_wheel_installs_and_starts(built: Built, tmp_path: Path) -> None:
    """In an environment of its own, that sees the dependencies here but not this checkout."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    with zipfile.ZipFile(built.wheel) as archive:
        (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
        archive.extractall(site)
    here = Path(pytest.__file__).parents[1]
    code = (
        f"import sys; sys.path.append({str(here)!r}); sys.argv = ['terselm', '--help']\n"
        "import terselm; assert terselm.__file__.startswith(sys.prefix), terselm.__file__\n"
        "from terselm.cli import main; main()"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "compress" in done.stdout
