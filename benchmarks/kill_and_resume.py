"""Does a run that is killed again and again end as the run that was never killed?

    python -m benchmarks.kill_and_resume              # 30 kills of each of two runs, 15 minutes
    python -m benchmarks.kill_and_resume --kills 5

Runs `pretrain` once without interruption. Then starts it again, kills it by SIGKILL at random
moments, a third of them while a checkpoint is being written and a third before its first step, and
goes on with `--resume` each time. Compares parameters, optimizer state, data position and metrics
to the bit, and writes a row for each optimizer to `results/kill_and_resume.json`.
"""

import argparse
import dataclasses
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from benchmarks.rows import RESULTS, Row, write_rows
from examples.llama.metrics import read_metrics

OUTPUT = RESULTS / "kill_and_resume.json"
COMMAND = "python -m benchmarks.kill_and_resume"
PROGRAM = (sys.executable, "-m", "examples.llama.pretrain")
_SIZES = "--batch 4 --sequence 32 --micro-batches 1 --evaluation-batches 2 --sample-length 0"
_LENGTHS = "--steps 300 --checkpoint-every 5 --evaluate-every 25 --log-every 1 --keep 3"
RUNS = {
    "APOLLO, float32": "--optimizer apollo --update-proj-gap 7",
    "APOLLO-Mini, int8, layer-wise": (
        "--optimizer apollo_mini --project-embeddings --update layerwise --weights int8"
    ),
}
# A process that neither ends nor writes for so long hangs.
_PATIENCE_SECONDS = 300


@dataclasses.dataclass(frozen=True)
class Kill:
    """A moment at which a run was killed.

    Attributes:
      when: "start", "step" or "save", what was waited for.
      saving: Whether a checkpoint was being written.
      checkpoint: Step of the last whole one then, None before the first.
    """

    when: str
    saving: bool
    checkpoint: int | None


def kill_and_resume(
    command: Sequence[str], folder: Path, kills: int, draw: random.Random
) -> list[Kill]:
    """Runs a command to its end, killed on the way.

    Args:
      command: `pretrain` with its flags but `--resume`, writing to `folder`.
      folder: Of the run.
      kills: How often to kill it, unless it ends before.
      draw: Decides the moments.

    Returns:
      The kills.
    """
    done: list[Kill] = []
    while len(done) < kills:
        when = ("start", "step", "save")[len(done) % 3]
        process = _start(command, folder)
        if not _wait(process, folder, when, draw):
            break
        saving = _is_saving(folder)
        process.kill()
        process.wait()
        done.append(Kill(when, saving, max(_whole(folder), default=None)))
    process = _start(command, folder)
    if process.wait(timeout=None) != 0:
        raise RuntimeError(f"pretrain ended with {process.returncode}: {_log(folder).read_text()}")
    return done


def differences(one: Path, other: Path, step: int) -> list[str]:
    """What differs between two runs: names of arrays, "record" or "metrics"."""
    found = []
    for path, values in _arrays(one, step).items():
        if not np.array_equal(values, _arrays(other, step)[path]):
            found.append(path)
    if _record(one, step) != _record(other, step):
        found.append("record")
    lines = [
        [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(folder)]
        for folder in (one, other)
    ]
    return found + (["metrics"] if lines[0] != lines[1] else [])


def table(rows: Sequence[Row]) -> str:
    """The documentation's table."""
    lines = [
        "| run | kills | during a save | before the first step | what differs |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        counts = f"{row['kills']} | {row['during_a_save']} | {row['before_the_first_step']}"
        different = ", ".join(row["differences"]) or "nothing"
        lines.append(f"| {row['run']} | {counts} | {different} |")
    return "\n".join(lines)


def _start(command: Sequence[str], folder: Path) -> subprocess.Popen[bytes]:
    # A folder without a checkpoint is of a run that was killed before its first.
    resume = ["--resume"] if folder.is_dir() else []
    _log(folder).parent.mkdir(parents=True, exist_ok=True)
    with _log(folder).open("wb") as log:
        return subprocess.Popen(
            [*command, "--output", str(folder), *resume], stdout=log, stderr=subprocess.STDOUT
        )


def _log(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.log")


def _wait(process: subprocess.Popen[bytes], folder: Path, when: str, draw: random.Random) -> bool:
    """Waits for the moment to kill; False if the process ended before."""
    if when == "start":
        ready: Callable[[], bool] = lambda: True  # noqa: E731
        delay = draw.uniform(0.0, 8.0)
    elif when == "step":
        ready = lambda: b"  step " in _log(folder).read_bytes()  # noqa: E731
        delay = draw.uniform(0.0, 3.0)
    else:
        ready = lambda: b"  step " in _log(folder).read_bytes() and _is_saving(folder)  # noqa: E731
        delay = draw.uniform(0.0, 0.05)
    began = time.monotonic()
    while process.poll() is None and not ready():
        if time.monotonic() - began > _PATIENCE_SECONDS:
            process.kill()
            raise RuntimeError(f"pretrain hangs: {_log(folder).read_text()}")
        time.sleep(0.001)
    time.sleep(delay)
    return process.poll() is None


def _is_saving(folder: Path) -> bool:
    return any((folder / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def _whole(folder: Path) -> list[int]:
    return [int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdigit()]


def _arrays(folder: Path, step: int) -> dict[str, np.ndarray]:
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(folder.absolute() / "checkpoints" / str(step) / "state")
    return {jax.tree_util.keystr(p): np.asarray(x) for p, x in jax.tree.leaves_with_path(tree)}


def _record(folder: Path, step: int) -> dict[str, Any]:
    path = folder / "checkpoints" / str(step) / "record" / "metadata"
    return {k: v for k, v in json.loads(path.read_text()).items() if k not in ("seconds", "digest")}


def main() -> None:
    """Runs all and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30, help="of each run")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, flags in RUNS.items():
            command = [*PROGRAM, *f"{flags} {_SIZES} {_LENGTHS}".split()]
            whole, killed = (Path(scratch, name, kind) for kind in ("whole", "killed"))
            kill_and_resume(command, whole, 0, random.Random(options.seed))
            kills = kill_and_resume(command, killed, options.kills, random.Random(options.seed))
            row = {
                "run": name,
                "kills": len(kills),
                "during_a_save": sum(kill.saving for kill in kills),
                "before_the_first_step": sum(kill.when == "start" for kill in kills),
                "checkpoints": [kill.checkpoint for kill in kills],
                "differences": differences(whole, killed, 300),
            }
            print(json.dumps(row), flush=True)
            rows.append(row)
    write_rows(OUTPUT, COMMAND, rows)
    if any(row["differences"] for row in rows):
        raise SystemExit("a killed run is not the run that was never killed")


if __name__ == "__main__":
    main()
