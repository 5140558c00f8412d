"""How pictures look: a grey ink and no paper, for light pages and dark ones."""

import contextlib
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

INK = "#767676"  # 4.5 to 1 on white, 4.1 to 1 on the site's black
_STYLE: Any = {
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "text.color"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
}


@contextlib.contextmanager
def picture(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure of so many inches to draw on, written as a PNG in the end."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        figure.savefig(path, dpi=150, metadata={"Software": None})


def spread(places: Sequence[float], distance: float) -> list[float]:
    """Rising places, moved as little as keeps them so far apart: an isotonic regression."""
    blocks: list[list[float]] = []
    for number, place in enumerate(places):
        blocks.append([place - number * distance])
        while len(blocks) > 1 and statistics.fmean(blocks[-2]) > statistics.fmean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    means = [statistics.fmean(block) for block in blocks for _ in block]
    return [mean + number * distance for number, mean in enumerate(means)]
