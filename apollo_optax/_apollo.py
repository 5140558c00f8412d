"""The APOLLO update as an Optax gradient transformation."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray

from apollo_optax._arguments import (
    require_callable,
    require_hashable,
    require_one_of,
    require_positive_integer,
    wide,
)
from apollo_optax._keys import require_key, threefry_key
from apollo_optax._leafwise import LeafAxes, MatrixRule, Projections, scale_leaves
from apollo_optax._leaves import (
    MANY_WEIGHTS,
    Hyperparameters,
    LeafState,
    ScaleByApolloState,
    Vocabulary,
    moments,
)
from apollo_optax._limiter import NORM_EPS, limit_growth
from apollo_optax._matrices import (
    MatrixAxes,
    WeightDimensionNumbers,
    expand_to_leaf,
    low_rank_shape,
    project,
    projection_shape,
    side,
    sum_of_squares_per_channel,
    without_overflow,
)
from apollo_optax._paths import Path, spell
from apollo_optax._projections import (
    Projection,
    check_projection,
    draw_projections,
    gaussian,
    keeps_state,
    refit_projections,
)

# From (R_tilde, R), both (rank, *channel), to one factor per channel.
ScalingRule = Callable[[Array, Array], Array]
Granularity = Literal["channel", "tensor"] | ScalingRule
# From (P, G, mu, nu, axes, hyper, granularity) to (mu, nu, s, |G|^2 per channel).
Implementation = Callable[..., tuple[Array, Array, Array, Array]]
# Of the largest number: below it, P of any width keeps R far from overflow.
_LARGEST_SQUARE = 1e-16


@functools.partial(jax.jit, static_argnames=("axes", "granularity", "implementation"))
def apollo_update(
    G: Float[Array, "*leaf"],
    P: Float[Array, "*batch rank dim"],
    state: LeafState,
    axes: MatrixAxes,
    t: Int[Array, ""],
    hyper: Hyperparameters,
    granularity: Granularity = "channel",
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "*leaf"], LeafState]:
    """Takes one step of Algorithm 1 (Zhu et al., 2025) for every matrix of a leaf.

    Leaves of one shape are traced once. The step is compiled outside of `jax.jit` too.

    Args:
      G: The gradient.
      P: The projection of every matrix.
      state: The state of the leaf.
      axes: The axes of the leaf.
      t: The number of this step, counted from 1.
      hyper: The hyperparameters of the rule.
      granularity: As in `scale_by_apollo`.
      implementation: As in `scale_by_apollo`.

    Returns:
      The update, in the dtype of G, and the next state of the leaf.
    """
    b1, b2, eps, scale, limit = hyper
    rank_axis = len(axes.batch)
    matrix_axes = tuple(range(rank_axis, rank_axis + 1 + len(axes.channel)))
    shared = matrix_axes if granularity == "tensor" else matrix_axes[:1]  # one factor

    if implementation is None:
        R = without_overflow(project(P, G, axes))  # R = P G, (*batch, rank, *channel)
        mu, nu = moments(R, state.mu, state.nu, hyper)
        R_tilde = mu / (jnp.sqrt(nu) + eps)
        if callable(granularity):
            s = _factors_by_rule(granularity, R_tilde, R, rank_axis)
        else:
            s = _norm(R_tilde, shared) / (_norm(R, shared) + NORM_EPS)
        G_squared = jnp.expand_dims(sum_of_squares_per_channel(G, axes), rank_axis)
    else:
        mu, nu, s, G_squared = implementation(P, G, state.mu, state.nu, axes, hyper, granularity)

    G_squared = jnp.sum(G_squared, axis=shared, keepdims=True)
    # R may have lost entries of a larger gradient, and s is then the factor of the rest.
    is_lost = G_squared > _LARGEST_SQUARE * float(jnp.finfo(G_squared.dtype).max)
    U_squared = jnp.where(is_lost, jnp.inf, jnp.square(s) * G_squared)
    N = jnp.sqrt(jnp.sum(U_squared, axis=matrix_axes))  # |G s|, (*batch,)
    c, remembered = limit_growth(N, state.norm, limit)
    is_projected = P.shape[-2] < P.shape[-1]
    step = (scale if is_projected else 1) * jnp.sqrt(1 - b2**t) / (1 - b1**t) / c
    U = G * expand_to_leaf(s * jnp.expand_dims(step, matrix_axes), axes)
    mu, nu = mu.astype(state.mu.dtype), nu.astype(state.nu.dtype)
    return jnp.asarray(U, G.dtype), LeafState(mu, nu, remembered.astype(state.norm.dtype))


def _norm(x: Float[Array, "..."], axes: tuple[int, ...]) -> Float[Array, "..."]:
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=axes, keepdims=True))


def _factors_by_rule(rule: ScalingRule, R_tilde: Array, R: Array, rank_axis: int) -> Array:
    """Returns the user's factors of each matrix, with an axis of size 1 for the rank."""

    def of_matrix(R_tilde: Array, R: Array) -> Array:
        return jnp.broadcast_to(rule(R_tilde, R), R.shape[1:]).astype(R.dtype)[None]

    for _ in range(rank_axis):
        of_matrix = jax.vmap(of_matrix)
    return of_matrix(R_tilde, R)


def scale_by_apollo(
    rank: int = 256,
    update_proj_gap: int = 200,
    scale: ArrayLike = 1.0,
    granularity: Granularity = "channel",
    *,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    norm_growth_limit: ArrayLike | None = 1.01,
    projection: Projection | Callable[..., Array] | None = None,
    key: int | PRNGKeyArray = 0,
    mu_dtype: Any = None,
    vocabulary: Vocabulary = "adam",
    weight_dimension_numbers: WeightDimensionNumbers = None,
    implementation: Implementation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales gradients by APOLLO's structured learning rates.

    For a matrix G, let m be the size of its smaller side (of the reduction axes on a tie):

    .. math::
      R &= P G, \quad P \in \mathbb{R}^{r \times m} \\
      M &= b_1 M + (1 - b_1) R, \quad V = b_2 V + (1 - b_2) R^2 \\
      \tilde R &= M / (\sqrt{V} + \epsilon) \\
      s &= \|\tilde R\| / (\|R\| + 10^{-8}) \quad
      \text{per channel of the larger side, or for the matrix} \\
      U &= G s, \quad N = \|U\| \\
      c &= \max(N / (N_{prev} + 10^{-8}), \gamma) / \gamma \
      \text{ if } N_{prev} > 0 \text{, else } 1 \\
      \text{update} &= \text{scale} \, \frac{\sqrt{1 - b_2^t}}{1 - b_1^t} \, U / c

    Then N_prev becomes N / c, unless N / c is 0. Where r >= m, nothing is projected: P is the
    identity, and the scale, which makes up for a projection, is 1. Leaves that are not matrices get
    Adam's update, except that leaves of full size get the update that `vocabulary` names.

    Gradients are read in their own dtype. Moments, norms and factors are computed in float32
    (float64 for float64 leaves). Updates have the dtype of the gradients. R = P G is accumulated in
    float32 with JAX's default precision. On TPUs and recent GPUs this precision rounds the entries
    of P and G to bfloat16 or TF32 first; `jax.default_matmul_precision("highest")` prevents that.

    If the norm of a channel (of the matrix with "tensor") is above 1e11 in float32, the update of
    the matrix is zero. In the moments, entries of R above 1e15 count as zero.

    Args:
      rank: The number of rows of P, capped at a matrix's smaller side. The state of a matrix with
        larger side n has `2 * rank * n + 1` numbers.
      update_proj_gap: The number of steps between two projections. P is redrawn whenever `count %
        update_proj_gap == 0`. The moments are kept.
      scale: The factor of the projected updates, the paper's alpha: 1 for APOLLO, sqrt(128) for
        APOLLO-Mini.
      granularity: "channel" for one factor per index of the larger side, "tensor" for one factor
        per matrix, or a function of R~ and R. The function gets the float32 `(min(rank, m),
        *channel)` of one matrix, and returns factors that broadcast to the channels.
      b1: The decay of the first moment.
      b2: The decay of the second moment.
      eps: The number added to the root of the second moment.
      norm_growth_limit: gamma, the largest ratio of the norms of a matrix's consecutive updates.
        None means no limit.
      projection: `gaussian` (None means this one), `rademacher`, `svd`, or a function
        `(key, refresh, rank, dim) -> float32 (rank, dim)` with `refresh = count //
        update_proj_gap`.
      key: The seed or the PRNG key of all projections. The key of a matrix is folded in from its
        path and its batch index, so that other leaves do not change its projections.
      mu_dtype: The dtype that the first moment is kept in.
      vocabulary: The rule for leaves of full size that are not matrices: leaves with 128 indices or
        more on each of the last two axes, such as embedding tables and output heads. "adam" keeps
        two moments for every weight, as the paper does. "factored" is Adam's update without a first
        moment and with a second moment of rank 1; the state is the means of the squared gradient
        over either of the two axes. "factored_momentum" adds a first moment, which is kept in
        `mu_dtype` (None means bfloat16).
      weight_dimension_numbers: The axes that make a matrix. None goes by names, as
        `transformer_dimension_numbers` does. Of the leaves with other names, those with two axes
        are matrices, and those with more axes are left to Adam, with a warning. One
        `ApolloDimensionNumbers` applies to every leaf with at least two axes. A tree of
        `ApolloDimensionNumbers`, such as `infer_dimension_numbers` returns, has None for leaves
        left to Adam; the specifications of Muon and GaLore are accepted too. A function of the
        parameters, such as `transformer_dimension_numbers`, returns a tree.
      implementation: How the moments, factors and norms of a matrix are computed. None means by
        XLA. The kernels of `apollo_optax.experimental` save one read of each gradient, and raise an
        error where they cannot be used.

    Returns:
      A gradient transformation whose state is a `ScaleByApolloState`. Its `update` takes an extra
      argument `first_layer`, for slices of stacked leaves and of their state: the index on the
      leading batch axis at which the slices start. Each layer then keeps its own projection.

    Raises:
      TypeError: If an argument has the wrong type; at init and update, if a leaf is not real
        floating point; at init, if a projection returns another dtype than float32.
      ValueError: If an argument is out of range; at init, if axes do not fit a parameter, or a
        projection returns another shape than (rank, dim); at update, if the gradients do not match
        the state.

    References:
      Zhu et al., APOLLO: SGD-like Memory, AdamW-level Performance, MLSys 2025,
      https://arxiv.org/abs/2412.05270

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import apollo_optax
      >>> params = {"kernel": jnp.ones((64, 256)), "bias": jnp.zeros(256)}
      >>> tx = optax.chain(apollo_optax.scale_by_apollo(rank=8), optax.scale_by_learning_rate(0.01))
      >>> state = tx.init(params)
      >>> state[0].mu["kernel"].shape
      (8, 256)
    """
    projection = gaussian if projection is None else projection
    _require_settings(rank, update_proj_gap, granularity, projection, key, implementation)
    stores_projections = keeps_state(projection)

    def projections_of(
        gradients: dict[Path, Array],
        state: ScaleByApolloState,
        stored: Projections,
        axes: LeafAxes,
        first_layer: Int[ArrayLike, ""],
    ) -> tuple[Projections, Projections]:
        if stores_projections:
            is_due = state.count % update_proj_gap == 0
            P = refit_projections(projection, gradients, stored, axes, is_due)
            return P, P
        shapes = {
            path: projection_shape(G.shape, matrix, rank)
            for path, G in gradients.items()
            if (matrix := axes[path])
        }
        refresh = state.count // update_proj_gap
        key_of_all = threefry_key(state.key)
        return draw_projections(projection, key_of_all, refresh, shapes, first_layer), {}

    def check(named: list[tuple[Path, Any]], axes: LeafAxes) -> None:
        _warn_of_whole_ranks(named, axes, rank)
        matrices = [(leaf, matrix) for path, leaf in named if (matrix := axes[path])]
        _check_functions(granularity, projection, matrices, rank)

    update = functools.partial(
        apollo_update, granularity=granularity, implementation=implementation
    )
    return scale_leaves(
        MatrixRule(update, rank, projections_of, stores_projections, check, key),
        Hyperparameters(b1, b2, eps, scale, norm_growth_limit),
        mu_dtype=mu_dtype,
        vocabulary=vocabulary,
        weight_dimension_numbers=weight_dimension_numbers,
    )


def _require_settings(
    rank: int,
    update_proj_gap: int,
    granularity: Granularity,
    projection: Callable[..., Array],
    key: int | PRNGKeyArray,
    implementation: Implementation | None,
) -> None:
    require_positive_integer("rank", rank)
    require_positive_integer("update_proj_gap", update_proj_gap)
    if not callable(granularity):
        otherwise = " or a function (R_tilde, R) -> factors"
        require_one_of("granularity", granularity, ("channel", "tensor"), otherwise=otherwise)
    require_callable("projection", projection, "(key, refresh, rank, dim) -> float32 (rank, dim)")
    if implementation is not None:
        require_callable("implementation", implementation, "of apollo_optax.experimental")
    require_hashable("granularity", granularity)
    require_hashable("projection", projection)
    require_hashable("implementation", implementation)
    require_key("key", key)


def _warn_of_whole_ranks(named: list[tuple[Path, Any]], axes: LeafAxes, rank: int) -> None:
    """Warns once of matrices that are not projected, if they are large enough to matter."""
    whole = [
        (path, leaf)
        for path, leaf in named
        if (matrix := axes[path]) and rank >= side(leaf.shape, matrix.projected)
    ]
    size = sum(leaf.size for _, leaf in whole)
    if size < MANY_WEIGHTS:
        return
    path, leaf = max(whole, key=lambda item: item[1].size)
    smaller = side(leaf.shape, axes[path].projected)  # type: ignore[union-attr]
    warnings.warn(
        f"rank={rank} is at least the smaller side of {len(whole)} leaves, which have {size:,} "
        f"weights together and keep AdamW's state. The matrices of {spell(path)} "
        f"{tuple(leaf.shape)} have a smaller side of {smaller}. Use a smaller rank. If the "
        f"matrices have other axes, name these in weight_dimension_numbers, for example with "
        f"infer_dimension_numbers.",
        stacklevel=5,
    )


def _check_functions(
    granularity: Granularity,
    projection: Callable[..., Array],
    matrices: list[tuple[Any, MatrixAxes]],
    rank: int,
) -> None:
    """Raises unless the user's functions return what each matrix needs, without running them."""
    shapes = set()
    for leaf, axes in matrices:
        shape = low_rank_shape(leaf.shape, axes, rank)[len(axes.batch) :]
        _check_scaling_rule(granularity, shape, wide(leaf.dtype))
        *batch, rows, dim = projection_shape(leaf.shape, axes, rank)
        stack = (*batch, dim, side(leaf.shape, axes.channel))
        shapes.add((rows, jax.ShapeDtypeStruct(stack, leaf.dtype)))
    for rows, matrices_of_leaf in shapes:
        check_projection(projection, rows, matrices_of_leaf)


def _check_scaling_rule(granularity: Granularity, shape: tuple[int, ...], dtype: Any) -> None:
    if not callable(granularity):
        return
    R = jax.ShapeDtypeStruct(shape, dtype)
    factors = jax.eval_shape(granularity, R, R)
    try:
        fits = jnp.broadcast_shapes(factors.shape, shape[1:]) == shape[1:]
        fits = fits and jnp.issubdtype(factors.dtype, jnp.floating)
    except (AttributeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(
            f"granularity returned {factors!r} for R_tilde and R of shape {shape}; it must return "
            f"floating factors that broadcast to the channels, {shape[1:]}."
        )
