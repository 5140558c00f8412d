"""Reads a command line: names of models in any case, wrong input answered in one line.

All ranges of numbers are here, by the names of their flags.
"""

import contextlib
import dataclasses
import difflib
import inspect
import io
import itertools
import math
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Optional, TypeVar

import tyro

from examples.llama.config import MODELS

__all__ = [
    "LEFT_OUT",
    "MODEL_NAME",
    "LeftOut",
    "check_ranges",
    "default",
    "filled",
    "model_name",
    "parse",
]

_Config = TypeVar("_Config")
if TYPE_CHECKING:
    LeftOut = Annotated[_Config, None]
else:
    LeftOut = Optional
"""The type of a flag that may be left out, whose default depends on others."""

LEFT_OUT: Any = None
"""The value of such a flag until `filled`."""
_UNITS = {"m": 1e6, "b": 1e9}


def model_name(text: str) -> str:
    """Returns the name of a model that was given in any case.

    Raises:
      ValueError: If there is none; with the nearest names.

    >>> model_name("7B")
    '7b'
    """
    name = text.lower()
    if name in MODELS:
        return name
    size = _size(name)
    if size is None:
        near = difflib.get_close_matches(name, MODELS, n=2, cutoff=0.3)
    else:
        sized = [name for name in MODELS if _size(name)]
        near = sorted(sized, key=lambda other: abs(math.log(size / (_size(other) or 1))))[:2]
    nearest = f"near it are {' and '.join(near)}; " if near else ""
    raise ValueError(f"there is no model {text!r}; {nearest}allowed are {', '.join(MODELS)}")


def _size(name: str) -> float | None:
    found = re.fullmatch(r"(\d*\.?\d+)([mb])", name)
    return float(found[1]) * _UNITS[found[2]] or None if found else None


MODEL_NAME = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="{" + ",".join(MODELS) + "}",
    instance_from_str=lambda arguments: model_name(arguments[0]),
    is_instance=lambda value: value in MODELS,
    str_from_instance=lambda name: [name],
)
"""What makes a field of a command line the name of a model."""


def default(metavar: str, shown: str, *, name: str | None = None) -> Any:
    """How --help shows a flag whose default depends on others; its name if not the field's."""
    return tyro.conf.arg(name=name, metavar=metavar, help_behavior_hint=f"(default: {shown})")


def filled(given: _Config, defaults: dict[str, Any]) -> _Config:
    """Returns a dataclass with defaults for what was left out."""
    missing = {name: value for name, value in defaults.items() if getattr(given, name) is None}
    return dataclasses.replace(given, **missing)  # type: ignore[type-var]


_Range = tuple[str, Callable[[float], bool]]
_COUNT: _Range = ("at least 1", lambda value: value >= 1)
_NOT_NEGATIVE: _Range = ("at least 0, and finite", lambda value: 0 <= value < math.inf)
_POSITIVE: _Range = ("a positive, finite number", lambda value: 0 < value < math.inf)
_INT32: _Range = ("from 0 to 2**31 - 1", lambda value: 0 <= value < 2**31)
_STEPS: _Range = ("from 1 to 2**31 - 1", lambda value: 1 <= value < 2**31)
# Each token of the sample takes a forward pass.
_SAMPLE: _Range = ("from 0 to 2**20", lambda value: 0 <= value <= 2**20)
_GROWTH: _Range = ("above 1, or 0 for no limit", lambda value: value == 0 or 1 < value < math.inf)
_FRACTION: _Range = ("at least 0 and below 1", lambda value: 0 <= value < 1)
_RANGES: dict[str, _Range] = {
    **dict.fromkeys(["batch", "sequence", "micro_batches", "rank"], _COUNT),
    **dict.fromkeys(["most_skipped", "evaluate_every", "evaluation_batches"], _COUNT),
    **dict.fromkeys(["keep", "log_every", "process_timeout"], _COUNT),
    **dict.fromkeys(["steps", "update_proj_gap"], _STEPS),
    **dict.fromkeys(
        ["spike_limit", "weight_decay", "clip", "checkpoint_every", "lora"], _NOT_NEGATIVE
    ),
    "temperature": _NOT_NEGATIVE,
    **dict.fromkeys(["warmup_fraction", "momentum"], _FRACTION),
    **dict.fromkeys(["learning_rate", "vocabulary_learning_rate", "alpha"], _POSITIVE),
    "norm_growth_limit": _GROWTH,
    "sample_length": _SAMPLE,
    "seed": _INT32,
}


def check_ranges(config: Any) -> None:
    """Raises ValueError if a number of a dataclass, or of one in it, is out of its range."""
    for field in dataclasses.fields(config):
        name, value = field.name.replace("total_", ""), getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            check_ranges(value)
        elif name in _RANGES and value is not None:
            allowed, is_allowed = _RANGES[name]
            if not is_allowed(value):
                raise ValueError(f"--{name.replace('_', '-')} is {value}; expected {allowed}")


def parse(
    config: type[_Config], program: str, argv: Sequence[str] | None, examples: Sequence[str]
) -> _Config:
    """Makes a dataclass of a command line.

    Args:
      config: The dataclass. Its docstring without the attributes begins the help.
      program: What the help and messages call the program.
      argv: The arguments; those of the process if None.
      examples: Arguments that the help shows.

    Returns:
      The dataclass.

    Raises:
      SystemExit: After `--help`, with code 0; after wrong input, with code 2 and one line on
        stderr.
    """
    given = sys.argv[1:] if argv is None else argv
    for before, argument in itertools.pairwise(["", *given]):
        # An empty path would be the working folder.
        if not argument or re.fullmatch(r"--[\w-]+=", argument):
            where = f"of {argument}" if argument else f"after {before or program}"
            print(f"error: an empty value {where}; fill it or leave it out", file=sys.stderr)
            raise SystemExit(2)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                config,
                prog=program,
                description=_description(config, program, examples),
                args=argv,
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
            )
    except SystemExit:
        if errors.getvalue():
            print(_one_line(errors.getvalue(), program), file=sys.stderr)
        raise


def _description(config: type[Any], program: str, examples: Sequence[str]) -> str:
    # tyro leaves long lines to the window, which cuts words, and joins lines that are not indented.
    width = min(100, shutil.get_terminal_size().columns)
    about = inspect.cleandoc(config.__doc__ or "").split("Attributes:")[0].strip()
    paragraphs = [
        textwrap.fill(paragraph, width, subsequent_indent="  ") for paragraph in about.split("\n\n")
    ]
    shown = [f"  {program} {example}" for example in examples]
    return "\n\n".join([*paragraphs, "\n".join(["Examples:", *shown])])


def _one_line(box: str, program: str) -> str:
    """What a box of tyro's says: the error, and the flags that may have been meant."""
    lines = [line.strip("│╭╮╰╯ ") for line in box.splitlines()]
    sections = re.split(r"[─-]{5,}", " ".join(lines[1:]))
    message, *more = [section.strip() for section in sections if section.strip()]
    message = message.split("Got errors:")[0].replace("{None}|", "").strip().rstrip(".")
    meant = [flag for part in more if "meant" in part for flag in re.findall(r"(--[\w-]+)", part)]
    if meant:
        message += f"; perhaps you meant {meant[0]}"
    return f"error: {message[:1].lower()}{message[1:]}. All flags: {program} --help"
