"""Files and folders that are there whole or not at all, whenever the process is killed."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

__all__ = ["filled", "holds_lock", "locked", "replaced", "require_fillable", "write_text"]

_LOCK = ".lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Holds the lock of a folder, which is made if it is missing.

    The lock ends with the process, however the process ends. The lock's file stays.

    Args:
      folder: What to lock.

    Yields:
      Whether it is locked. Windows and some network file systems have no such locks.

    Raises:
      BlockingIOError: If the lock is held already.
      OSError: If the folder cannot be made or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / _LOCK, "w") as file:
        yield _lock(file)


def holds_lock(folder: Path) -> bool:
    """Returns whether a folder was ever `locked`."""
    return (folder / _LOCK).exists()


def _lock(file: TextIO) -> bool:
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except (ImportError, OSError):
        return False
    return True


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yields the path to write a file at, which then takes the place of `path`.

    Nothing takes its place if an error is raised.
    """
    partial = path.with_name(f"{path.name}.partial")
    yield partial
    os.replace(partial, path)


@contextlib.contextmanager
def filled(folder: Path) -> Iterator[Path]:
    """Yields a folder to write files in, which then are in `folder`.

    A new folder is there with all of them or not at all. What else an existing one holds is left.
    """
    folder = folder.resolve()
    partial = _partial_folder(folder)
    yield partial
    if not folder.exists():
        os.replace(partial, folder)
        return
    for path in partial.iterdir():
        os.replace(path, folder / path.name)
    partial.rmdir()


def require_fillable(folder: Path) -> None:
    """Raises OSError if `filled` cannot write there."""
    partial = _partial_folder(folder.resolve())
    partial.mkdir(parents=True)
    partial.rmdir()


def _partial_folder(folder: Path) -> Path:
    """Where to write what goes in a folder, on the same file system; what was there is removed."""
    # Beside an existing folder there may be another file system.
    beside = folder.parent / f".{folder.name}.partial"
    partial = folder / ".partial" if folder.exists() else beside
    shutil.rmtree(partial, ignore_errors=True)
    return partial


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8."""
    with replaced(path) as partial:
        partial.write_text(text, encoding="utf-8")
