"""Which trials are next, given the results so far."""

import math
from collections.abc import Mapping, Sequence

from benchmarks.convergence.methods import ABLATIONS, METHODS, Trial
from benchmarks.rows import Row

__all__ = ["best_learning_rate", "next_learning_rates", "sweep_losses", "wanted_trials"]

_SEEDS = (1, 2)


def next_learning_rates(
    start: float, losses: Mapping[float, float], *, fine: bool
) -> tuple[float, ...]:
    """Which learning rates a sweep needs next; none once its best has neighbours on both sides.

    Args:
      start: The middle of the first three, which are a factor of 2 apart.
      losses: Validation loss by learning rate, infinite if the training diverged.
      fine: Whether to look at a square root of 2 from the best as well.

    >>> next_learning_rates(0.01, {}, fine=False)
    (0.005, 0.01, 0.02)
    >>> next_learning_rates(0.01, {0.005: 3.0, 0.01: 2.5, 0.02: 2.0}, fine=False)
    (0.04,)
    >>> next_learning_rates(0.01, {0.005: 2.1, 0.01: 2.0, 0.02: 2.5}, fine=True)
    (0.00707, 0.0141)
    """

    def rate(octaves: float) -> float:
        return float(f"{start * 2**octaves:.3g}")

    first = tuple(rate(octaves) for octaves in (-1, 0, 1))
    if missing := tuple(x for x in first if x not in losses):
        return missing
    done = {round(math.log2(x / start)): loss for x, loss in losses.items()}
    whole = {octaves: losses[rate(octaves)] for octaves in done if rate(octaves) in losses}
    best = min(whole, key=lambda octaves: whole[octaves])
    steps = (1.0,) if not fine else (1.0, 0.5)
    for step in steps:
        neighbours = tuple(rate(best + side * step) for side in (-1, 1))
        if missing := tuple(x for x in neighbours if x not in losses):
            return missing
    return ()


def sweep_losses(rows: Sequence[Row], name: str) -> dict[float, float]:
    """Validation losses of a method's sweep, the first seed's, infinite where it diverged."""
    return {
        row["learning_rate"]: math.inf if row["validation_loss"] is None else row["validation_loss"]
        for row in rows
        if row["trial"] == name and row["seed"] == 0
    }


def best_learning_rate(rows: Sequence[Row], name: str) -> float | None:
    """The learning rate of a method's lowest loss; None while its sweep is not complete."""
    method, losses = METHODS[name], sweep_losses(rows, name)
    if next_learning_rates(method.start, losses, fine=method.fine):
        return None
    return min(losses, key=lambda rate: losses[rate])


def wanted_trials(rows: Sequence[Row]) -> list[Trial]:
    """The trials that can be run now: of the sweeps, then other seeds, then the ablations."""
    sweeps = [
        Trial(name, rate)
        for name, method in METHODS.items()
        for rate in next_learning_rates(method.start, sweep_losses(rows, name), fine=method.fine)
    ]
    best = {name: best_learning_rate(rows, name) for name in METHODS}
    seeds = [Trial(name, rate, seed) for seed in _SEEDS for name, rate in best.items() if rate]
    ablations = [
        Trial(name, float(f"{ablation.factor * rate:.3g}"))
        for name, ablation in ABLATIONS.items()
        if (rate := best[ablation.of])
    ]
    done = {(row["trial"], row["learning_rate"], row["seed"]) for row in rows}
    wanted = [*sweeps, *seeds, *ablations]
    return [t for t in wanted if (t.name, t.learning_rate, t.seed) not in done]
