"""Checks arguments at construction. Errors name the argument, its value and what is allowed."""

import numbers
from collections.abc import Hashable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from apollo_optax._paths import Path, spell

# The arguments whose values are not numbers. optax.inject_hyperparams would call functions with the
# step count, and make arrays of the other values.
STATIC_ARGUMENTS = (
    "rank",
    "update_proj_gap",
    "granularity",
    "projection",
    "key",
    "mu_dtype",
    "weight_dimension_numbers",
    "implementation",
    "mask",
)


# How an optimizer is called with optax.inject_hyperparams.
_REMEDY = f"pass static_args={STATIC_ARGUMENTS}, without those that the optimizer does not have"


def require_static(name: str, value: Any, allowed: str) -> None:
    """Raises TypeError for an array or a boolean, into which `optax.inject_hyperparams` turns many.

    An argument that is not in `static_args` becomes an array; a function becomes its value at the
    step count.
    """
    if isinstance(value, jax.Array | np.ndarray | bool | np.bool_):
        raise TypeError(
            f"{name} must be {allowed}, got {value!r} ({type(value).__name__}). With "
            f"optax.inject_hyperparams {_REMEDY}."
        )


def require_positive_integer(name: str, value: Any) -> None:
    """Raises TypeError or ValueError unless `value` is a static integer from 1 to 2**31 - 1."""
    require_static(name, value, "a static int")
    if not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int >= 1, got {value!r} ({type(value).__name__}).")
    if not 1 <= int(value) < 2**31:
        raise ValueError(f"{name} must be an int >= 1 and < 2**31, got {value!r}.")


def require_number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float = float("inf"),
    precise: bool = False,
) -> None:
    """Raises TypeError or ValueError unless `value` is a real number in range, or a scalar array.

    Of arrays only the type is checked, since `optax.inject_hyperparams` passes traced values.
    `precise` refuses arrays that are narrower than float32, since 0.999 is 1 in bfloat16.
    """
    bound = f"> {above}" if above is not None else f">= {at_least}"
    allowed = f"a finite number {bound}" + (f" and < {below}" if below != float("inf") else "")
    if isinstance(value, jax.Array):
        if value.ndim or not jnp.issubdtype(value.dtype, jnp.number):
            raise TypeError(
                f"{name} must be {allowed}, got an array {value.dtype}{list(value.shape)}."
            )
        if precise and jnp.issubdtype(value.dtype, jnp.floating) and value.dtype.itemsize < 4:
            raise TypeError(
                f"{name} is a {value.dtype} array; allowed are numbers, and arrays of float32 or "
                f"wider, since 0.999 is 1 in bfloat16. optax.inject_hyperparams takes the dtype of "
                f"the parameters; pass it hyperparam_dtype=jnp.float32."
            )
        return
    is_number = isinstance(value, numbers.Real) or (
        np.ndim(value) == 0 and jnp.issubdtype(getattr(value, "dtype", type(value)), jnp.number)
    )
    if isinstance(value, bool) or not is_number:
        raise TypeError(f"{name} must be {allowed}, got {value!r} ({type(value).__name__}).")
    too_small = value <= above if above is not None else at_least is not None and value < at_least
    if too_small or not value < below:
        raise ValueError(f"{name} must be {allowed}, got {value!r}.")


def require_one_of(name: str, value: Any, allowed: Iterable[str], *, otherwise: str = "") -> None:
    """Raises ValueError unless `value` is one of the strings in `allowed`.

    `otherwise` says what else the caller accepts.
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


def require_hashable(name: str, value: Any) -> None:
    """Raises TypeError unless `value` can be part of the key of a compiled program."""
    if not isinstance(value, Hashable):
        raise TypeError(
            f"{name} must be hashable, got {value!r}. A dataclass is hashable with frozen=True or "
            f"eq=False."
        )


def require_real_floating(named: Iterable[tuple[Path, Any]]) -> None:
    """Raises TypeError unless every leaf is of a real floating dtype of 16 bits or more."""
    for path, leaf in named:
        dtype = leaf.dtype
        if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits < 16:
            raise TypeError(
                f"{spell(path)} has dtype {dtype}; allowed are real floating dtypes of 16 bits and "
                f"more. Keep float8 weights in bfloat16, and cast them where they are used. Leave "
                f"other leaves out, for example with optax.masked or optax.partition."
            )


def require_tree_not_count(name: str, tree: Any) -> None:
    """Raises TypeError if a function of the parameters is given a number: a step count."""
    dtype = getattr(tree, "dtype", type(tree))
    if (
        isinstance(tree, int | jax.Array | np.ndarray | np.generic)
        and np.ndim(tree) == 0
        and (jnp.issubdtype(dtype, jnp.integer))
    ):
        raise TypeError(
            f"{name} must get parameters, got {tree!r}. optax.inject_hyperparams calls functions "
            f"with the step count: {_REMEDY}."
        )


def wide(dtype: Any) -> Any:
    """Returns the dtype to compute in: float32, or float64 for a float64 leaf with x64."""
    return jax.dtypes.canonicalize_dtype(jnp.promote_types(dtype, jnp.float32))
