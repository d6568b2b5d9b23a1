"""Packages that only some of TerseLM needs, and the errors of other people's code in one line."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from terselm.errors import ConfigError


def need(package: str, extra: str) -> ModuleType:
    """Import a package that TerseLM does not always bring.

    Args:
        package: such as ``openai``, or a module in it, such as ``pyarrow.parquet``.
        extra: of TerseLM, that brings it.

    Raises:
        ConfigError: it is not installed, or is broken.
    """
    root = package.partition(".")[0]
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] == root:
            name = root.replace("_", "-")
            raise ConfigError(f"{name} is not installed; run: pip install 'terselm[{extra}]'") from None
        raise ConfigError(f"{root} cannot be imported: {first_line(error)}; install it again") from None
    except ImportError as error:
        raise ConfigError(f"{root} cannot be imported: {first_line(error)}; install it again") from None


def first_line(error: BaseException) -> str:
    """Why something failed, in one line: of an `OSError` what the system says, else the first line that says anything.

    A line that only announces the next one (it ends with a colon) is joined with it.
    """
    if isinstance(error, OSError) and error.strerror:
        return str(error.strerror)
    lines = [line.strip() for line in str(error).splitlines() if any(map(str.isalnum, line))]
    if not lines:
        return type(error).__name__
    if lines[0].endswith(":"):
        return " ".join(lines[:2]).rstrip(":")
    return lines[0]
