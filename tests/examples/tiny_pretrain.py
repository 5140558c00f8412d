"""`pretrain` with a model and a text small enough for tests of whole runs, also as a program."""

import sys
from pathlib import Path

from examples.llama.config import MODELS, LlamaConfig
from examples.llama.metrics import read_metrics
from examples.llama.pretrain import main

TINY = LlamaConfig(256, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2)


def squares(start: int = 0, stop: int = 200) -> str:
    """A text with something to learn in it, a line a number."""
    return "".join(f"The square of {n} is {n * n}.\n" for n in range(start, stop))


def losses(folder: Path) -> list[float]:
    """The losses of a run in the order of its metrics, those of the validation among them."""
    lines = read_metrics(folder)
    return [line["loss"] if "loss" in line else line["validation_loss"] for line in lines]


if __name__ == "__main__":
    MODELS["nano"] = TINY
    sys.exit(main())
