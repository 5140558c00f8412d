"""The largest magnitude of an array, on every backend."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree


def largest_magnitude(
    x: Float[Array, "*shape"], axis: tuple[int, ...] | None = None
) -> Float[Array, "..."]:
    """Returns the largest magnitude along axes, which are kept; NaN where an entry is NaN.

    XLA's CPU compiler leaves NaN out of the maximum of a large float32 array (JAX 0.10). So the
    same reduction also looks for NaN, at no further reading of memory.
    """

    def larger(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        return jax.lax.max(a[0], b[0]), a[1] | b[1]

    axes = tuple(range(x.ndim)) if axis is None else axis
    start = jnp.zeros([], x.dtype), jnp.zeros([], bool)
    largest, is_nan = jax.lax.reduce((jnp.abs(x), jnp.isnan(x)), start, larger, axes)
    return jnp.expand_dims(jnp.where(is_nan, jnp.nan, largest), axes)


def largest_of_tree(tree: PyTree) -> Float[Array, ""]:
    """Returns the largest magnitude of all leaves in float32, NaN if any is NaN, 0 without leaves.

    A float64 above the largest float32 is infinite.
    """
    of_leaves = [largest_magnitude(x).astype(jnp.float32).ravel() for x in jax.tree.leaves(tree)]
    return largest_magnitude(jnp.concatenate([jnp.zeros(1), *of_leaves]))[0]
