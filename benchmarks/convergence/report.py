"""The convergence benchmark's tables and pictures, of the rows that are there.

    python -m benchmarks.convergence.report

Writes `docs/images/convergence_*.png`. The tables are written by `python -m benchmarks.tables`.
"""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.convergence.methods import ABLATIONS, METHODS
from benchmarks.convergence.search import best_learning_rate, sweep_losses
from benchmarks.rows import RESULTS, Row, read_rows
from examples.llama.pictures import INK, picture, spread

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
_WIDTH, _HEIGHT = 6.4, 4.4
_NEAR = 0.02
_APOLLO, _MINI, _OTHER = "C0", "C1", INK
_TOP = 2.8  # of the picture of state; losses above it stand at its upper edge


class _Look(NamedTuple):
    """How a method is drawn: told apart without colours too."""

    color: str
    line: str | tuple[float, tuple[float, ...]]
    marker: str
    # Where its label stands: to the right of the point, to its left or above.
    side: str = "right"


_LOOKS = {
    "apollo_r16": _Look(_APOLLO, "-", "o", "left"),
    "apollo_r32": _Look(_APOLLO, "--", "o", "above"),
    "apollo_svd": _Look(_APOLLO, ":", "o"),
    "apollo_mini": _Look(_MINI, "-", "s", "left"),
    "q_apollo_mini": _Look(_MINI, "--", "s"),
    "apollo_mini_paper_alpha": _Look(_MINI, ":", "s", "left"),
    "adamw": _Look(_OTHER, "-", "D", "left"),
    "muon": _Look(_OTHER, "--", "^"),
    "galore": _Look(_OTHER, ":", "v"),
    "adafactor": _Look(_OTHER, "-.", "P", "above"),
    "lion": _Look(_OTHER, (0, (1, 3)), "X", "left"),
    "sgd": _Look(_OTHER, (0, (5, 4)), "X"),
}
# From the point to the label, in points, and how the label is aligned.
_SIDES: dict[str, tuple[tuple[float, float], dict[str, Any]]] = {
    "right": ((7, 0), {"ha": "left", "va": "center"}),
    "left": ((-7, 0), {"ha": "right", "va": "center"}),
    "above": ((-4, 16), {"ha": "left", "va": "bottom"}),
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
    with picture(path, _WIDTH, _HEIGHT) as figure:
        axes = figure.subplots()
        edge = frontier(results)
        axes.plot(
            [result.state_bytes / 1e6 for result in edge],
            [result.mean for result in edge],
            color=INK,
            alpha=0.5,
            drawstyle="steps-post",
            zorder=0,
        )
        for result in results:
            if result.mean > _TOP:
                continue
            look, point = _LOOKS[result.name], (result.state_bytes / 1e6, result.mean)
            axes.errorbar(
                *point, yerr=result.deviation, fmt=look.marker, color=look.color, capsize=3
            )
            offset, aligned = _SIDES[look.side]
            axes.annotate(result.label, point, offset, textcoords="offset points", **aligned)
        beyond = [result for result in results if result.mean > _TOP]
        axes.text(
            beyond[0].state_bytes / 1e6,
            _TOP,
            "\n".join(f"\u2191 {result.label}, {result.mean:.3f}" for result in beyond),
            ha="center",
            va="top",
        )
        axes.set(
            xscale="log",
            xlim=(0.03, 20),
            ylim=(None, _TOP),
            xlabel="optimizer state, MB",
            ylabel="validation loss, nats a token",
        )
        axes.xaxis.set_major_formatter("{x:g}")


def _draw_curves(results: Sequence[Result], path: Path) -> None:
    with picture(path, _WIDTH, _HEIGHT) as figure:
        axes = figure.subplots()
        curves = {
            result.name: next(row["validation_curve"] for row in result.rows if row["seed"] == 0)
            for result in results
        }
        rising = sorted(results, key=lambda result: curves[result.name][-1][1])
        ends = spread([curves[result.name][-1][1] for result in rising], distance=0.09)
        for result, end in zip(rising, ends, strict=True):
            look, curve = _LOOKS[result.name], curves[result.name]
            axes.plot(*zip(*curve, strict=True), color=look.color, linestyle=look.line)
            last, loss = curve[-1]
            axes.plot(
                (last, 1.025 * last), (loss, end), color=look.color, linewidth=0.5, clip_on=False
            )
            axes.annotate(
                f"{result.label}, {result.learning_rate:g}",
                (1.03 * last, end),
                va="center",
                fontsize=8,
                annotation_clip=False,
            )
        axes.set(
            xlabel="step",
            ylabel="validation loss, nats a token",
            xlim=(50, last),
            ylim=(2.2, 4.0),
        )


def main() -> None:
    """Draws the pictures."""
    results = results_of(read_rows(RESULTS / "convergence.json"))
    _draw_memory(results, IMAGES / "convergence_memory.png")
    _draw_curves(results, IMAGES / "convergence_curves.png")


if __name__ == "__main__":
    main()
