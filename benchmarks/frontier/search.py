"""Which rates are next for a pair of rules, given its rows so far."""

import itertools
import math
from collections.abc import Mapping, Sequence

from benchmarks.frontier.pairs import Pair
from benchmarks.frontier.rules import HIDDEN, VOCABULARY
from benchmarks.frontier.training import LANES, Trial
from benchmarks.rows import Row

__all__ = ["SEEDS", "best_trial", "next_trials", "rows_of"]

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


def next_trials(pair: Pair, losses: Mapping[Trial, float]) -> list[Trial]:
    """The trials to run next, at most `LANES` of them; none when the pair is complete.

    First a grid of the rates of matrices and vocabulary. Then what lies around the best, until each
    of its three rates has a worse one on both sides. Then the best from other seeds.
    """
    if not losses:
        return [_trial(pair, (h, v, 0)) for h in (-1, 0, 1, 2) for v in (-1, 0, 1)][:LANES]
    best = best_trial(losses)
    center = _steps(pair, best)
    around = [
        _trial(pair, [c + side * (axis == a) for a, c in enumerate(center)])
        for axis in range(3)
        for side in (-1, 1)
    ]
    missing = [trial for trial in around if trial not in losses]
    if missing:
        # The rest of the lanes go to what would be needed next: the corners, nearest first.
        offsets = sorted(itertools.product((-1, 0, 1), repeat=3), key=lambda o: sum(map(abs, o)))
        corners = (
            _trial(pair, [c + o for c, o in zip(center, offset, strict=True)]) for offset in offsets
        )
        likely = [trial for trial in corners if trial not in losses and trial not in missing]
        return [*missing, *likely][:LANES]
    return [t for seed in SEEDS[1:] if (t := best._replace(seed=seed)) not in losses]
