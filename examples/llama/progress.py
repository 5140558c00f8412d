"""Shows how far a run is: a bar on a terminal, plain lines elsewhere."""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import rich.console
import rich.progress
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.table import Column

__all__ = ["Progress", "duration", "show_progress"]


class Progress(NamedTuple):
    """Shows what came of a step.

    Attributes:
      step: Shows a step, its loss and the seconds of a step.
      evaluation: Shows a step and the validation loss after it.
      skipped: Shows a step that was skipped, why, and how many were.
    """

    step: Callable[[int, float, float], None]
    evaluation: Callable[[int, float], None]
    skipped: Callable[[int, str, int], None]


@contextlib.contextmanager
def show_progress(
    console: rich.console.Console, title: str, *, steps: int, done: int, tokens_per_step: int
) -> Iterator[Progress]:
    """Opens the display of a run.

    Args:
      console: Where to. On a terminal one bar is redrawn, below whatever else is printed; elsewhere
        everything is a line.
      title: Name of the run.
      steps: Steps of the whole run.
      done: Steps done before.
      tokens_per_step: Tokens a step predicts.

    Yields:
      The functions to call from time to time.
    """

    def last_step(step: int, loss: float, step_seconds: float) -> str:
        tokens_per_second = tokens_per_step / max(step_seconds, 1e-9)
        left = duration((steps - step) * step_seconds)
        return f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s  {left} left"

    def show_evaluation(step: int, loss: float) -> None:
        console.print(f"{title}  step {step}/{steps}  validation loss {loss:.4f}")

    def show_skipped(step: int, cause: str, number: int) -> None:
        console.print(f"{title}  step {step}/{steps}  skipped, {cause}; {number} skipped so far")

    if not console.is_terminal:
        yield Progress(
            lambda step, *rest: console.print(
                f"{title}  step {step}/{steps}  {last_step(step, *rest)}"
            ),
            show_evaluation,
            show_skipped,
        )
        return
    # Of a narrow window the text at the end is cut, not the count.
    count = MofNCompleteColumn(table_column=Column(min_width=2 * len(str(steps)) + 1))
    columns = (TextColumn("{task.description}"), BarColumn(16), count)
    with rich.progress.Progress(
        *columns, TextColumn("{task.fields[last]}"), console=console
    ) as progress_bar:
        task = progress_bar.add_task(title, total=steps, completed=done, last="compiling")
        yield Progress(
            lambda step, *rest: progress_bar.update(
                task, completed=step, last=last_step(step, *rest)
            ),
            show_evaluation,
            show_skipped,
        )


def duration(seconds: float) -> str:
    """Returns a duration as a clock shows it.

    >>> duration(75), duration(7384)
    ('1:15', '2:03:04')
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
