"""The norm-growth limiter, alone and for the APOLLO update."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float, PyTree

from apollo_optax._arguments import require_number, require_real_floating, wide
from apollo_optax._matrices import WeightDimensionNumbers, axes_of_each_leaf
from apollo_optax._paths import Path, lookup, named_arrays, named_leaves, nest, spell
from apollo_optax._placement import on_automatic_axes

# The published update adds this to a norm before it divides by the norm.
NORM_EPS = 1e-8


class LimitNormGrowthState(NamedTuple):
    """The state of `limit_norm_growth`.

    Attributes:
      norm: The norm of the last update of each leaf (or matrix) that was not zero, and 0 before the
        first.
    """

    norm: PyTree


def limit_growth(
    norm: Float[Array, "*batch"], previous: Float[Array, "*batch"], limit: ArrayLike | None
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    """Returns the divisor of an update with this norm, and the norm to remember.

    A zero norm is not remembered. The published optimizer remembers a zero norm, and then lets the
    weight move by no more than 1e-8. The divisor of an infinite norm is infinite, so that the
    update becomes zero. An infinite norm is not remembered either.
    """
    limited = norm
    if limit is not None:
        limited = jnp.where(previous > 0, jnp.minimum(norm, limit * (previous + NORM_EPS)), norm)
    moves = (limited > 0) & ~jnp.isinf(norm)
    divisor = norm / jnp.where(moves, limited, 1)
    divisor = jnp.where(moves | jnp.isinf(norm), divisor, 1)
    return divisor.astype(norm.dtype), jnp.where(moves, limited, previous).astype(previous.dtype)


def limit_norm_growth(
    limit: ArrayLike = 1.01, *, weight_dimension_numbers: WeightDimensionNumbers = None
) -> optax.GradientTransformationExtraArgs:
    r"""Limits how fast the norm of each leaf's update may grow, after any transformation.

    The equation is that of APOLLO's limiter:

    .. math::
      c = \max(N / (N_{prev} + 10^{-8}), \gamma) / \gamma, \quad U \leftarrow U / c

    Here N is the norm of a leaf's update, in float32 (float64 for float64 leaves), and N_prev is
    the norm of the last update that was not zero. The first update is not changed. An update whose
    squared norm overflows becomes zero.

    Args:
      limit: gamma, the largest ratio of consecutive norms.
      weight_dimension_numbers: The axes that make a matrix, as in `scale_by_apollo`. Each matrix,
        also of a stacked leaf, is then limited by its own norm, and other leaves are not changed.
        None means that every leaf is limited by its norm.

    Returns:
      A gradient transformation whose state is a `LimitNormGrowthState`.

    Raises:
      TypeError: If `limit` is not a number; at init, if a leaf is not real floating point.
      ValueError: If `limit` is not above 1; at update, if the state was made for other parameters.

    References:
      Chen et al., Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?, 2024,
      https://arxiv.org/abs/2410.01623

    Example:
      >>> import optax
      >>> from apollo_optax import limit_norm_growth
      >>> tx = optax.chain(optax.scale_by_adam(), limit_norm_growth(1.01), optax.scale(-0.001))
    """
    require_number("limit", limit, above=1, precise=True)

    def batch_axes_of(tree: PyTree, *, quiet: bool) -> dict[Path, tuple[int, ...]]:
        if weight_dimension_numbers is None:
            return {path: () for path, _ in named_leaves(tree)[0]}
        axes = axes_of_each_leaf(weight_dimension_numbers, tree, quiet=quiet)
        return {path: matrix.batch for path, matrix in axes.items() if matrix}

    def init(params: PyTree) -> LimitNormGrowthState:
        named, _ = named_arrays(params)
        if not named:
            return LimitNormGrowthState(params)
        require_real_floating(named)
        leaves = dict(named)
        return LimitNormGrowthState(
            nest(
                (path, jnp.zeros([leaves[path].shape[a] for a in axes], wide(leaves[path].dtype)))
                for path, axes in batch_axes_of(params, quiet=False).items()
            )
        )

    def update(
        updates: PyTree,
        state: LimitNormGrowthState,
        params: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, LimitNormGrowthState]:
        del params, extra_args
        if not isinstance(state, LimitNormGrowthState):
            raise ValueError(
                f"The state of limit_norm_growth must be a LimitNormGrowthState, got a "
                f"{type(state).__name__}. Call init, or restore into what init returns."
            )
        named, treedef = named_arrays(updates)
        if not named:
            return updates, state
        batch = batch_axes_of(updates, quiet=True)
        norms = dict(named_leaves(state.norm)[0])  # a leaf without a gradient keeps its norm
        limited = []
        for path, u in named:
            if path in batch:
                inner = tuple(a for a in range(u.ndim) if a not in batch[path])
                norm = jnp.sqrt(jnp.sum(jnp.square(u.astype(wide(u.dtype))), axis=inner))
                divisor, remembered = limit_growth(norm, _norm_of(state, path), limit)
                u = (u / jnp.expand_dims(divisor, inner)).astype(u.dtype)
                norms[path] = remembered
            limited.append(u)
        return jax.tree.unflatten(treedef, limited), LimitNormGrowthState(nest(norms.items()))

    return on_automatic_axes(optax.GradientTransformationExtraArgs(init, update))


def _norm_of(state: LimitNormGrowthState, path: Path) -> Array:
    try:
        return lookup(state.norm, path)
    except KeyError as error:
        raise ValueError(
            f"The state has no norm for {spell(path)}: init made it for other parameters. Call "
            f"init again, or restore a state of these parameters."
        ) from error
