"""A benchmark's results: rows of a JSON file, each with the machine and versions that made it."""

import contextlib
import fcntl
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from examples.llama.machine import machine

RESULTS = Path(__file__).parent / "results"

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """Returns the rows measured so far."""
    return json.loads(path.read_text())["rows"] if path.exists() else []


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def add_rows(path: Path, command: str, rows: Sequence[Row]) -> None:
    """Adds rows made here, so that runs side by side and interrupted ones lose nothing."""
    with _locked(path):
        _write(path, command, [*read_rows(path), *(row | {"machine": machine()} for row in rows)])


def add_row(path: Path, command: str, row: Row) -> None:
    """Adds a row made here, as `add_rows` does."""
    add_rows(path, command, [row])


def write_rows(path: Path, command: str, rows: Sequence[Row]) -> None:
    """Writes the rows of one run, made here, in place of those that are there."""
    with _locked(path):
        _write(path, command, [row | {"machine": machine()} for row in rows])


def _write(path: Path, command: str, rows: Sequence[Row]) -> None:
    # A line a row: some are long, and a difference should show what was added.
    lines = ",\n".join(json.dumps(row) for row in rows)
    complete = path.with_suffix(".tmp")
    complete.write_text(f'{{\n "command": {json.dumps(command)},\n "rows": [\n{lines}\n ]\n}}\n')
    complete.replace(path)
