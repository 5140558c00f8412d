"""Which learning rate (and alpha) does each optimizer need on the `nano` model?

    python -m benchmarks.nano_learning_rates --optimizer apollo_mini --learning-rate 0.01 --alpha 8

Trains the README's comparison model on the standard library with one setting and adds a row to
`results/nano_learning_rates.json`; a setting that has its row is not trained again. Without
options, all of `GRID`.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from benchmarks.nano import train_nano
from benchmarks.rows import RESULTS, Row, add_row, read_rows
from examples.llama import optimizers
from examples.llama.config import MODELS, PRESETS
from examples.llama.train import standard_training

OUTPUT = RESULTS / "nano_learning_rates.json"
STEPS, SEQUENCES = PRESETS["nano"].steps, PRESETS["nano"].sequences_per_batch
WARMUP_FRACTION = PRESETS["nano"].warmup_fraction
_ALPHAS = {"adamw": 1.0, "apollo": 1.0, "apollo_mini": PRESETS["nano"].alpha_mini}
_RATES: dict[optimizers.OptimizerName, tuple[float, ...]] = {
    "adamw": (1e-3, 2e-3, 4e-3),
    "apollo": (5e-3, 1e-2, 2e-2, 4e-2),
    "apollo_mini": (1e-2, 2e-2, 4e-2, 8e-2, 1.6e-1),
}
# For how long to warm up: (learning rate, alpha, part of the steps), of runs with more data.
_WARMUP_STEPS, _WARMUP_SEQUENCES = 400, 32
_WARMUPS: dict[optimizers.OptimizerName, list[tuple[float, float, float]]] = {
    "adamw": list(itertools.product((1e-3, 2e-3, 4e-3), (1.0,), (0.1, 0.3))),
    "apollo": [
        *((learning_rate, 1.0, 0.1) for learning_rate in (5e-3, 1e-2, 2e-2)),
        *((learning_rate, 1.0, 0.3) for learning_rate in (1e-2, 2e-2)),
    ],
    "apollo_mini": [
        *((5e-3, 8.0, 0.1), (1e-2, 8.0, 0.1), (1e-2, 4.0, 0.1), (2e-2, 4.0, 0.1), (2e-2, 8.0, 0.1)),
        *((1e-2, 8.0, 0.3), (2e-2, 4.0, 0.3), (2e-2, 8.0, 0.3), (4e-2, 2.8, 0.3), (8e-2, 1.4, 0.3)),
        (2e-2, 4.0, 0.5),
    ],
}
# Of SWAN's matrices, and by how much that of the vocabulary is higher.
_SWAN_RATES, _SWAN_VOCABULARY = (2e-3, 4e-3, 8e-3, 1.6e-2), (1, 4, 8, 15)


def _settings(
    name: optimizers.OptimizerName,
    steps: int,
    learning_rate: float,
    alpha: float,
    warmup_fraction: float,
    **others: Any,
) -> optimizers.OptimizerSettings:
    return optimizers.OptimizerSettings(
        name,
        learning_rate,
        steps,
        warmup_fraction,
        alpha=alpha,
        rank=PRESETS["nano"].rank,
        **others,
    )


def _swan(learning_rate: float, factor: float) -> optimizers.OptimizerSettings:
    vocabulary = {
        "vocabulary": "factored",
        "vocabulary_learning_rate": float(f"{factor * learning_rate:.3g}"),
    }
    return _settings("swan", STEPS, learning_rate, 1.0, WARMUP_FRACTION, **vocabulary)


# Settings and sequences a step.
GRID: list[tuple[optimizers.OptimizerSettings, int]] = [
    *(
        (_settings(name, STEPS, rate, _ALPHAS[name], WARMUP_FRACTION), SEQUENCES)
        for name, rates in _RATES.items()
        for rate in rates
    ),
    *((_swan(rate, 1), SEQUENCES) for rate in _SWAN_RATES),
    *((_swan(4e-3, factor), SEQUENCES) for factor in _SWAN_VOCABULARY[1:]),
    *(
        (_settings(name, _WARMUP_STEPS, *setting), _WARMUP_SEQUENCES)
        for name, settings in _WARMUPS.items()
        for setting in settings
    ),
]
_LABELS = {"adamw": "AdamW", "apollo": "APOLLO", "apollo_mini": "APOLLO-Mini"}


def table(rows: Sequence[Row]) -> str:
    """The learning rates of the README's comparison: a line an optimizer's rate."""
    lines = [
        "| optimizer | learning rate | scale | validation loss |",
        "| --- | ---: | ---: | ---: |",
    ]
    of_steps = [
        row
        for row in rows
        if (row["sequences"], row["total_steps"]) == (SEQUENCES, STEPS)
        and row["warmup_fraction"] == WARMUP_FRACTION
    ]
    for name, label in _LABELS.items():
        losses = {
            (row["learning_rate"], row["alpha"]): row["validation_loss"]
            for row in of_steps
            if row["name"] == name
        }
        lines += [
            f"| {label} | {rate:g} | {_scale(name, alpha)} | {losses[rate, alpha]:.3f} |"
            for rate, alpha in sorted(losses)
        ]
    for row in sorted(
        (row for row in of_steps if row["name"] == "swan"),
        key=lambda row: (row["learning_rate"], row["vocabulary_learning_rate"]),
    ):
        rates = f"{row['learning_rate']:g}, vocabulary {row['vocabulary_learning_rate']:g}"
        lines.append(f"| SWAN | {rates} |  | {row['validation_loss']:.3f} |")
    return "\n".join(lines)


def warmup_table(rows: Sequence[Row]) -> str:
    """How long to warm up: a line an optimizer's rate and scale."""
    lines = [
        "| optimizer | learning rate | scale | warm-up 10% | warm-up 30% |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    losses = {
        (row["name"], row["learning_rate"], row["alpha"], row["warmup_fraction"]): (
            f"{row['validation_loss']:.3f}"
        )
        for row in rows
        if row["sequences"] == _WARMUP_SEQUENCES
    }
    for name, label in _LABELS.items():
        settings = {key[1:3] for key in losses if key[0] == name and key[3] in (0.1, 0.3)}
        for rate, alpha in sorted(settings):
            short, long = (losses.get((name, rate, alpha, part), "") for part in (0.1, 0.3))
            lines.append(f"| {label} | {rate:g} | {_scale(name, alpha)} | {short} | {long} |")
    return "\n".join(lines)


def _scale(name: str, alpha: float) -> str:
    return "" if name == "adamw" else f"{alpha:g}"


def main() -> None:
    """Trains the settings asked for that have no row yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optimizer", choices=sorted({settings.name for settings, _ in GRID}))
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--alpha", type=float, default=1.0)
    parser.add_argument("--warmup-fraction", type=float, default=WARMUP_FRACTION)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    grid = [one for one in GRID if options.optimizer in (None, one[0].name)]
    if options.learning_rate is not None:
        asked = (options.learning_rate, options.alpha, options.warmup_fraction)
        grid = [(_settings(options.optimizer, options.steps, *asked), SEQUENCES)]
    for settings, sequences in grid:
        row = dataclasses.asdict(settings) | {"sequences": sequences}
        if any(_same_setting(row, done) for done in read_rows(OUTPUT)):
            continue
        tx = optimizers.make_optimizer(settings)
        training = standard_training(
            MODELS["nano"], tx, dtype="float32", micro_batches=sequences // 8
        )
        row["validation_loss"] = train_nano(training, settings.total_steps, sequences)[
            "validation_loss"
        ]
        add_row(OUTPUT, "python -m benchmarks.nano_learning_rates", row)
        print(
            f"{settings.name} {settings.learning_rate:g} alpha {settings.alpha:.3g}: "
            f"{row['validation_loss']:.4f}",
            flush=True,
        )


def _same_setting(row: Row, done: Row) -> bool:
    # Rows made before a setting existed are of its default.
    return all(done.get(name, value) == value for name, value in row.items())


if __name__ == "__main__":
    main()
