"""The convergence benchmark's tables and pictures, of the rows that are there.

    python -m benchmarks.convergence.report

Writes `docs/images/convergence_*.png`. The tables are written by `python -m benchmarks.tables`.
"""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure

from benchmarks.convergence.methods import ABLATIONS, METHODS
from benchmarks.convergence.search import best_learning_rate, sweep_losses
from benchmarks.rows import RESULTS, Row, read_rows

__all__ = [
    "Result",
    "ablation_table",
    "frontier",
    "rates_table",
    "results_of",
    "sweep_table",
    "table",
]

IMAGES = Path(__file__).parents[2] / "docs" / "images"
_WIDTH, _HEIGHT = 8.0, 5.0
_NEAR = 0.02
_COLORS = [*matplotlib.color_sequences["tab10"], "black", "navy"]  # one a method
# In points, where labels would lie on each other.
_LABEL_OFFSETS = {
    "apollo_r16": (-24, -14),
    "apollo_r32": (-16, 9),
    "apollo_svd": (2, -14),
    "apollo_mini": (-20, -18),
    "apollo_mini_paper_alpha": (6, 8),
    "galore": (6, -2),
}


class Result(NamedTuple):
    """A method at its best learning rate.

    Attributes:
      name: Of `METHODS`.
      learning_rate: The best of its sweep.
      losses: Validation losses of the seeds, nats a token.
      state_bytes: Of the optimizer's state.
      rows: The rows of the seeds.
    """

    name: str
    learning_rate: float
    losses: tuple[float, ...]
    state_bytes: int
    rows: tuple[Row, ...]

    @property
    def label(self) -> str:
        """The method's name for people."""
        return METHODS[self.name].label

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.losses)

    @property
    def deviation(self) -> float | None:
        """Standard deviation over the seeds; None of a single one."""
        return statistics.stdev(self.losses) if len(self.losses) > 1 else None


def results_of(rows: Sequence[Row]) -> list[Result]:
    """The methods whose sweeps are complete, the lowest loss first."""
    results = []
    for name in METHODS:
        rate = best_learning_rate(rows, name)
        if rate is None:
            continue
        seeds = [
            row
            for row in rows
            if row["trial"] == name
            and row["learning_rate"] == rate
            and row["validation_loss"] is not None
        ]
        losses = tuple(row["validation_loss"] for row in seeds)
        results.append(Result(name, rate, losses, seeds[0]["state_bytes"], tuple(seeds)))
    return sorted(results, key=lambda result: result.mean)


def _spread(mean: float, deviation: float | None) -> str:
    return f"{mean:.3f}" if deviation is None else f"{mean:.3f} ± {deviation:.3f}"


def table(rows: Sequence[Row]) -> str:
    """Every method at its best learning rate, in Markdown."""
    lines = [
        "| optimizer | learning rate | seeds | validation loss | perplexity | state | of AdamW's |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    results = results_of(rows)
    reference = next(result.state_bytes for result in results if result.name == "adamw")
    for result in results:
        cells = [
            result.label,
            f"{result.learning_rate:g}",
            str(len(result.losses)),
            _spread(result.mean, result.deviation),
            f"{math.exp(result.mean):.2f}",
            f"{result.state_bytes / 1e6:.2f} MB",
            f"{result.state_bytes / reference:.0%}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sweep_table(rows: Sequence[Row]) -> str:
    """The losses of every method's sweep, of the first seed, in Markdown."""
    lines = ["| optimizer | validation loss at learning rate |", "| --- | --- |"]
    for result in results_of(rows):
        found = [
            ("diverged" if loss == math.inf else f"{loss:.3f}") + f" at {rate:g}"
            for rate, loss in sorted(sweep_losses(rows, result.name).items())
        ]
        lines.append(f"| {result.label} | {', '.join(found)} |")
    return "\n".join(lines)


def rates_table(rows: Sequence[Row]) -> str:
    """The best learning rate of every method and how wide its valley is, in Markdown."""
    lines = ["| optimizer | best learning rate | within 0.02 of its loss |", "| --- | ---: | --- |"]
    for name, method in METHODS.items():
        losses = sweep_losses(rows, name)
        best = best_learning_rate(rows, name)
        if best is None:
            continue
        near = sorted(rate for rate, loss in losses.items() if loss <= losses[best] + _NEAR)
        valley = f"{near[0]:g} to {near[-1]:g}" if len(near) > 1 else ""
        lines.append(f"| {method.label} | {best:g} | {valley} |")
    return "\n".join(lines)


def ablation_table(rows: Sequence[Row]) -> str:
    """What changes with one thing changed, against the same seed of the method, in Markdown."""
    lines = [
        "| changed | validation loss | against the method's |",
        "| --- | ---: | ---: |",
    ]
    base = {result.name: result for result in results_of(rows)}
    for name, ablation in ABLATIONS.items():
        if ablation.of not in base:
            continue
        rate = float(f"{ablation.factor * base[ablation.of].learning_rate:.3g}")
        for row in rows:
            if (row["trial"], row["learning_rate"], row["seed"]) != (name, rate, 0):
                continue
            loss = row["validation_loss"]
            own = next(x["validation_loss"] for x in base[ablation.of].rows if x["seed"] == 0)
            found = "diverged" if loss is None else f"{loss:.3f}"
            change = "" if loss is None else f"{loss - own:+.3f}"
            lines.append(f"| {ablation.label} | {found} | {change} |")
    return "\n".join(lines)


def frontier(results: Sequence[Result]) -> list[Result]:
    """The results that no other beats in both loss and state, the smallest state first."""
    best: list[Result] = []
    for result in sorted(results, key=lambda result: (result.state_bytes, result.mean)):
        if not best or result.mean < best[-1].mean:
            best.append(result)
    return best


def _draw_memory(results: Sequence[Result], path: Path) -> None:
    figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
    axes = figure.subplots()
    edge = frontier(results)
    axes.set_prop_cycle(color=_COLORS)
    axes.plot(
        [result.state_bytes / 1e6 for result in edge],
        [result.mean for result in edge],
        color="lightgray",
        drawstyle="steps-post",
        zorder=0,
    )
    for result in results:
        megabytes = result.state_bytes / 1e6
        axes.errorbar(
            megabytes, result.mean, yerr=result.deviation, fmt="o", capsize=3, label=result.label
        )
        axes.annotate(
            result.label,
            (megabytes, result.mean),
            xytext=_LABEL_OFFSETS.get(result.name, (6, 4)),
            textcoords="offset points",
        )
    axes.set(xlabel="optimizer state, MB", ylabel="validation loss, nats a token")
    axes.margins(x=0.15)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _draw_curves(results: Sequence[Result], path: Path) -> None:
    figure = Figure(figsize=(_WIDTH, _HEIGHT), layout="constrained")
    axes = figure.subplots()
    axes.set_prop_cycle(color=_COLORS)
    for result in results:
        curve = next(row["validation_curve"] for row in result.rows if row["seed"] == 0)
        axes.plot(*zip(*curve, strict=True), label=f"{result.label}, {result.learning_rate:g}")
    axes.set(xlabel="step", ylabel="validation loss, nats a token")
    axes.set_ylim(top=min(6.0, axes.get_ylim()[1]))
    axes.legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})


def main() -> None:
    """Draws the pictures."""
    results = results_of(read_rows(RESULTS / "convergence.json"))
    _draw_memory(results, IMAGES / "convergence_memory.png")
    _draw_curves(results, IMAGES / "convergence_curves.png")


if __name__ == "__main__":
    main()
