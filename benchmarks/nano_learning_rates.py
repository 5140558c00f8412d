"""Which learning rate (and alpha) does each optimizer need on the `nano` model?

    python -m benchmarks.nano_learning_rates --optimizer apollo_mini --learning-rate 0.01 --alpha 8

Trains the README's comparison model on the standard library with one setting and adds a row to
`results/nano_learning_rates.json`; a setting that has its row is not trained again. Without
options, all of `GRID`.
"""

import argparse
import dataclasses
import itertools

from benchmarks.nano import train_nano
from benchmarks.rows import RESULTS, add_row, read_rows
from examples.llama import optimizers
from examples.llama.config import MODELS
from examples.llama.train import standard_training

OUTPUT = RESULTS / "nano_learning_rates.json"
STEPS = 400

# (learning rate, alpha, part of the steps for warm-up)
GRID: dict[optimizers.OptimizerName, list[tuple[float, float, float]]] = {
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


def main() -> None:
    """Trains the settings asked for that have no row yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optimizer", choices=[*GRID])
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--alpha", type=float, default=1.0)
    parser.add_argument("--warmup-fraction", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    grid = [(name, *setting) for name, settings in GRID.items() for setting in settings]
    if options.learning_rate is not None:
        setting = (options.learning_rate, options.alpha, options.warmup_fraction)
        grid = [(options.optimizer, *setting)]
    elif options.optimizer is not None:
        grid = [setting for setting in grid if setting[0] == options.optimizer]
    for name, learning_rate, alpha, warmup_fraction in grid:
        settings = optimizers.OptimizerSettings(
            name,
            learning_rate,
            options.steps,
            warmup_fraction,
            alpha=alpha,
            rank=MODELS["nano"].hidden_size // 4,
        )
        row = dataclasses.asdict(settings)
        if any(row.items() <= done.items() for done in read_rows(OUTPUT)):
            continue
        tx = optimizers.make_optimizer(settings)
        training = standard_training(MODELS["nano"], tx, dtype="float32")
        row |= train_nano(training, options.steps)
        add_row(OUTPUT, "python -m benchmarks.nano_learning_rates", row)
        print(
            f"{name} {learning_rate:g} alpha {alpha:.3g}: {row['validation_loss']:.4f}", flush=True
        )


if __name__ == "__main__":
    main()
