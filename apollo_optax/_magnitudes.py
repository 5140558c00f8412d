"""The largest magnitude of an array, on every backend."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact, PyTree


def largest_magnitude(
    x: Inexact[Array, "*shape"], axis: tuple[int, ...] | None = None
) -> Float[Array, "..."]:
    """Returns the largest magnitude along axes, which are kept; NaN where an entry is NaN.

    XLA's CPU compiler leaves NaN out of a maximum of 4,096 floats and more (JAX 0.10).
    """
    largest = jnp.max(jnp.abs(x), axis=axis, keepdims=True, initial=0)
    return jnp.where(jnp.any(jnp.isnan(x), axis=axis, keepdims=True), jnp.nan, largest)


def largest_of_tree(tree: PyTree) -> Float[Array, ""]:
    """Returns the largest magnitude of all leaves in float32, NaN if any is NaN, 0 without leaves.

    A float64 above the largest float32 is infinite.
    """
    of_leaves = [largest_magnitude(x).astype(jnp.float32).ravel() for x in jax.tree.leaves(tree)]
    return largest_magnitude(jnp.concatenate([jnp.zeros(1), *of_leaves]))[0]
