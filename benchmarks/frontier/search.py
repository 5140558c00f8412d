"""Which rates are next for a pair of rules, given its rows so far."""

import itertools
import math
from collections.abc import Mapping, Sequence

from benchmarks.frontier.pairs import Pair
from benchmarks.frontier.rules import HIDDEN, VOCABULARY
from benchmarks.frontier.training import LANES, SETTINGS, Trial
from benchmarks.rows import Row

__all__ = ["SEEDS", "best_trial", "next_trials", "rows_of", "transferred"]

SEEDS = (0, 1, 2, 3, 4, 5)
"""The first is that of the sweeps, and the only one of what is not the smallest setting."""
_SMALLEST = "1m"
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


def transferred(rows: Sequence[Row], pair: Pair) -> Trial | None:
    """Where the sweep of a larger setting begins: at the best rates of the smallest.

    The rate of the matrices is divided by how many times as wide the model is. None for the
    smallest setting itself.
    """
    smallest = pair._replace(setting=_SMALLEST)
    losses = rows_of(rows, smallest)
    if pair == smallest or not losses:
        return None
    hidden, *others = _steps(pair, best_trial(losses))
    wider = SETTINGS[pair.setting].width / SETTINGS[_SMALLEST].width
    return _trial(pair, [hidden - round(math.log(wider, _FACTORS[0])), *others])


def next_trials(
    pair: Pair, losses: Mapping[Trial, float], start: Trial | None = None
) -> list[Trial]:
    """The trials to run next, at most `LANES` of them; none when the pair is complete.

    First a grid of the rates of matrices and vocabulary. Then what lies around the best, until each
    of its three rates has a worse one on both sides. Then the best from other seeds.

    Args:
      pair: Which.
      losses: Of the trials so far.
      start: `transferred`. If it is given, it is the first trial, in place of the grid; the rate of
        the norms is not swept, so a neighbor may have any; and there are no other seeds.
    """
    if start is None and not losses:
        return [_trial(pair, (h, v, 0)) for h in (-1, 0, 1, 2) for v in (-1, 0, 1)][:LANES]
    best = best_trial(losses) if start is None or start in losses else start
    center = _steps(pair, best)
    axes = range(3 if start is None else 2)
    around = [
        _trial(pair, [c + side * (axis == a) for a, c in enumerate(center)])
        for axis in axes
        for side in (-1, 1)
    ]
    tried = {trial[: len(axes)] for trial in losses if trial.seed == SEEDS[0]}
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
    seeds = SEEDS[1:] if start is None else ()
    return [t for seed in seeds if (t := best._replace(seed=seed)) not in losses]
