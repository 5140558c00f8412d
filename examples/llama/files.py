"""Files and folders that are there whole or not at all, whenever the process is killed."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

__all__ = ["replaced", "write_text"]


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yields the path to write a file or folder at, which then takes the place of `path`.

    Nothing takes its place if an error is raised.
    """
    partial = path.with_name(f"{path.name}.partial")
    _remove(partial)
    yield partial
    if partial.is_dir():
        _remove(path)
    os.replace(partial, path)


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8."""
    with replaced(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
