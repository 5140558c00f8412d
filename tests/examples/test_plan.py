import json
from typing import Any

import pytest

from examples.llama.config import MODELS, parameter_count
from examples.llama.plan import main

SMALL = ["--model", "nano", "--device", "cpu", "--batch", "2", "--sequence", "16"]


def planned(capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    assert main([*SMALL, "--json", *more]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_has_what_a_script_needs(capsys: pytest.CaptureFixture[str]) -> None:
    report = planned(capsys, "--weights", "f32")
    assert report["fits"] is True
    assert report["weight_bytes"] == 4 * parameter_count(MODELS["nano"])
    assert report["weight_bytes"] < report["argument_bytes"] <= report["peak_bytes"]
    assert report["capacity_bytes"] >= report["peak_bytes"] >= report["temporary_bytes"]
    assert {"collectives", "flops", "hbm_bytes"} <= set(report)
    assert "largest_batch" not in report


def test_layerwise_int8_needs_less_than_a_standard_update(
    capsys: pytest.CaptureFixture[str],
) -> None:
    layerwise = ["--update", "layerwise", "--project-embeddings", "--weights"]
    standard = planned(capsys, "--optimizer", "adamw", "--weights", "f32")
    in_int8 = planned(capsys, *layerwise, "int8")
    assert in_int8["argument_bytes"] < 0.15 * standard["argument_bytes"]
    assert in_int8["peak_bytes"] < standard["peak_bytes"]


def test_report_is_readable(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(SMALL) == 0
    output = capsys.readouterr().out
    assert "LLaMA-nano, apollo_mini, bf16 weights, standard update" in output
    assert "fits" in output
    assert "largest batch" not in output


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--device", "a100-80"], "a100-80gb"),
        (["--mesh", "rows=2"], "allowed are data=N"),
        (["--mesh", "data=3"], "3"),
        (["--weights", "int8"], "add --update layerwise"),
    ],
)
def test_wrong_input_is_answered_in_one_line(
    flags: list[str], match: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert match in error
