import contextlib
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from examples.llama import run
from examples.llama.bad_steps import Outcome
from examples.llama.config import MODELS
from examples.llama.pretrain import main
from examples.llama.step_times import StepTimes
from examples.llama.train import TrainState
from tests.examples.tiny_pretrain import TINY, squares

STEP_SECONDS = 0.25


class Clock:
    """Stands still but for what moves it on."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Running:
    """A number that a device still computes: whoever needs it waits, once, for some seconds."""

    def __init__(self, value: Any, clock: Clock, seconds: float):
        self.value, self.clock, self.seconds = value, clock, seconds

    def block_until_ready(self) -> "Running":
        self.clock.now += self.seconds
        self.seconds = 0.0
        return self

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.block_until_ready().value, dtype)

    def __int__(self) -> int:
        return int(self.block_until_ready().value)

    def __float__(self) -> float:
        return float(self.block_until_ready().value)


def test_time_of_a_step_includes_the_wait_for_its_result() -> None:
    clock = Clock()
    times = StepTimes(clock)
    times.wait(times.begin(), Running(1.0, clock, STEP_SECONDS))
    assert times.median() == STEP_SECONDS


def test_steps_in_flight_are_not_counted_twice() -> None:
    clock = Clock()
    times = StepTimes(clock)
    began = [times.begin(), times.begin()]  # both dispatched before the first is waited for
    for moment in began:
        times.wait(moment, Running(1.0, clock, STEP_SECONDS))
    assert times.median(last=2) == STEP_SECONDS


def test_time_between_steps_is_not_that_of_a_step() -> None:
    clock = Clock()
    times = StepTimes(clock)
    for _ in range(2):
        times.wait(times.begin(), Running(1.0, clock, STEP_SECONDS))
        clock.now += 60  # an evaluation
    assert times.median() == STEP_SECONDS


@pytest.mark.parametrize(("first_only", "expected"), [(True, 30.0), (False, STEP_SECONDS)])
def test_first_step_counts_only_where_there_is_no_other(first_only: bool, expected: float) -> None:
    clock = Clock()
    times = StepTimes(clock)
    for seconds in [30.0] if first_only else [30.0, STEP_SECONDS]:
        times.wait(times.begin(), Running(1.0, clock, seconds))
    assert times.median() == expected


@pytest.mark.parametrize(("steps", "log_every"), [(2, None), (10, None), (10, 100)])
def test_short_run_prints_and_keeps_the_time_in_which_results_come(
    steps: int,
    log_every: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()

    def compile_step(*args: Any) -> Any:
        def take_step(state: TrainState, tokens: np.ndarray) -> tuple[TrainState, Outcome]:
            outcome = (Running(value, clock, STEP_SECONDS / 2) for value in (1.0, 0))
            return state._replace(step=state.step + 1), Outcome(*outcome)  # type: ignore[arg-type]

        return take_step

    monkeypatch.setitem(MODELS, "nano", TINY)
    monkeypatch.setattr(run, "_compile_step", compile_step)
    monkeypatch.setattr(run, "time", SimpleNamespace(perf_counter=clock))
    text = tmp_path / "text.txt"
    text.write_text(squares())
    sizes = ["--sequence", "16", "--batch", "4", "--steps", str(steps), "--sample-length", "0"]
    logs = [] if log_every is None else ["--log-every", str(log_every)]
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert main(["--data", str(text), "--output", str(tmp_path / "out"), *sizes, *logs]) == 0
    progress = [line for line in output.getvalue().splitlines() if "tokens/s" in line]
    assert all(" 256 tokens/s " in line for line in progress)  # 64 in a quarter of a second
    if log_every is None:
        assert len(progress) == steps
        assert progress[0].endswith(f"0:{round(STEP_SECONDS * (steps - 1)):02} left")
    of_table = [line for line in output.getvalue().splitlines() if line.startswith("apollo ")][-1]
    assert of_table.split()[-1] == "250"
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [result["step_milliseconds"] for result in results["runs"]] == [250.0]
