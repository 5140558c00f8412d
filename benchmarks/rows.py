"""A benchmark's results: rows of a JSON file, with the machine and versions they are from."""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("jax", "jaxlib", "optax", "flax", "numpy", "libtpu", "jax-cuda13-pjrt")

Row = dict[str, Any]


def machine() -> dict[str, Any]:
    """Describes the machine and versions, as far as they bear on a figure."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {"cpu": cpu, "cores": os.cpu_count(), "python": platform.python_version(), **versions}


def read_rows(path: Path) -> list[Row]:
    """Returns the rows measured so far."""
    return json.loads(path.read_text())["rows"] if path.exists() else []


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def add_row(path: Path, command: str, row: Row) -> None:
    """Adds a row, so that runs side by side and interrupted ones lose nothing."""
    with _locked(path):
        _write(path, command, [*read_rows(path), row])


def write_rows(path: Path, command: str, rows: Sequence[Row]) -> None:
    """Writes the rows of one run in place of those that are there."""
    with _locked(path):
        _write(path, command, rows)


def _write(path: Path, command: str, rows: Sequence[Row]) -> None:
    # A line a row: some are long, and a difference should show what was added.
    lines = ",\n".join(json.dumps(row) for row in rows)
    about = json.dumps({"command": command, "machine": machine()}, indent=1)
    complete = path.with_suffix(".tmp")
    complete.write_text(about.removesuffix("\n}") + f',\n "rows": [\n{lines}\n ]\n}}\n')
    complete.replace(path)
