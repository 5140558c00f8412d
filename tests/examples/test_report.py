import io
import json
import math
from pathlib import Path

import pytest
import rich.console

from examples.llama.report import (
    RunResult,
    draw_curves,
    results_markdown,
    results_table,
    write_results,
)

RESULTS = [
    RunResult("apollo_mini", 0.01, 500, 2_048_000, 1.5, 2.16, 1_230_000, 3_430_000, 512.4),
    RunResult("adamw", 0.001, 500, 2_048_000, 1.625, None, 6_860_000, 3_430_000, None),
]


def test_markdown_has_a_row_a_run() -> None:
    header, _, mini, adamw = results_markdown(RESULTS).splitlines()
    assert header.startswith("| optimizer | learning rate | validation loss | perplexity |")
    assert mini == "| apollo_mini | 0.01 | 1.5000 | 4.482 | 1.2 MB | 0.36 | 512 |"
    assert adamw == "| adamw | 0.001 | 1.6250 | 5.078 | 6.9 MB | 2.00 | - |"


def test_table_shows_every_value_whole_in_80_columns() -> None:
    file = io.StringIO()
    rich.console.Console(file=file, width=80).print(results_table(RESULTS))
    text = file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    for value in ("apollo_mini", "1.5000", "4.482", "1.2 MB", "0.36", "512", "perplexity"):
        assert value in text
    assert "…" not in text


def test_results_file_holds_what_the_table_shows_and_what_is_said_of_the_runs(
    tmp_path: Path,
) -> None:
    write_results(tmp_path, RESULTS, {"data": "some text"})
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["data"] == "some text"
    assert [run["optimizer"] for run in written["runs"]] == ["apollo_mini", "adamw"]
    assert written["runs"][0]["perplexity"] == pytest.approx(math.exp(1.5))
    assert written["runs"][0]["state_per_parameter"] == pytest.approx(1.23 / 3.43)
    assert (tmp_path / "results.md").read_text() == results_markdown(RESULTS)


@pytest.mark.parametrize("last", [1.0, math.nan, math.inf], ids=str)
def test_curves_are_drawn_even_of_a_run_that_diverged(tmp_path: Path, last: float) -> None:
    curve = [{"step": step, "loss": 5.0 / step} for step in range(1, 5)]
    curve += [{"step": 5, "loss": last}, {"step": 5, "validation_loss": last}]
    draw_curves(tmp_path / "curves.png", {"adamw": curve, "sgd": curve[:2]}, title="title")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_perplexity_of_a_diverged_run_does_not_overflow() -> None:
    diverged = RunResult("sgd", 1.0, 1, 1, 1e6, None, 1, 1, None)
    assert math.isfinite(diverged.perplexity)
