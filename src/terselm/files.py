"""Writing by one process at a time, so that a reader never sees half a file or half a folder, whatever kills it."""

from __future__ import annotations

import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal, TextIO, overload

from terselm.errors import ConfigError, DataFormatError

_PARTIAL = ".partial-"


@overload
def atomic_file(path: Path) -> AbstractContextManager[TextIO]: ...
@overload
def atomic_file(path: Path, *, binary: Literal[True]) -> AbstractContextManager[BinaryIO]: ...
def atomic_file(path: Path, *, binary: bool = False) -> AbstractContextManager[IO[Any]]:
    """Open a file that appears under ``path`` only once it is complete and on disk.

    Args:
        path: its final name; missing folders are made.
        binary: take bytes instead of text, which is written as UTF-8 with LF at the ends of lines.

    Raises:
        OSError: the disk is full or the folder is not writable; ``path`` is then as it was.
    """
    return _atomic_file(path, binary)


@contextmanager
def _atomic_file(path: Path, binary: bool) -> Iterator[IO[Any]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}{_PARTIAL}", dir=path.parent)
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") if binary else os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.chmod(0o666 & ~_umask())
        partial.replace(path)
        _sync_folder(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``path`` that is renamed to ``path`` when the block ends well.

    Files are flushed to disk before the rename. If the block fails, the folder is removed; if the process is killed,
    it stays under a name that no reader takes for a finished one.

    Raises:
        FileExistsError: ``path`` exists, before anything is written.
    """
    if path.exists():
        raise FileExistsError(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}{_PARTIAL}", dir=path.parent))
    try:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                file.chmod(0o666 & ~_umask())  # some writers (safetensors) make files that only the owner can read
        flush_folder(partial)
        partial.chmod(0o777 & ~_umask())
        partial.rename(path)
        _sync_folder(path.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def flush_folder(path: Path) -> None:
    """Return once every file below ``path`` is on disk."""
    for file in path.rglob("*"):
        if file.is_file():
            _sync(file)
    _sync_folder(path)


def remove_partials(path: Path) -> None:
    """Remove what killed writers of ``path`` left beside it. Only safe while no other writer can be at work."""
    for partial in path.parent.glob(f".{glob.escape(path.name)}{_PARTIAL}*"):
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        DataFormatError: it cannot be read, or is not JSON in UTF-8.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataFormatError(path, None, f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataFormatError(path, None, f"not UTF-8 (byte {error.start + 1})") from None
    except json.JSONDecodeError as error:
        message = f"broken JSON at character {error.colno}: {error.msg}"
        raise DataFormatError(path, error.lineno, message) from None
    except (ValueError, RecursionError) as error:  # a number of too many digits; too deep
        raise DataFormatError(path, None, f"broken JSON: {error}") from None


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_folder(path: Path) -> None:
    if os.name == "posix":  # other systems cannot open a folder
        _sync(path)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Be the one process that writes ``path``, which need not exist.

    Raises:
        ConfigError: another process is writing it.
    """
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = lock_of(path)
    try:
        with FileLock(lock, timeout=0):
            try:
                yield
            finally:
                with suppress(OSError):  # Windows keeps an open file
                    lock.unlink()
    except Timeout:
        raise ConfigError(f"another process is writing {path}; wait for it, or name another file") from None


def lock_of(path: Path) -> Path:
    """The file that `locked` locks; it stays behind when its process is killed, and does no harm."""
    return path.with_name(f".{path.name}.lock")
