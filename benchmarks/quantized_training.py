"""Do APOLLO and APOLLO-Mini train int8 weights as well as float ones, and what is rounding's part?

    python -m benchmarks.quantized_training

Trains the README's comparison model layer by layer with float32 weights, with int8 weights rounded
stochastically, and with int8 weights rounded to nearest, and adds a row for each to
`results/quantized_training.json`; half an hour on two cores. Prints the documentation's table.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from benchmarks.nano import train_nano
from benchmarks.rows import RESULTS, Row, add_row, read_rows
from examples.llama.config import MODELS
from examples.llama.layered import layered_training
from examples.llama.optimizers import OptimizerSettings, make_optimizer

OUTPUT = RESULTS / "quantized_training.json"
COMMAND = "python -m benchmarks.quantized_training"
STEPS, SEQUENCES = 400, 32
SETTINGS = {
    "apollo": OptimizerSettings("apollo", 2e-2, STEPS, 0.3, rank=MODELS["nano"].hidden_size // 4),
    "apollo_mini": OptimizerSettings("apollo_mini", 4e-2, STEPS, 0.3, alpha=2.8),
}
WEIGHTS: dict[str, dict[str, Any]] = {
    "float32": {"weights": "f32"},
    "int8, stochastic rounding": {"weights": "int8", "rounding": "stochastic"},
    "int8, rounded to nearest": {"weights": "int8", "rounding": "nearest"},
}


def find_row(rows: Sequence[Row], optimizer: str, weights: str) -> Row | None:
    """The row of one cell of the table; None if it was not measured yet."""
    asked = {"name": optimizer, "weights": weights}
    return next((row for row in rows if asked.items() <= row.items()), None)


def table(rows: Sequence[Row]) -> str:
    """Validation losses, in Markdown, with their distance from the float run."""
    lines = [
        "| weights | " + " | ".join(SETTINGS) + " |",
        "| --- |" + " ---: |" * len(SETTINGS),
    ]
    for weights in WEIGHTS:
        cells = []
        for optimizer in SETTINGS:
            exact, row = find_row(rows, optimizer, "float32"), find_row(rows, optimizer, weights)
            assert exact is not None
            assert row is not None
            loss, reference = row["validation_loss"], exact["validation_loss"]
            cells.append(
                f"{loss:.4f}" if row is exact else f"{loss:.4f} ({loss / reference - 1:+.1%})"
            )
        lines.append(f"| {weights} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Trains what has no row yet, and prints the table."""
    for optimizer, weights in itertools.product(SETTINGS, WEIGHTS):
        if find_row(read_rows(OUTPUT), optimizer, weights) is not None:
            continue
        tx = make_optimizer(SETTINGS[optimizer])
        training = layered_training(MODELS["nano"], tx, dtype="float32", **WEIGHTS[weights])
        row = dataclasses.asdict(SETTINGS[optimizer]) | {"weights": weights}
        row |= train_nano(training, STEPS, SEQUENCES)
        add_row(OUTPUT, COMMAND, row)
        print(f"{optimizer} {weights}: {row['validation_loss']:.4f}", flush=True)
    print(table(read_rows(OUTPUT)))


if __name__ == "__main__":
    main()
