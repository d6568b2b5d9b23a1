"""Where records come from, how often an epoch sees them, and what tells that they have changed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from terselm.data.rows import HUB
from terselm.errors import ConfigError, DataFormatError
from terselm.models import ALIASES, resolve
from terselm.train.config import DataSettings
from terselm.train.provenance import file_sha256, folder_sha256


@dataclass(frozen=True, kw_only=True)
class Source:
    """One file, folder or hub id.

    Attributes:
        name: as the user wrote it.
        times: how often an epoch sees each of its records; of a fraction, as many are drawn.
        fingerprint: changes with its content.
    """

    name: str
    times: float
    fingerprint: str


def read_sources(settings: DataSettings) -> list[Source]:
    """All sources of a run, in the order in which they are read.

    Raises:
        ConfigError: the hub cannot be asked what a data set holds.
        DataFormatError: a file cannot be read.
    """
    mixture = settings.mixture or {settings.records: 1.0}
    return [Source(name=name, times=times, fingerprint=_content(name)) for name, times in mixture.items()]


def combined(sources: list[Source]) -> str:
    """One fingerprint of all: that of the only source, if there is but one."""
    if len(sources) == 1:
        return sources[0].fingerprint
    return hashlib.sha256(json.dumps([source.fingerprint for source in sources]).encode()).hexdigest()


def model_fingerprint(name: str) -> str:
    """Changes with a model's weights, without loading them where that can be avoided."""
    if name in ALIASES:
        return f"{name} {ALIASES[name].sha256}"
    found = resolve(name)
    if isinstance(found, Path):
        return file_sha256(found) if found.is_file() else json.dumps(folder_sha256(found, leave_out=""))
    from huggingface_hub import model_info

    try:
        return f"{name} {model_info(name).sha}"
    except Exception as error:  # of whichever HTTP library the hub's client is built on
        raise ConfigError(f"the hub does not say which revision {name!r} is of: {_first_line(error)}") from None


def draw(sizes: list[int], sources: list[Source], seed: int) -> NDArray[np.int64]:
    """The examples of an epoch.

    Args:
        sizes: how many examples each source has; those of the first come first.
        sources: of the same order.
        seed: decides which examples a fraction means.

    Returns:
        ``(n,)`` int64 places, ascending within each time that a source is seen.
    """
    generator = np.random.default_rng(seed)
    drawn, first = [], 0
    for size, source in zip(sizes, sources, strict=True):
        whole, fraction = divmod(source.times, 1)
        places = np.arange(first, first + size)
        drawn += [places] * int(whole)
        if fraction:
            drawn.append(np.sort(generator.permutation(places)[: round(fraction * size)]))
        first += size
    return np.concatenate(drawn).astype(np.int64)


def _content(name: str) -> str:
    path = Path(name)
    if name.startswith(HUB):
        return _revision(name)
    try:
        return json.dumps(folder_sha256(path, leave_out="")) if path.is_dir() else file_sha256(path)
    except OSError as error:
        raise DataFormatError(path, None, f"cannot be read: {error.strerror}") from None


def _revision(name: str) -> str:
    from huggingface_hub import dataset_info

    try:
        return f"{name} {dataset_info(name.removeprefix(HUB).split('#')[0].split(':')[0]).sha}"
    except Exception as error:  # of whichever HTTP library the hub's client is built on
        raise ConfigError(
            f"the hub does not say which revision {name!r} is of: {_first_line(error)}; a file on this machine needs "
            "no hub"
        ) from None


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
