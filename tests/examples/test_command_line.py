import contextlib
import io
from collections.abc import Sequence

import pytest

from examples.llama import plan, pretrain
from examples.llama.command_line import model_name, parse
from examples.llama.options import PretrainConfig


def parsed(*argv: str) -> PretrainConfig:
    return parse(PretrainConfig, "train", argv, ["--steps 2"])


def refused(argv: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        parsed(*argv)
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("given", ["7b", "7B"])
def test_models_are_named_in_any_case(given: str) -> None:
    assert parsed("--model", given).model.name == "7b"


@pytest.mark.parametrize(
    ("given", "near"), [("8b", "7b and 13b"), ("65M", "60m and 130m"), ("llama-7b", "7b")]
)
def test_an_unknown_model_is_answered_with_its_neighbours(given: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"no model '{given}'; near it are {near}.*allowed are"):
        model_name(given)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--learning-rate", "fast"], "--learning-rate: .*FLOAT .*\\['fast'\\]"),
        (["--model", "8b"], "--model: there is no model '8b'; near it are 7b and 13b"),
        (["--optimizer", "adam"], "'adam' .*'apollo'"),
        (["--modle", "7b"], "--modle, 7b; perhaps you meant --model"),
        (["--steps"], "--steps"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
@pytest.mark.parametrize("columns", ["40", "200"])
def test_what_cannot_be_read_is_answered_in_one_line(
    argv: list[str],
    named: str,
    columns: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    error = refused(argv, capsys)
    assert error.count("\n") == 1
    assert error.startswith("error: ")
    assert error.endswith("All flags: train --help\n")
    with pytest.raises(AssertionError, match=named):
        raise AssertionError(error)


@pytest.mark.parametrize("program", [pretrain, plan])
@pytest.mark.parametrize("columns", [60, 100])
def test_help_fits_the_window_and_has_examples_that_can_be_read(
    program: object, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    output = io.StringIO()
    with contextlib.redirect_stdout(output), pytest.raises(SystemExit):
        program.main(["--help"])  # type: ignore[attr-defined]
    about, *_ = output.getvalue().split("Examples:")
    assert max(map(len, about.splitlines())) <= columns
    for example in program._EXAMPLES:  # type: ignore[attr-defined]
        assert example in output.getvalue()
        config = pretrain.PretrainConfig if program is pretrain else plan.PlanConfig
        parse(config, "x", example.split(), [])


@pytest.mark.parametrize(
    ("argv", "where"), [(["--data", ""], "after --data"), (["--output="], "of --output=")]
)
def test_an_empty_value_is_refused(
    argv: list[str], where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(argv, capsys) == f"error: an empty value {where}; fill it or leave it out\n"
