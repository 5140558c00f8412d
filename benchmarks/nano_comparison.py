"""Trains the README's comparison and keeps its numbers and its picture.

python -m benchmarks.nano_comparison
"""

import dataclasses
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.rows import RESULTS, Row, write_rows
from examples.llama import pretrain
from examples.llama.report import RunResult, results_markdown

OUTPUT = RESULTS / "nano_comparison.json"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "nano_comparison.png"
ARGUMENTS = ("--compare", "adamw,apollo,apollo_mini")


def table(rows: Sequence[Row]) -> str:
    """The table that the run ends in."""
    fields = [field.name for field in dataclasses.fields(RunResult)]
    results = [RunResult(**{name: row[name] for name in fields if name in row}) for row in rows]
    return results_markdown(results).rstrip()


def main() -> int:
    """Trains in a folder of its own, so that no earlier run is gone on with."""
    with tempfile.TemporaryDirectory() as folder:
        if code := pretrain.main([*ARGUMENTS, "--output", folder]):
            return code
        results = json.loads((Path(folder) / "results.json").read_text(encoding="utf-8"))
        shutil.copy(Path(folder) / "curves.png", PICTURE)
    about = {name: results[name] for name in ("data", "parameters", "batch", "sequence")}
    command = " ".join(["python -m examples.llama.pretrain", *ARGUMENTS])
    write_rows(OUTPUT, command, [about | run for run in results["runs"]])
    return 0


if __name__ == "__main__":
    sys.exit(main())
