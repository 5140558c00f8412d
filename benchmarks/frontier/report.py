"""The frontier's table and picture, of the pairs that are complete.

    python -m benchmarks.frontier.report

Writes `docs/images/frontier.png`. The table is written by `python -m benchmarks.tables`.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.frontier.pairs import OTHER_RULES, PAIRS, SMALLEST, SWAN, Pair
from benchmarks.frontier.rules import HIDDEN, VOCABULARY
from benchmarks.frontier.search import SEEDS, best_trial, next_trials, rows_of, sweep_of
from benchmarks.frontier.training import SETTINGS, Trial, state_bytes
from benchmarks.rows import RESULTS, Row, read_rows
from examples.llama.pictures import INK, picture

__all__ = ["Result", "results_of", "rule_table", "setting_table", "table"]

IMAGE = Path(__file__).parents[2] / "docs" / "images" / "frontier.png"
_WIDTH, _HEIGHT = 6.4, 4.2
_COLORS = {"apollo": "C0", "whitened": "C2", "muon": "C1"}
# What the picture shows of the vocabulary's rules, and how it calls them.
_SHOWN = {
    "adam": "",
    "factored": ", vocabulary factored",
    "head_factored_momentum": ", vocabulary factored,\nhead with momentum",
    "factored_momentum": ", vocabulary factored\nwith momentum",
}
# Labels that would go beyond the edge on the right of their point.
_ON_THE_LEFT = {"adam", "muon"}


class Result(NamedTuple):
    """A pair of rules at the best of its rates.

    Attributes:
      pair: Which.
      trial: The best of its sweep.
      losses: Validation losses of the seeds, nats a token.
      state_bytes: Of the optimizer's state.
      over_adamw: The same over that of AdamW.
      is_complete: Whether the sweep is closed and all its seeds are there. If not, the loss of the
        best rates is at most that of the trial.
    """

    pair: Pair
    trial: Trial
    losses: tuple[float, ...]
    state_bytes: int
    over_adamw: float
    is_complete: bool

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.losses)

    @property
    def bound(self) -> str:
        """What stands before a loss of the best rates so far."""
        return "" if self.is_complete else "at most "

    @property
    def deviation(self) -> float:
        """Standard deviation over the seeds."""
        return statistics.stdev(self.losses)


def results_of(rows: Sequence[Row], setting: str = SMALLEST) -> list[Result]:
    """The pairs that are complete, the lowest loss first."""
    return [result for result in _all_results_of(rows, setting) if result.is_complete]


def _all_results_of(rows: Sequence[Row], setting: str) -> list[Result]:
    size = SETTINGS[setting]
    of_adamw = state_bytes(size, "adam", "adam")
    results = []
    for pair in PAIRS:
        losses = rows_of(rows, pair)
        if pair.setting != setting or not losses:
            continue
        is_complete = not next_trials(pair, losses, sweep_of(rows, pair))
        best = best_trial(losses)
        trained = (losses.get(best._replace(seed=seed)) for seed in SEEDS)
        of_seeds = tuple(loss for loss in trained if loss is not None)
        state = state_bytes(size, pair.hidden, pair.vocabulary)
        results.append(Result(pair, best, of_seeds, state, state / of_adamw, is_complete))
    return sorted(results, key=lambda result: result.mean)


def table(rows: Sequence[Row]) -> str:
    """Every complete pair at its best rates, in Markdown."""
    lines = [
        "| matrices | vocabulary | learning rates: matrices, vocabulary, norms | validation loss "
        "| state | of AdamW's |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    for result in results_of(rows):
        _, hidden, vocabulary = result.pair
        if result.pair in OTHER_RULES:
            continue
        cells = [
            HIDDEN[hidden].label,
            VOCABULARY[vocabulary].label,
            ", ".join(f"{rate:.2g}" for rate in result.trial[:3]),
            f"{result.mean:.3f} ± {result.deviation:.3f}",
            f"{result.state_bytes / 1e6:.2f} MB",
            f"{result.over_adamw:.1%}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def rule_table(rows: Sequence[Row]) -> str:
    """The other rules for the matrices and SWAN, by the sweep's seed, in Markdown."""
    results = _all_results_of(rows, SMALLEST)
    found = [result for result in results if result.pair in (SWAN, *OTHER_RULES)]
    (of_swan,) = (result.losses[0] for result in found if result.pair == SWAN)
    lines = [
        "| matrices | learning rate | validation loss | above SWAN's | state, of AdamW's |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for result in sorted(found, key=lambda result: result.losses[0]):
        loss = result.losses[0]
        lines.append(
            f"| {HIDDEN[result.pair.hidden].label} | {result.trial.hidden_rate:.2g} "
            f"| {result.bound}{loss:.3f} "
            f"| {loss - of_swan:+.3f} | {result.over_adamw:.1%} |"
        )
    return "\n".join(lines)


def setting_table(rows: Sequence[Row], setting: str) -> str:
    """A larger model or a longer run beside the smallest, by the sweep's seed, in Markdown.

    In brackets is what a loss is above AdamW's at that setting.
    """
    of_setting = [
        {result.pair[1:]: result for result in _all_results_of(rows, name)}
        for name in (SMALLEST, setting)
    ]

    def loss(results: Mapping[tuple[str, str], Result], rules: tuple[str, str]) -> str:
        result, of_adamw = results[rules], results["adam", "adam"].losses[0]
        return f"{result.bound}{result.losses[0]:.3f} ({result.losses[0] - of_adamw:+.3f})"

    labels = " | ".join(SETTINGS[name].label for name in (SMALLEST, setting))
    lines = [
        f"| matrices | vocabulary | {labels} | learning rates | state, of AdamW's |",
        "| --- | --- | ---: | ---: | --- | ---: |",
    ]
    larger = sorted(of_setting[1].values(), key=lambda result: result.losses[0])
    for result in larger:
        rules = result.pair[1:]
        cells = [
            HIDDEN[rules[0]].label,
            VOCABULARY[rules[1]].label,
            *(loss(results, rules) for results in of_setting),
            ", ".join(f"{rate:.2g}" for rate in result.trial[:3]),
            f"{result.over_adamw:.1%}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _draw(results: Sequence[Result], path: Path) -> None:
    with picture(path, _WIDTH, _HEIGHT) as figure:
        axes = figure.subplots()
        for result in results:
            _, hidden, vocabulary = result.pair
            if vocabulary not in _SHOWN or result.pair in OTHER_RULES:
                continue
            percent, is_left = 100 * result.over_adamw, hidden in _ON_THE_LEFT
            axes.errorbar(
                percent,
                result.mean,
                yerr=result.deviation,
                fmt="o" if vocabulary == "adam" else "s",
                color=_COLORS.get(hidden.split("_")[0], INK),
                capsize=3,
            )
            axes.annotate(
                HIDDEN[hidden].label + _SHOWN[vocabulary],
                (percent, result.mean),
                xytext=(-7, 0) if is_left else (7, 0),
                textcoords="offset points",
                ha="right" if is_left else "left",
                va="center",
                fontsize=9,
            )
        axes.set(
            xscale="log",
            xlim=(0.1, 400),
            xlabel="optimizer state, % of AdamW's",
            ylabel="validation loss, nats a token",
        )
        axes.xaxis.set_major_formatter("{x:g}")
        axes.margins(y=0.1)


def main() -> None:
    """Draws the picture."""
    _draw(results_of(read_rows(RESULTS / "frontier.json")), IMAGE)


if __name__ == "__main__":
    main()
