"""Several processes on this machine train together, as several hosts would."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

from examples.llama.files import locked
from examples.llama.huggingface import load_llama
from examples.llama.metrics import read_metrics
from examples.llama.options import ProcessOptions
from examples.llama.processes import check_processes
from tests.examples.tiny_pretrain import losses, squares

STEPS = 6
# Seconds. Processes wait for each other where they start, compile and end, long on a busy machine.
TIMEOUT = 120
PATIENCE = 600


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    corpus = tmp_path_factory.mktemp("corpus") / "text.txt"
    corpus.write_text(squares())
    sizes = ["--sequence", "16", "--batch", "8", "--micro-batches", "1", "--rank", "4"]
    lengths = ["--evaluate-every", "3", "--evaluation-batches", "2", "--sample-length", "0"]
    return ["--data", str(corpus), *sizes, *lengths, "--checkpoint-every", "3"]


class Started(NamedTuple):
    process: subprocess.Popen[bytes]
    output: Path  # a file: a pipe that no one reads yet would hold the process when it is full


Launch = Callable[..., list[Started]]


@pytest.fixture
def launch(flags: list[str], tmp_path: Path) -> Iterator[Launch]:
    """Starts processes with two devices each; ends what is left of them."""
    started: list[Started] = []

    def start(number: int, output: Path, *more: str, timeout: int = TIMEOUT) -> list[Started]:
        command = [sys.executable, "-m", "tests.examples.tiny_pretrain", *flags]
        command += ["--output", str(output), *more]
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2"}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for index in range(number):
            joined = [
                *("--coordinator", f"127.0.0.1:{port}", "--processes", str(number)),
                *("--process", str(index), "--process-timeout", str(timeout)),
            ]
            said = tmp_path / f"output of process {len(started)}"
            with open(said, "wb") as file:
                process = subprocess.Popen(
                    command + (joined if number > 1 else []),
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=environment,
                )
            started.append(Started(process, said))
        return started[-number:]

    yield start
    for process, _ in started:
        process.kill()
        process.wait()


def ended(processes: list[Started]) -> list[tuple[int, str]]:
    """Exit codes and outputs."""
    codes = [process.wait(timeout=PATIENCE) for process, _ in processes]
    return [(code, each.output.read_text()) for code, each in zip(codes, processes, strict=True)]


def wait_for(path: Path, processes: list[Started]) -> None:
    for _ in range(10 * PATIENCE):
        if path.exists() or any(process.poll() is not None for process, _ in processes):
            break
        time.sleep(0.1)
    assert path.exists(), ended(processes)


@pytest.mark.parametrize(
    ("number", "mesh"),
    [
        pytest.param(2, "data=2,fsdp=2", marks=pytest.mark.slow),
        pytest.param(2, "tensor=2,fsdp=2", marks=pytest.mark.release),
        pytest.param(4, "data=2,fsdp=4", marks=pytest.mark.release),
    ],
)
def test_several_processes_train_as_one_and_go_on_as_one(
    number: int, mesh: str, launch: Launch, tmp_path: Path
) -> None:
    together, alone = tmp_path / "together", tmp_path / "alone"
    models = [tmp_path / "model of several", tmp_path / "model of one"]
    steps = ["--steps", str(STEPS), "--export"]
    for code, output in ended(launch(number, together, *steps, str(models[0]), "--mesh", mesh)):
        assert code == 0, output
    ((code, output),) = ended(launch(1, alone, *steps, str(models[1])))
    assert code == 0, output
    assert losses(together) == pytest.approx(losses(alone), rel=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        *(load_llama(folder)[1] for folder in models),
    )
    assert json.loads((together / "results.json").read_text())["runs"]

    # What several wrote, one goes on with.
    shutil.rmtree(together / "checkpoints" / str(STEPS))
    (together / "result.json").unlink()
    ((code, output),) = ended(launch(1, together, "--steps", str(STEPS), "--resume"))
    assert code == 0, output
    assert losses(together) == pytest.approx(losses(alone), rel=1e-5)


@pytest.mark.slow
def test_all_processes_refuse_a_folder_that_another_run_writes_to(
    launch: Launch, tmp_path: Path
) -> None:
    with locked(tmp_path / "run"):
        processes = launch(2, tmp_path / "run", "--steps", str(STEPS), "--mesh", "data=2,fsdp=2")
        (first, output), (second, other) = ended(processes)
    assert first == second == 2, output + other
    assert "another run writes to" in output
    assert "process 0 refuses this run" in other


ENDLESS = ["--steps", "100000", "--mesh", "data=2,fsdp=2", "--log-every", "1"]


@pytest.mark.parametrize(
    "killed",
    [pytest.param(0, marks=pytest.mark.release), pytest.param(1, marks=pytest.mark.slow)],
)
def test_when_one_is_killed_the_other_ends_and_says_so(
    killed: int, launch: Launch, tmp_path: Path
) -> None:
    # Where it does not fail in a collective, it waits as long.
    processes = launch(2, tmp_path / "run", *ENDLESS, timeout=60)
    wait_for(tmp_path / "run" / "checkpoints" / "3", processes)
    processes[killed].process.kill()
    # A collective fails at once; a process that does not take part in one hears by heartbeat.
    ((code, output),) = ended(processes[1 - killed : 2 - killed])
    assert code not in (0, None)
    assert "may have ended" in output or "another task died" in output


@pytest.mark.slow
def test_sigterm_to_one_saves_in_all_and_a_damaged_checkpoint_is_skipped_by_all(
    launch: Launch, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    processes = launch(2, folder, *ENDLESS)
    wait_for(folder / "checkpoints" / "3", processes)
    processes[1].process.send_signal(signal.SIGTERM)
    (first, output), (second, _) = ended(processes)
    assert first == second == 128 + signal.SIGTERM, output
    assert "Stopped and saved" in output
    before, last = sorted(int(path.name) for path in (folder / "checkpoints").iterdir())[-2:]

    # One array's data, which only one of the two may have to read.
    data = max((folder / "checkpoints" / str(last)).rglob("d/*"), key=lambda p: p.stat().st_size)
    data.write_bytes(data.read_bytes()[:10])
    processes = launch(2, folder, *ENDLESS, "--resume")
    wait_for(folder / "checkpoints" / str(before + 3), processes)
    processes[0].process.send_signal(signal.SIGTERM)
    (first, output), (second, _) = ended(processes)
    assert first == second == 128 + signal.SIGTERM, output
    assert f"the run continues from step {before}\n" in output
    assert (folder / "damaged" / f"{last}-1").is_dir()
    steps = [line["step"] for line in read_metrics(folder) if "loss" in line]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (ProcessOptions(processes=2, process=0), "need --coordinator HOST:PORT"),
        (ProcessOptions("foo", 2, 0), "--coordinator is foo; expected HOST:PORT"),
        (ProcessOptions("auto", process=1), "need --coordinator HOST:PORT"),
        (ProcessOptions("host:1", processes=2), "needs --processes, how many there are, and"),
        (ProcessOptions("host:1", 2, 2), "--process is 2 of 2; expected 0 to 1"),
        (ProcessOptions("host:1", 2, 1, 0), "--process-timeout is 0"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: ProcessOptions, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        check_processes(options)
