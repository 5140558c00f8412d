"""`pretrain` on a small file system of its own, which is really full."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from examples.llama.metrics import read_metrics
from tests.examples.tiny_pretrain import losses, squares

# A file system that only the command sees, and that ends with it; then what is left in it is
# copied out.
_ON_A_SMALL_DISK = """
mount -t tmpfs -o size=32m none "$1" && shift && results=$1 && shift && "$@"
code=$?; cp -r "$(dirname "$results")/disk/." "$results"; exit $code
"""


def on_a_small_disk(disk: Path, results: Path, command: list[str]) -> subprocess.CompletedProcess:
    disk.mkdir()
    unshared = ["unshare", "--map-root-user", "--mount", "sh", "-c", _ON_A_SMALL_DISK, "sh"]
    return subprocess.run(
        [*unshared, str(disk), str(results), *command], capture_output=True, text=True, check=False
    )


def require_mounts() -> None:
    probe = "mount -t tmpfs none /tmp"
    unshare = ["unshare", "--map-root-user", "--mount", "sh", "-c", probe]
    if not shutil.which("unshare") or subprocess.run(unshare, capture_output=True).returncode:
        pytest.skip("this machine lets no user mount a file system; only a file's size is limited")


def options(folder: Path) -> list[str]:
    text = folder / "text.txt"
    text.write_text(squares())
    sizes = ["--sequence", "16", "--batch", "4", "--sample-length", "0", "--optimizer", "sgd"]
    lengths = ["--steps", "6", "--evaluate-every", "3", "--evaluation-batches", "1"]
    return ["--data", str(text), *sizes, *lengths, "--checkpoint-every", "2"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with room."""
    folder = tmp_path_factory.mktemp("whole")
    program = [sys.executable, "-m", "tests.examples.tiny_pretrain"]
    run = folder / "run"
    subprocess.run([*program, *options(folder), "--output", str(run)], check=True)
    return run


def assert_lost_nothing(
    ended: subprocess.CompletedProcess, reason: str, run: Path, whole: Path
) -> None:
    """The run stopped at its second checkpoint and went on from its first, to its end."""
    assert "filling up: 1" in ended.stdout, ended.stderr
    assert "with room: 0" in ended.stdout, ended.stderr
    errors = ended.stderr.splitlines()  # Orbax's threads may tell of it too, at any time
    (error,) = (line for line in errors if "checkpoint of step 4" in line and "--resume" in line)
    assert f"{reason}; that of step 2 is whole" in error, ended.stderr
    steps = [line["step"] for line in read_metrics(run) if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert losses(run) == losses(whole)


PROGRAM = [sys.executable, "-m", "tests.examples.full_disk"]


@pytest.mark.slow
def test_files_that_may_not_grow_stop_the_run_and_lose_nothing(whole: Path, tmp_path: Path) -> None:
    """Any user can limit files: more than the metrics take, less than the weights."""
    run = tmp_path / "run"
    command = [*PROGRAM, "none", "16384", *options(tmp_path), "--output", str(run)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert_lost_nothing(ended, "File too large", run, whole)


@pytest.mark.parametrize(
    "left",
    [pytest.param(16384, marks=pytest.mark.slow), pytest.param(0, marks=pytest.mark.release)],
)
def test_a_full_file_system_stops_the_run_and_loses_nothing(
    left: int, whole: Path, tmp_path: Path
) -> None:
    require_mounts()
    disk, results = tmp_path / "disk", tmp_path / "results"
    command = [*PROGRAM, str(disk / "filler"), str(left), *options(tmp_path)]
    ended = on_a_small_disk(disk, results, [*command, "--output", str(disk / "run")])
    assert_lost_nothing(ended, "No space left on device", results / "run", whole)
