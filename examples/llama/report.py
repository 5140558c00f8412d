"""What is left of the runs: a table, a picture of the curves and a file of numbers."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import rich.box
import rich.table
from rich.filesize import decimal

from examples.llama.files import write_text
from examples.llama.pictures import picture, spread

__all__ = ["RunResult", "draw_curves", "results_markdown", "results_table", "write_results"]

Curve = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class RunResult:
    """What a run came to.

    Attributes:
      optimizer: Its name.
      learning_rate: The peak.
      steps: Optimizer steps.
      tokens: Tokens predicted in all steps.
      validation_loss: Mean loss of a validation token after the last step, in nats.
      loss_as_loaded: The same before the first step; None of a new model.
      bits_per_byte: The validation loss in bits, where a token is a byte; else None.
      state_bytes: Bytes of all arrays of the optimizer's state.
      parameter_bytes: Bytes of all parameters.
      step_milliseconds: Median time of a step; None if none was taken.
      skipped_steps: How many of the steps were skipped, as `skip_bad_steps` decides.
      sample: Text the trained model wrote, after its prompt; "" for none.
      machine: The machine and the versions that the run ended on.
    """

    optimizer: str
    learning_rate: float
    steps: int
    tokens: int
    validation_loss: float
    bits_per_byte: float | None
    state_bytes: int
    parameter_bytes: int
    step_milliseconds: float | None
    skipped_steps: int = 0
    sample: str = ""
    loss_as_loaded: float | None = None
    machine: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        """Exponential of the validation loss."""
        return _perplexity(self.validation_loss)

    @property
    def state_per_parameter(self) -> float:
        """Bytes of the optimizer's state over those of the parameters."""
        return self.state_bytes / self.parameter_bytes


_COLUMNS: dict[str, Callable[[RunResult], str]] = {
    "optimizer": lambda result: result.optimizer,
    "learning rate": lambda result: f"{result.learning_rate:g}",
    "validation loss": lambda result: f"{result.validation_loss:.4f}",
    "perplexity": lambda result: f"{result.perplexity:.3f}",
    "optimizer state": lambda result: decimal(result.state_bytes),
    "state / weights": lambda result: f"{result.state_per_parameter:.2f}",
    "step (ms)": lambda result: (
        "-" if result.step_milliseconds is None else f"{result.step_milliseconds:.0f}"
    ),
}


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def _rows(results: Sequence[RunResult]) -> list[list[str]]:
    """The cells of a row for each run, after one for the model as it was loaded."""
    rows = [[show(result) for show in _COLUMNS.values()] for result in results]
    before = results[0].loss_as_loaded if results else None
    if before is not None:
        known = {
            "optimizer": "as loaded",
            "validation loss": f"{before:.4f}",
            "perplexity": f"{_perplexity(before):.3f}",
        }
        rows.insert(0, [known.get(name, "-") for name in _COLUMNS])
    return rows


def results_table(results: Sequence[RunResult]) -> rich.table.Table:
    """Returns the table of the runs, for a terminal."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in _COLUMNS:
        # In two lines, all columns fit in 80 characters.
        header = name.replace(" ", "\n", 1)
        justify: Literal["left", "right"] = "left" if name == "optimizer" else "right"
        table.add_column(header, justify=justify, no_wrap=True)
    for row in _rows(results):
        table.add_row(*row)
    return table


def results_markdown(results: Sequence[RunResult]) -> str:
    """Returns the table of the runs in Markdown."""
    rows = [
        list(_COLUMNS),
        ["---", *["---:"] * (len(_COLUMNS) - 1)],
        *_rows(results),
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def write_results(folder: Path, results: Sequence[RunResult], about: Mapping[str, Any]) -> None:
    """Writes `results.json` and `results.md`.

    Args:
      folder: Where to.
      results: One a run.
      about: What else there is to know of the runs, as JSON can hold it.
    """
    runs = [
        dataclasses.asdict(result)
        | {
            "perplexity": result.perplexity,
            "state_per_parameter": result.state_per_parameter,
        }
        for result in results
    ]
    numbers = json.dumps({**about, "runs": runs}, indent=2)
    write_text(folder / "results.json", numbers + "\n")
    write_text(folder / "results.md", results_markdown(results))


def draw_curves(path: Path, curves: Mapping[str, Curve], *, title: str) -> None:
    """Draws training and validation loss against steps.

    Args:
      path: The PNG to write.
      curves: Metrics of each optimizer, as `metrics.read_metrics` returns them.
      title: Of the picture.
    """
    bottom, top = _limits(curves.values())
    with picture(path, width=6.4, height=4.2) as figure:
        axes = figure.subplots()
        ends = []
        for index, (optimizer, curve) in enumerate(curves.items()):
            color, marker = f"C{index}", "os^DvPX"[index % 7]
            steps, losses = _series(curve, "loss")
            axes.plot(steps, _smoothed(losses), color=color, alpha=0.35, linewidth=1)
            steps, losses = _series(curve, "validation_loss")
            axes.plot(steps, losses, color=color, marker=marker, markersize=4, linewidth=2)
            if len(losses):
                height = min(losses[-1], top) if math.isfinite(losses[-1]) else top
                # Losses that are not finite would not widen the axis.
                axes.update_datalim([(steps[-1], height)])
                ends.append((height, steps[-1], f"{optimizer}, {losses[-1]:.3f}"))
        ends.sort()
        heights = spread([height for height, _, _ in ends], distance=(top - bottom) / 18)
        for (_, step, label), height in zip(ends, heights, strict=True):
            axes.annotate(
                f"  {label}", (step, height), va="center", fontsize=9, annotation_clip=False
            )
        axes.set(
            ylim=(bottom, top),
            xlabel="step",
            ylabel="loss, nats a token",
            title=f"{title}\nthick: validation, thin: training",
        )
        axes.title.set_fontsize(10)


def _series(curve: Curve, name: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(line["step"], line[name]) for line in curve if line.get(name) is not None]
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T
    return steps, values


def _smoothed(losses: np.ndarray) -> np.ndarray:
    """Mean of up to a fiftieth of the curve before each step."""
    width = max(1, len(losses) // 50)
    sums = np.cumsum(np.concatenate([np.zeros(1), losses]))
    ends = np.arange(1, len(losses) + 1)
    starts = np.maximum(ends - width, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _limits(curves: Sequence[Curve] | Any) -> tuple[float, float]:
    """Range of the losses but for the steep beginning, which would flatten all the rest."""
    seen: list[float] = []
    for curve in curves:
        _, losses = _series(curve, "loss")
        seen.extend(losses[len(losses) // 20 :])
        seen.extend(_series(curve, "validation_loss")[1])
    finite = [loss for loss in seen if math.isfinite(loss)] or [0.0, 1.0]
    margin = 0.05 * (max(finite) - min(finite)) or 0.1
    return min(finite) - margin, max(finite) + margin
