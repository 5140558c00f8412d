"""Stochastic rounding, which adds small updates to low-precision weights without bias."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from apollo_optax._arguments import require_real_floating
from apollo_optax._generator import random_bits
from apollo_optax._paths import Path, named_arrays, spell, stable_hash
from apollo_optax._placement import call_on_automatic_axes


def rounds_up(key: PRNGKeyArray, fraction: Float[Array, "*shape"]) -> Bool[Array, "*shape"]:
    """Draws for each entry whether it is rounded up, with the probability `fraction`.

    The draw has 16 bits. A float32 has 16 bits more than a bfloat16, so that rounding to bfloat16
    has no bias. Elsewhere the bias is at most 2^-17 of a step.
    """
    bits = random_bits(key, fraction.shape).astype(jnp.uint16)
    # Half a unit centres the thresholds, and keeps whole steps unchanged.
    return fraction > (bits.astype(jnp.float32) + 0.5) * 2.0**-16


def stochastic_round(
    key: PRNGKeyArray, x: Float[Array, "*shape"], dtype: jax.typing.DTypeLike
) -> Float[Array, "*shape"]:
    """Rounds `x` to one of its two neighbours in a narrower float dtype, with the expectation `x`.

    Values that `dtype` can represent, infinities and NaN do not change. Beyond the largest finite
    value, infinity is the upper neighbour, as in rounding to nearest.

    Args:
      key: The PRNG key, for one draw per entry.
      x: Values of a wider float dtype.
      dtype: bfloat16 or float16.

    Returns:
      `x` in `dtype`.
    """
    bits_dtype = jnp.uint16
    nearest = x.astype(dtype)
    bits = jax.lax.bitcast_convert_type(nearest, bits_dtype)
    overshot = jnp.abs(nearest.astype(x.dtype)) > jnp.abs(x)
    # Apart from the sign, the bits of a float count the values upwards from zero. The next value
    # after infinity would be NaN, so infinities are left out.
    inner_bits = jnp.where(jnp.isfinite(x), bits - overshot.astype(bits_dtype), 0)
    inner = jax.lax.bitcast_convert_type(inner_bits, dtype).astype(x.dtype)
    outer = jax.lax.bitcast_convert_type(inner_bits + 1, dtype)
    gap = jnp.abs(outer.astype(x.dtype)) - jnp.abs(inner)
    # On backends that flush subnormals to zero, the gap between two of them is zero.
    fraction = (jnp.abs(x) - jnp.abs(inner)) / jnp.where(gap > 0, gap, 1)
    outwards = rounds_up(key, fraction).astype(bits_dtype)
    rounded = jax.lax.bitcast_convert_type(inner_bits + outwards, dtype)
    return jnp.where(jnp.isfinite(x) & jnp.isfinite(gap), rounded, nearest)


def apply_updates_stochastic(params: PyTree, updates: PyTree, key: PRNGKeyArray | None) -> PyTree:
    """Adds updates to parameters, with stochastic rounding of bfloat16 and float16 parameters.

    Use this function in place of `optax.apply_updates`. The spacing of bfloat16 weights is 2^-8 of
    their size. Updates that are small against the spacing are lost when the sum is rounded to
    nearest. Stochastic rounding keeps their expectation: `E[result] = params + updates`.

    Args:
      params: The parameters. bfloat16 and float16 leaves are rounded stochastically. float32 and
        float64 leaves are updated as by `optax.apply_updates`.
      updates: The updates, with the structure and shapes of the parameters. A None leaves its
        parameter unchanged.
      key: A PRNG key, a new one for every step. Each leaf folds its path into the key, so that
        other leaves do not change its rounding.

    Returns:
      Parameters of the same structure, shapes and dtypes.

    Raises:
      TypeError: If a parameter has another dtype.
      ValueError: If the updates have another structure or shape, or the key is None.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from apollo_optax import apply_updates_stochastic
      >>> params = jnp.ones(10_000, jnp.bfloat16)
      >>> moved = apply_updates_stochastic(params, jnp.full(10_000, 1e-3), jax.random.key(0))
      >>> moved.dtype, bool(abs(moved.astype(float).mean() - 1.001) < 2e-4)
      (dtype(bfloat16), True)
    """
    key = require_new_key(key)
    named, treedef = named_arrays(params)
    given = treedef.flatten_up_to(updates)
    added = [
        add_update(path, param, update, key)
        for (path, param), update in zip(named, given, strict=True)
    ]
    return jax.tree.unflatten(treedef, added)


def add_update(path: Path, param: Array, update: Array | None, key: PRNGKeyArray | None) -> Array:
    """Updates a parameter as `apply_updates_stochastic` does, or to nearest without a key."""
    if update is None:
        return param
    require_shape_of_parameter(path, update, param.shape)
    if key is not None and param.dtype in (jnp.bfloat16, jnp.float16):

        def add(param: Array, update: Array, key: PRNGKeyArray) -> Array:
            return stochastic_round(key, param.astype(jnp.float32) + update, param.dtype)

        return call_on_automatic_axes(add, param, update, leaf_key(key, path), like=param)
    require_real_floating([(path, param)])
    return (param + update).astype(param.dtype)


def require_new_key(key: PRNGKeyArray | None) -> PRNGKeyArray:
    """Returns the key; raises ValueError if it is None."""
    if key is None:
        raise ValueError(
            "Stochastic rounding needs a PRNG key, got None. Pass another key at each step, for "
            "example jax.random.fold_in(key, step). With the same key, the same weights would be "
            "rounded up every time."
        )
    return key


def leaf_key(key: PRNGKeyArray, path: Path) -> PRNGKeyArray:
    """Returns the key of the leaf at `path`, which does not depend on other leaves."""
    return jax.random.fold_in(key, stable_hash(path))


def require_shape_of_parameter(path: Path, update: Any, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless the update of the parameter at `path` has its shape."""
    if np.shape(update) != shape:
        raise ValueError(
            f"The update of {spell(path)} has shape {np.shape(update)}, "
            f"its parameter {shape}; the two shapes must be equal."
        )
