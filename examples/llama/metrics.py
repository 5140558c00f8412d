"""Metrics of a run: one JSON object a line, and TensorBoard's event files."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["WriteMetrics", "open_metrics", "read_metrics"]

WriteMetrics = Callable[[Mapping[str, Any]], None]

_FILE = "metrics.jsonl"


@contextlib.contextmanager
def open_metrics(
    folder: Path, *, steps_done: int = 0, tensorboard: bool = False
) -> Iterator[WriteMetrics]:
    """Opens the metrics of a run, to go on after a step.

    Args:
      folder: Where `metrics.jsonl` and `tensorboard/` are.
      steps_done: The last step that is kept of an earlier part of the run: lines of later steps
        were written after the checkpoint that the run now goes on from.
      tensorboard: Whether to write event files.

    Yields:
      A function that writes one line. It takes names and values, `step` among them; the event
      files get the numbers.

    Raises:
      OSError: If a line is damaged and a later one is kept.
    """
    path = folder / _FILE
    _drop_lines_after(path, steps_done)
    with contextlib.ExitStack() as stack:
        lines = stack.enter_context(path.open("a", encoding="utf-8"))
        events = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            events = stack.enter_context(
                SummaryWriter(str(folder / "tensorboard"), purge_step=steps_done + 1)
            )

        def write(metrics: Mapping[str, Any]) -> None:
            lines.write(json.dumps(dict(metrics)) + "\n")
            lines.flush()
            if events is not None:
                for name, value in metrics.items():
                    if name != "step" and isinstance(value, int | float):
                        events.add_scalar(name, value, int(metrics["step"]))

        yield write


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Returns the lines of a run's metrics: those with `loss` and those with `validation_loss`.

    Returns:
      The lines; none if there is no file.

    Raises:
      OSError: If a line is damaged.
    """
    path = folder / _FILE
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: ValueError) -> OSError:
    return OSError(
        f"{path} is damaged ({error}); remove the damaged line, or move the file away to go on "
        "without the curves"
    )


def _drop_lines_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept: list[str] = []
    damage = None
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            metrics = json.loads(line)
        except ValueError as error:
            damage = error  # No harm if nothing is kept of what follows, as after a crash.
            continue
        if metrics["step"] <= step:
            if damage is not None:
                raise _damaged(path, damage) from damage
            kept.append(line + "\n")
    shortened = path.with_suffix(".shortened")
    shortened.write_text("".join(kept), encoding="utf-8")
    os.replace(shortened, path)
