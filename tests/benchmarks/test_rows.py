"""Each row of a benchmark's results names the machine and the versions that made it."""

import json
from pathlib import Path

import pytest

from benchmarks.rows import RESULTS, add_row, read_rows, write_rows
from examples.llama.machine import machine

ELSEWHERE = {"cpu": "another", "cores": 96, "python": "3.13.0", "jax": "0.9.0"}


def test_adding_a_row_leaves_the_machines_of_the_others(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    others = [{"loss": 1.0, "machine": ELSEWHERE}, {"loss": 2.0, "machine": {}}]
    path.write_text(json.dumps({"command": "python", "rows": others}))
    add_row(path, "python", {"loss": 3.0})
    assert read_rows(path) == [*others, {"loss": 3.0, "machine": machine()}]


def test_rows_written_together_name_this_machine(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_rows(path, "python", [{"loss": 1.0}, {"loss": 2.0}])
    assert [row["machine"] for row in read_rows(path)] == [machine()] * 2


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_every_committed_row_names_its_machine_and_versions(path: Path) -> None:
    results = json.loads(path.read_text(encoding="utf-8"))
    rows = results.get("rows") or results["runs"]
    assert "machine" not in results
    for row in rows:
        assert {"cpu", "cores", "python", "jax", "jaxlib", "optax"} <= set(row.get("machine", ()))


def test_all_programs_for_tpus_are_of_one_compiler() -> None:
    files = [path for path in RESULTS.glob("*.json") if path.name != "nano_comparison.json"]
    machines = [row["machine"] for path in files for row in read_rows(path)]
    assert len({machine["libtpu"] for machine in machines if "libtpu" in machine}) == 1
