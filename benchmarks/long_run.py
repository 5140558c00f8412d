"""Does anything drift or grow in 20,000 steps with bfloat16 weights, rounded stochastically?

    python -m benchmarks.long_run        # 7 minutes on two cores

Trains a LLaMA of 140 thousand parameters by `pretrain`, once with float32 and once with bfloat16
weights, else the same. Writes for each 2,000 steps the validation loss, the median time of a step
and the largest resident memory of the process to `results/long_run.json`.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.rows import RESULTS, Row, write_rows
from examples.llama.config import LlamaConfig
from examples.llama.huggingface import save_llama
from examples.llama.metrics import read_metrics
from examples.llama.model import init_params

OUTPUT = RESULTS / "long_run.json"
COMMAND = "python -m benchmarks.long_run"
MODEL = LlamaConfig(256, hidden_size=64, intermediate_size=176, num_layers=2, num_heads=2)
STEPS, PARTS = 20_000, 10
_FLAGS = (
    "--tokenizer bytes --optimizer apollo_mini --learning-rate 0.02 --alpha 1 --batch 8 "
    "--sequence 64 --micro-batches 1 --compute f32 --sample-length 0 --evaluation-batches 100 "
    "--warmup-fraction 0.1"
)
_SAMPLED_SECONDS = 0.5


def long_run(folder: Path, weights: str, steps: int = STEPS) -> Row:
    """Trains and measures, from outside the process that trains."""
    loaded = folder / "model"
    if not loaded.is_dir():
        save_llama(loaded, MODEL, init_params(MODEL, 0))
    run = folder / weights
    each = steps // PARTS
    command = [sys.executable, "-m", "examples.llama.pretrain", *_FLAGS.split()]
    command += ["--load", str(loaded), "--weights", weights, "--steps", str(steps)]
    command += ["--evaluate-every", str(each), "--checkpoint-every", str(each)]
    command += ["--log-every", "100", "--output", str(run)]
    began = time.perf_counter()
    memory: dict[int, int] = defaultdict(int)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            part = min(_last_step(run) // each, PARTS - 1)
            memory[part] = max(memory[part], _resident_bytes(process.pid))
            time.sleep(_SAMPLED_SECONDS)
    if process.returncode:
        raise RuntimeError(f"pretrain ended with {process.returncode}")
    lines = read_metrics(run)
    return {
        "weights": weights,
        "steps": steps,
        "skipped_steps": sum("skipped" in line for line in lines),
        "seconds": round(time.perf_counter() - began, 1),
        "validation_loss": [
            round(line["validation_loss"], 4) for line in lines if "validation_loss" in line
        ],
        "step_milliseconds": _step_milliseconds(lines, each),
        "resident_megabytes": [round(memory[part] / 1e6) for part in range(PARTS)],
    }


def table(rows: Sequence[Row]) -> str:
    """The documentation's table: a line a part of the steps."""
    of = {row["weights"]: row for row in rows}
    lines = [
        "| until step | loss, float32 | loss, bfloat16 | ms a step | MB, float32 | MB, bfloat16 |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for part in range(PARTS):
        last = of["f32"]["steps"] * (part + 1) // PARTS
        loss, time_, memory = (
            [of[weights][name][part] for weights in ("f32", "bf16")]
            for name in ("validation_loss", "step_milliseconds", "resident_megabytes")
        )
        lines.append(
            f"| {last:,} | {loss[0]:.3f} | {loss[1]:.3f} | {time_[1]:.1f} | {memory[0]} | "
            f"{memory[1]} |"
        )
    return "\n".join(lines)


def _step_milliseconds(lines: list[dict[str, Any]], each: int) -> list[float]:
    """The medians of every part, of the time between two lines of progress."""
    times = sorted({line["seconds"]: line["step"] for line in lines if "loss" in line}.items())
    # Lines are written a hundred steps at a time.
    per_step: dict[int, list[float]] = defaultdict(list)
    groups = [list(group) for _, group in itertools.groupby(times, lambda t: (t[1] - 1) // 100)]
    for before, after in itertools.pairwise(groups):
        seconds = after[-1][0] - before[-1][0]
        per_step[(after[-1][1] - 1) // each].append(1000 * seconds / 100)
    return [round(statistics.median(per_step[part]), 2) for part in sorted(per_step)]


def _last_step(run: Path) -> int:
    path = run / "metrics.jsonl"
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 1000))
        lines = file.read().decode().splitlines()
    whole = [line for line in lines if line.startswith('{"step"') and line.endswith("}")]
    return json.loads(whole[-1])["step"] if whole else 0


def _resident_bytes(process: int) -> int:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    kilobytes = [line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")]
    return 1024 * int(kilobytes[0]) if kilobytes else 0


def main() -> None:
    """Runs both and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for weights in ("f32", "bf16"):
            rows.append(long_run(Path(folder), weights, options.steps))
            print(json.dumps(rows[-1]), flush=True)
    write_rows(OUTPUT, COMMAND, rows)


if __name__ == "__main__":
    main()
