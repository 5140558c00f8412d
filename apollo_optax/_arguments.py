"""Checks arguments at construction; an error names the argument, its value and what is allowed."""

import numbers
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np


def require_positive_integer(name: str, value: Any) -> None:
    """Raises TypeError or ValueError unless `value` is a static integer of at least 1."""
    if isinstance(value, jax.Array | np.ndarray):
        raise TypeError(
            f"{name} must be a static int, got an array ({value!r}). "
            f"With optax.inject_hyperparams, name it in static_args=('rank', 'update_proj_gap')."
        )
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int >= 1, got {value!r} ({type(value).__name__}).")
    if value < 1:
        raise ValueError(f"{name} must be an int >= 1, got {value!r}.")


def require_number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float = float("inf"),
) -> None:
    """Raises TypeError or ValueError unless `value` is a real number in the interval, or a scalar
    array.

    Arrays pass by type alone: `optax.inject_hyperparams` hands over traced values.
    """
    bound = f"> {above}" if above is not None else f">= {at_least}"
    allowed = f"a finite number {bound}" + (f" and < {below}" if below != float("inf") else "")
    if isinstance(value, jax.Array):
        if value.ndim or not np.issubdtype(value.dtype, np.number):
            raise TypeError(
                f"{name} must be {allowed}, got an array {value.dtype}{list(value.shape)}."
            )
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Real | np.number):
        raise TypeError(f"{name} must be {allowed}, got {value!r} ({type(value).__name__}).")
    too_small = value <= above if above is not None else at_least is not None and value < at_least
    if too_small or not value < below:
        raise ValueError(f"{name} must be {allowed}, got {value!r}.")


def require_one_of(name: str, value: Any, allowed: Iterable[str], *, otherwise: str = "") -> None:
    """Raises ValueError unless `value` is one of the strings in `allowed`.

    `otherwise` says what else the caller takes.
    """
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}{otherwise}, got {value!r}.")


def require_callable(name: str, value: Any, signature: str) -> None:
    """Raises TypeError unless `value` can be called."""
    if not callable(value):
        raise TypeError(
            f"{name} must be a function {signature}, got {value!r} ({type(value).__name__})."
        )
