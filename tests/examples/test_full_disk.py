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


@pytest.fixture(autouse=True)
def _mounts() -> None:
    probe = "mount -t tmpfs none /tmp"
    unshare = ["unshare", "--map-root-user", "--mount", "sh", "-c", probe]
    if not shutil.which("unshare") or subprocess.run(unshare, capture_output=True).returncode:
        pytest.skip("this machine lets no user mount a file system of their own")


@pytest.mark.parametrize(
    "left",
    [pytest.param(16384, marks=pytest.mark.slow), pytest.param(0, marks=pytest.mark.release)],
)
def test_a_full_file_system_stops_the_run_and_loses_nothing(left: int, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(squares())
    disk, results = tmp_path / "disk", tmp_path / "results"
    options = ["--data", str(tmp_path / "text.txt"), "--sequence", "16", "--batch", "4"]
    options += ["--steps", "6", "--evaluate-every", "3", "--evaluation-batches", "1"]
    options += ["--checkpoint-every", "2", "--sample-length", "0", "--optimizer", "sgd"]
    program = [sys.executable, "-m", "tests.examples.full_disk", str(disk / "filler"), str(left)]
    ended = on_a_small_disk(disk, results, [*program, *options, "--output", str(disk / "run")])
    assert "filling up: 1" in ended.stdout, ended.stderr
    assert "with room: 0" in ended.stdout, ended.stderr
    errors = ended.stderr.splitlines()  # Orbax's threads may tell of it too, at any time
    (error,) = (line for line in errors if "checkpoint of step 4" in line and "--resume" in line)
    assert "No space left on device; that of step 2 is whole" in error, ended.stderr
    steps = [line["step"] for line in read_metrics(results / "run") if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]

    program = [sys.executable, "-m", "tests.examples.tiny_pretrain"]
    subprocess.run([*program, *options, "--output", str(tmp_path / "run")], check=True)
    assert losses(results / "run") == losses(tmp_path / "run")
