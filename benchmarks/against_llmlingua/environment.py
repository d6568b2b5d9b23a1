"""The peer's virtual environment."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from against_llmlingua.process import log
from terselm.errors import ConfigError, TerseLMError
from terselm.models.aliases import cache_folder

PEER = "llmlingua==0.2.2"
_LAST_THAT_WORKS = "transformers==4.46.3"  # it fails on the cache classes of later ones
_STAMP = "terselm-peer.json"  # written last: a folder without it is half made


def default_folder() -> Path:
    return cache_folder() / "peers" / PEER.replace("==", "-")


def peer_python(folder: Path, wheels: Path | None) -> Path:
    """The interpreter of the peer's environment, which is made if it is not there.

    Args:
        wheels: a folder of wheels to install, all of them and without an index; whatever they lack is then taken from
            the packages of the running interpreter. None: everything comes from the package index.

    Raises:
        ConfigError: the folder holds something else.
        TerseLMError: pip failed.
    """
    python = folder / "bin" / "python"
    if wheels is None:
        torch = version("torch").partition("+")[0]  # the same as ours; first, lest a dependency bring another
        installs = [[f"torch=={torch}"], [PEER, _LAST_THAT_WORKS]]
    else:
        files = sorted(map(str, wheels.glob("*.whl")))
        if not files:
            raise ConfigError(f"no wheels in {wheels}; expected those of {PEER} and {_LAST_THAT_WORKS}")
        installs = [["--no-index", "--no-deps", *files]]
    made = {"interpreter": sys.executable, "installs": installs}
    if _stamp(folder) == made:
        return python
    if folder.exists() and not (folder / "pyvenv.cfg").exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not a virtual environment; name a new folder for the peer's")
    log(f"making the peer's environment in {folder}")
    shutil.rmtree(folder, ignore_errors=True)
    _run([sys.executable, "-m", "venv", "--without-pip", str(folder)])
    for packages in installs:
        _run([sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", *packages])
    if wheels is not None:
        import torch as ours

        site = next((folder / "lib").glob("python*/site-packages"))
        (site / "running_interpreter.pth").write_text(f"{Path(ours.__file__).parents[1]}\n", encoding="utf-8")
    (folder / _STAMP).write_text(json.dumps(made) + "\n", encoding="utf-8")
    return python


def _stamp(folder: Path) -> Any:
    try:
        return json.loads((folder / _STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=sys.stderr)
    if done.returncode:
        raise TerseLMError(f"cannot make the peer's environment: `{' '.join(command[:6])} …` failed, see above")
