"""How long a training step takes with each optimizer of the comparison, side by side.

    python -m benchmarks.convergence.step_time

Takes steps of all optimizers in turn, so that a machine's drift meets them all, and writes the
medians to `results/convergence_step_time.json`; a few minutes. A step is the whole one, forward,
backward and update. None of them decomposes a gradient, which GaLore and SVD do once in 200.
"""

import statistics
import time
from collections.abc import Sequence

import jax
import numpy as np

from benchmarks.convergence.methods import METHODS, MODEL, SEQUENCE_LENGTH, SEQUENCES, Trial
from benchmarks.convergence.training import initial_params, make_training
from benchmarks.rows import RESULTS, Row, read_rows, write_rows

OUTPUT = RESULTS / "convergence_step_time.json"
COMMAND = "python -m benchmarks.convergence.step_time"
_ROUNDS = 30


def measure(names: Sequence[str], rounds: int = _ROUNDS) -> list[Row]:
    """One row a method: median seconds of a step, and over AdamW's in the same rounds."""
    tokens = np.random.default_rng(0).integers(
        0, MODEL.vocab_size, (SEQUENCES, SEQUENCE_LENGTH + 1), np.int32
    )
    steps, states = {}, {}
    for name in names:
        trial = Trial(name, METHODS[name].start)
        training = make_training(trial)
        steps[name] = training.step
        states[name] = training.init_state(initial_params(trial.method, training, 0))
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        for name in names:
            began = time.perf_counter()
            states[name], loss = steps[name](states[name], tokens)
            jax.block_until_ready((states[name], loss))
            if number:  # the first compiles
                seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return [
        {
            "trial": name,
            "step_seconds": round(median, 4),
            "over_adamw": round(median / medians["adamw"], 3),
        }
        for name, median in medians.items()
    ]


def table(rows: Sequence[Row]) -> str:
    """Step times over AdamW's, in Markdown."""
    lines = ["| optimizer | step | over AdamW's |", "| --- | ---: | ---: |"]
    for row in sorted(rows, key=lambda row: row["over_adamw"]):
        label = METHODS[row["trial"]].label
        lines.append(f"| {label} | {1e3 * row['step_seconds']:.0f} ms | {row['over_adamw']:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Measures, writes and prints the table."""
    write_rows(OUTPUT, COMMAND, measure(list(METHODS)))
    print(table(read_rows(OUTPUT)))


if __name__ == "__main__":
    main()
