"""Which rates are next for a pair of rules, given its rows so far."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from benchmarks.frontier.pairs import OTHER_RULES, SMALLEST, SWAN, Pair
from benchmarks.frontier.rules import HIDDEN, VOCABULARY
from benchmarks.frontier.training import LANES, SETTINGS, Trial
from benchmarks.rows import Row

__all__ = ["SEEDS", "Sweep", "best_trial", "next_trials", "rows_of", "sweep_of"]

SEEDS = (0, 1, 2, 3, 4, 5)
"""The first is that of the sweeps."""
_NORMS = 1e-2
# Factors between neighbours of the rates of hidden matrices, vocabulary and norms.
_FACTORS = (2.0, 2.0, 3.0)


def rows_of(rows: Sequence[Row], pair: Pair) -> dict[Trial, float]:
    """Losses of a pair's trials, infinite of those that diverged."""
    return {
        Trial(*(row[field] for field in Trial._fields)): (
            math.inf if row["validation_loss"] is None else row["validation_loss"]
        )
        for row in rows
        if tuple(row[field] for field in Pair._fields) == pair
    }


def _trial(pair: Pair, steps: Sequence[int]) -> Trial:
    """The trial so many factors from the start of the sweep."""
    starts = (HIDDEN[pair.hidden].start, VOCABULARY[pair.vocabulary].start, _NORMS)
    hidden, vocabulary, norms = (
        float(f"{start * factor**step:.3g}")
        for start, factor, step in zip(starts, _FACTORS, steps, strict=True)
    )
    return Trial(hidden, vocabulary, norms)


def _steps(pair: Pair, trial: Trial) -> tuple[int, ...]:
    start = _trial(pair, (0, 0, 0))
    return tuple(
        round(math.log(rate / first, factor))
        for rate, first, factor in zip(trial[:3], start[:3], _FACTORS, strict=True)
    )


def best_trial(losses: Mapping[Trial, float]) -> Trial:
    """The trial of the lowest loss with the sweep's seed."""
    swept = {trial: loss for trial, loss in losses.items() if trial.seed == SEEDS[0]}
    return min(swept, key=lambda trial: swept[trial])


class Sweep(NamedTuple):
    """What is swept of a pair.

    Attributes:
      start: The first trial; None for a grid of the rates of matrices and vocabulary.
      axes: The rates that are swept, by their place in a trial: those of matrices, vocabulary and
        norms. The other rates are those of the start. What was trained at others of them counts.
      seeds: The first is that of the sweep. The best rates are trained with all of them.
    """

    start: Trial | None = None
    axes: tuple[int, ...] = (0, 1, 2)
    seeds: tuple[int, ...] = SEEDS


def sweep_of(rows: Sequence[Row], pair: Pair) -> Sweep:
    """How a pair is swept: in full at the smallest setting, with less where that is long.

    A larger setting begins at the best rates of the smallest, that of the matrices over how many
    times as wide the model is. The rate of its norms is not swept. Of the other rules for the
    matrices at the smallest setting, only the rate of the matrices is swept; the others are SWAN's.
    """
    reference = SWAN if pair in OTHER_RULES else pair._replace(setting=SMALLEST)
    losses = rows_of(rows, reference)
    if reference == pair or not losses:
        return Sweep()
    best = best_trial(losses)
    if pair in OTHER_RULES:
        return Sweep(best._replace(hidden_rate=HIDDEN[pair.hidden].start), (0,), SEEDS[:1])
    hidden, *others = _steps(pair, best)
    wider = SETTINGS[pair.setting].width / SETTINGS[SMALLEST].width
    start = _trial(pair, [hidden - round(math.log(wider, _FACTORS[0])), *others])
    return Sweep(start, (0, 1), SEEDS[:1])


def next_trials(
    pair: Pair, losses: Mapping[Trial, float], sweep: Sweep | None = None
) -> list[Trial]:
    """The trials to run next, at most `LANES` of them; none when the pair is complete.

    First the start of the sweep, by default a grid. Then what lies around the best, until each rate
    that is swept has a worse one on both sides. Then the best from other seeds.
    """
    start, axes, seeds = sweep or Sweep()
    if start is None and not losses:
        return [_trial(pair, (h, v, 0)) for h in (-1, 0, 1, 2) for v in (-1, 0, 1)][:LANES]
    best = best_trial(losses) if start is None or start in losses else start
    center = _steps(pair, best)
    around = [
        _trial(pair, [c + side * (axis == a) for a, c in enumerate(center)])
        for axis in axes
        for side in (-1, 1)
    ]
    tried = {trial[: len(axes)] for trial in losses if trial.seed == seeds[0]}
    missing = [best] if best not in losses else []
    missing += [trial for trial in around if trial[: len(axes)] not in tried]
    if missing:
        # The rest of the lanes go to what would be needed next: the corners, nearest first.
        sides = [(-1, 0, 1) if axis in axes else (0,) for axis in range(3)]
        offsets = sorted(itertools.product(*sides), key=lambda o: sum(map(abs, o)))
        corners = (
            _trial(pair, [c + o for c, o in zip(center, offset, strict=True)]) for offset in offsets
        )
        likely = [trial for trial in corners if trial not in losses and trial not in missing]
        return [*missing, *likely][:LANES]
    return [t for seed in seeds if (t := best._replace(seed=seed)) not in losses]
