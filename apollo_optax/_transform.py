"""The APOLLO update as an Optax gradient transformation, and its norm-growth limiter alone."""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray, PyTree, UInt32

from apollo_optax import _kernels, _kernels_gpu, _kernels_tpu
from apollo_optax._arguments import (
    require_callable,
    require_number,
    require_one_of,
    require_positive_integer,
)
from apollo_optax._keys import key_data, require_key, wrap_like
from apollo_optax._matrices import (
    MatrixAxes,
    WeightDimensionNumbers,
    axes_of_each_leaf,
    broadcast_to_leaf,
    low_rank_shape,
    matrices_of,
    project,
    projection_shape,
    sum_of_squares_per_channel,
    warn_of_unprojected_leaves,
)
from apollo_optax._paths import Path, lookup, named_leaves, nest, spell
from apollo_optax._placement import (
    call_on_automatic_axes,
    compiler_divides_arrays,
    matrices_placement,
    moments_placement,
    placement_of,
)
from apollo_optax._projection import (
    Draw,
    Projection,
    check_projection,
    draws_of,
    gaussian,
    svd,
)

# (R_tilde, R), both (rank, *channel), to one factor a channel.
ScalingRule = Callable[[Array, Array], Array]
Granularity = Literal["channel", "tensor"] | ScalingRule

_KERNELS_OF = {"tpu": _kernels_tpu, "cuda": _kernels_gpu}

# Where the published update adds 1e-8 to a norm.
_NORM_EPS = 1e-8


class ScaleByApolloState(NamedTuple):
    """State of `scale_by_apollo`: arrays only, in plain dictionaries nested by the parameters'
    names.

    Attributes:
      count: Steps taken, int32 scalar.
      key: Data of the PRNG key from which every projection is redrawn, uint32.
      mu: First moment. Of a matrix: of the projected gradient, `(*batch, min(rank, m), *channel)`.
        Of any other leaf: of the gradient, in the leaf's shape. float32 (float64 for float64
        leaves) unless `mu_dtype` is given.
      nu: Second moment, shaped as `mu`, float32 or float64.
      norm: Norm of a matrix's last update that was not zero, `(*batch,)`; 0 before the first.
        Leaves that are not matrices have no entry.
      projection: With `projection=svd`, the P in use, `(*batch, min(rank, m), m)`; otherwise empty.
    """

    count: Int[Array, ""]  # type: ignore[assignment]  # tuple has a method of this name
    key: UInt32[Array, "..."]
    mu: PyTree
    nu: PyTree
    norm: PyTree
    projection: PyTree = {}  # noqa: RUF012


class LimitNormGrowthState(NamedTuple):
    """State of `limit_norm_growth`.

    Attributes:
      norm: Norm of each leaf's (or matrix's) last update that was not zero; 0 before the first.
    """

    norm: PyTree


class _LeafState(NamedTuple):
    """One leaf's share of the state; None where the leaf has no entry."""

    mu: Array
    nu: Array
    norm: Any = None
    projection: Any = None


class _Settings(NamedTuple):
    """The arguments of `scale_by_apollo`, checked."""

    rank: int
    update_proj_gap: int
    scale: ArrayLike
    granularity: Granularity
    b1: ArrayLike
    b2: ArrayLike
    eps: ArrayLike
    norm_growth_limit: ArrayLike | None
    draw: Any
    key: Any
    mu_dtype: Any
    use_pallas: bool
    sequential: bool


def _check_settings(settings: _Settings) -> None:
    require_positive_integer("rank", settings.rank)
    require_positive_integer("update_proj_gap", settings.update_proj_gap)
    require_number("scale", settings.scale, above=0)
    if not callable(settings.granularity):
        otherwise = " or a function (R_tilde, R) -> factors"
        require_one_of(
            "granularity", settings.granularity, ("channel", "tensor"), otherwise=otherwise
        )
    require_number("b1", settings.b1, at_least=0, below=1)
    require_number("b2", settings.b2, at_least=0, below=1)
    require_number("eps", settings.eps, above=0)
    if settings.norm_growth_limit is not None:
        require_number("norm_growth_limit", settings.norm_growth_limit, above=1)
    signature = "(key, refresh, rank, dim) -> float32 (rank, dim)"
    require_callable("projection", settings.draw, signature)
    require_key("key", settings.key)
    for name in ("use_pallas", "sequential"):
        if not isinstance(value := getattr(settings, name), bool):
            raise TypeError(f"{name} must be True or False, got {value!r}.")
    if settings.mu_dtype is not None and not jnp.issubdtype(settings.mu_dtype, jnp.floating):
        raise TypeError(f"mu_dtype must be None or a floating dtype, got {settings.mu_dtype!r}.")


def _gather(count: Array, key: Array, leaves: dict[Path, _LeafState]) -> ScaleByApolloState:
    def nested(field: str) -> PyTree:
        values = [(path, getattr(leaf, field)) for path, leaf in leaves.items()]
        return nest((path, value) for path, value in values if value is not None)

    return ScaleByApolloState(count, key, *(nested(field) for field in _LeafState._fields))


def _leaf_state(state: ScaleByApolloState, path: Path, moment_shape: tuple[int, ...]) -> _LeafState:
    def entry(field: PyTree) -> Array | None:
        try:
            return lookup(field, path)
        except KeyError:
            return None

    mu, nu = entry(state.mu), entry(state.nu)
    if mu is None or nu is None or mu.shape != moment_shape:
        found = "no moments" if mu is None else f"moments of shape {mu.shape}"
        raise ValueError(
            f"The state has {found} for {spell(path)}, whose gradient needs {moment_shape}: init "
            f"made it for other parameters, rank or axes. Call init again or restore one that fits."
        )
    return _LeafState(mu, nu, entry(state.norm), entry(state.projection))


def _require_real_floating(named: list[tuple[Path, Any]]) -> None:
    for path, leaf in named:
        dtype = getattr(leaf, "dtype", type(leaf))
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"{spell(path)} has dtype {dtype}; allowed are real floating dtypes. Leave other "
                f"leaves out, for example with optax.masked or optax.partition."
            )


def _wide(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


def _moment_shape(shape: tuple[int, ...], axes: MatrixAxes | None, rank: int) -> tuple[int, ...]:
    return shape if axes is None else low_rank_shape(shape, axes, rank)


def _init_leaf(leaf: Any, axes: MatrixAxes | None, settings: _Settings) -> _LeafState:
    dtype, shape = _wide(leaf.dtype), _moment_shape(leaf.shape, axes, settings.rank)
    on_mesh = placement_of(leaf)
    device = moments_placement(on_mesh, leaf.shape, axes)
    moments = _LeafState(
        jnp.zeros(shape, settings.mu_dtype or dtype, device=device),
        jnp.zeros(shape, dtype, device=device),
    )
    if axes is None:
        return moments
    _check_scaling_rule(settings.granularity, shape[len(axes.batch) :], dtype)
    *batch_shape, capped_rank, dim = projection_shape(leaf.shape, axes, settings.rank)
    device = matrices_placement(on_mesh, leaf.shape, axes)
    moments = moments._replace(norm=jnp.zeros(batch_shape, dtype, device=device))
    if settings.draw is svd:
        device = matrices_placement(on_mesh, leaf.shape, axes, whole=2)
        kept = jnp.zeros((*batch_shape, capped_rank, dim), jnp.float32, device=device)
        return moments._replace(projection=kept)
    check_projection(settings.draw, capped_rank, dim)
    return moments


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
            f"granularity returned {factors!r} for R_tilde and R of shape {shape}; expected "
            f"floating factors that broadcast to the channels, {shape[1:]}."
        )


class _Clock(NamedTuple):
    """What a step's projections are drawn from.

    Attributes:
      count: Steps taken before this one.
      key: Data of the key of all projections.
      first: Where slices of stacked leaves start on their leading batch axis.
    """

    count: Int[Array, ""]  # type: ignore[assignment]  # tuple has a method of this name
    key: UInt32[Array, "..."]
    first: ArrayLike


def _draws(
    grads: dict[Path, Array],
    axes: dict[Path, MatrixAxes],
    kept: dict[Path, Array],
    clock: _Clock,
    settings: _Settings,
) -> list[Draw]:
    """P of each matrix of each leaf at this step: to be redrawn, or the one kept by `svd`."""
    shapes = {
        path: projection_shape(G.shape, axes[path], settings.rank) for path, G in grads.items()
    }
    if settings.draw is not svd:
        key, refresh = wrap_like(clock.key, settings.key), clock.count // settings.update_proj_gap
        return draws_of(settings.draw, key, refresh, shapes, clock.first)

    def decompose(path: Path, after: PyTree) -> dict[Path, Array]:
        del after  # P is there already, but for one in `update_proj_gap` steps
        P = jax.lax.cond(
            clock.count % settings.update_proj_gap == 0,
            lambda G, _: svd(matrices_of(G, axes[path]), shapes[path][-2]),
            lambda _, P: P,
            grads[path],
            kept[path],
        )
        return {path: P}

    return [
        Draw(functools.partial(decompose, path), math.prod(shape[:-2]) > 1)
        for path, shape in shapes.items()
    ]


def _update_moments(
    x: Float[Array, "*shape"], state: _LeafState, settings: _Settings
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    mu = jnp.asarray(settings.b1 * state.mu.astype(x.dtype) + (1 - settings.b1) * x)
    nu = jnp.asarray(settings.b2 * state.nu + (1 - settings.b2) * jnp.square(x))
    return mu.astype(x.dtype), nu.astype(x.dtype)


def _update_adam(
    g: Float[Array, "*leaf"], state: _LeafState, settings: _Settings, count: Int[Array, ""]
) -> tuple[Float[Array, "*leaf"], _LeafState]:
    mu, nu = _update_moments(g.astype(_wide(g.dtype)), state, settings)
    corrected_mu = mu / (1 - settings.b1**count)
    corrected_nu = nu / (1 - settings.b2**count)
    update = corrected_mu / (jnp.sqrt(corrected_nu) + settings.eps)
    return update.astype(g.dtype), _LeafState(mu.astype(state.mu.dtype), nu)


def _update_matrix(
    G: Float[Array, "*leaf"],
    P: Float[Array, "*batch rank dim"],
    axes: MatrixAxes,
    state: _LeafState,
    settings: _Settings,
    count: Int[Array, ""],
) -> tuple[Float[Array, "*leaf"], _LeafState]:
    mu, nu, scaling, squared_norm = _project(P, G, axes, state, settings)
    channel_axes = tuple(range(len(axes.batch), len(axes.batch) + len(axes.channel)))
    if settings.granularity == "tensor":
        squared_norm, channel_axes = jnp.sum(squared_norm, axis=channel_axes), ()
    norm = jnp.sqrt(jnp.sum(jnp.square(scaling) * squared_norm, axis=channel_axes))
    divisor, remembered = limited_norm(norm, state.norm, settings.norm_growth_limit)
    bias_correction = jnp.sqrt(1 - settings.b2**count) / (1 - settings.b1**count)
    per_matrix = settings.scale * bias_correction / divisor
    factor = scaling * jnp.expand_dims(per_matrix, channel_axes)
    update = G * broadcast_to_leaf(factor, axes)
    return update.astype(G.dtype), _LeafState(mu.astype(state.mu.dtype), nu, remembered)


def _project(
    P: Float[Array, "*batch rank dim"],
    G: Float[Array, "*leaf"],
    axes: MatrixAxes,
    state: _LeafState,
    settings: _Settings,
) -> tuple[Array, Array, Array, Array]:
    """Both moments of R = P G, the factors, and the squared norm of every channel of G."""
    rank_axis = len(axes.batch)

    def plain(P: Array, G: Array, mu: Array, nu: Array) -> tuple[Array, Array, Array, Array]:
        R = project(P, G, axes)
        mu, nu = _update_moments(R, _LeafState(mu, nu), settings)
        R_tilde = mu / (jnp.sqrt(nu) + settings.eps)
        scaling = _scaling(R_tilde, R, settings.granularity, rank_axis)
        return mu, nu, scaling, sum_of_squares_per_channel(G, axes)

    def fused(
        program: Callable[..., Any], P: Array, G: Array, mu: Array, nu: Array
    ) -> tuple[Array, Array, Array, Array]:
        found = _kernels.project(
            program, P, G, mu, nu, axes, b1=settings.b1, b2=settings.b2, eps=settings.eps
        )
        direction, projection = found.squared_direction, found.squared_projection
        if settings.granularity == "tensor":
            direction, projection = (jnp.sum(x, axis=rank_axis) for x in (direction, projection))
        direction, projection = jnp.sqrt(direction), jnp.sqrt(projection)
        return found.mu, found.nu, direction / (projection + _NORM_EPS), found.squared_norm

    kernels: dict[str, Any] = {}
    suits = settings.use_pallas and not callable(settings.granularity)
    if suits and not compiler_divides_arrays():
        kernels = {
            platform: functools.partial(fused, module.program)
            for platform, module in _KERNELS_OF.items()
            if module.fits(G, state.mu, *P.shape[-2:], axes)
        }
    args = P, G, state.mu, state.nu
    if not kernels:
        return plain(*args)
    return jax.lax.platform_dependent(*args, **kernels, default=plain)


def _scaling(
    R_tilde: Float[Array, "..."],
    R: Float[Array, "..."],
    granularity: Granularity,
    rank_axis: int,
) -> Float[Array, "..."]:
    """The structured learning rates: one a channel, or one a matrix for "tensor"."""
    if callable(granularity):

        def rule(R_tilde: Array, R: Array) -> Array:
            return jnp.broadcast_to(granularity(R_tilde, R), R.shape[1:]).astype(R.dtype)

        for _ in range(rank_axis):
            rule = jax.vmap(rule)
        return rule(R_tilde, R)
    axes = (rank_axis,) if granularity == "channel" else tuple(range(rank_axis, R.ndim))
    return _norm(R_tilde, axes) / (_norm(R, axes) + _NORM_EPS)


def _update_leaves(
    grads: dict[Path, Array],
    axes: dict[Path, MatrixAxes | None],
    leaves: dict[Path, _LeafState],
    clock: _Clock,
    settings: _Settings,
) -> tuple[dict[Path, Array], dict[Path, _LeafState]]:
    def update(
        grads: dict[Path, Array],
        leaves: dict[Path, _LeafState],
        clock: _Clock,
        injected: dict[str, Any],
    ) -> tuple[dict[Path, Array], dict[Path, _LeafState]]:
        known, count = settings._replace(**injected), optax.safe_increment(clock.count)
        matrices = {path: matrix for path, matrix in axes.items() if matrix is not None}
        draws = _draws(
            {path: grads[path] for path in matrices},
            matrices,
            {path: leaf.projection for path, leaf in leaves.items()},
            clock,
            known,
        )
        updates, updated = {}, {}

        def update_matrices(P: dict[Path, Array]) -> PyTree:
            # Drawn once, not again for each tile of the product.
            P = P if known.draw is svd else jax.lax.optimization_barrier(P)
            for path, of_leaf in P.items():
                updates[path], leaf = _update_matrix(
                    grads[path], of_leaf, matrices[path], leaves[path], known, count
                )
                updated[path] = leaf._replace(projection=of_leaf if known.draw is svd else None)
            return [updated[path].nu for path in P]

        at_once: dict[Path, Array] = {}
        for each in draws:
            if not (known.sequential and each.is_of_a_stack):
                at_once |= each.draw(())
        update_matrices(at_once)
        used: list[PyTree] = []
        for each in draws:
            if known.sequential and each.is_of_a_stack:
                # After the last but one, so that a draw need not wait for collectives of the last.
                used.append(update_matrices(each.draw(used[-2:-1])))
        for path, g in grads.items():
            if path not in matrices:
                updates[path], updated[path] = _update_adam(g, leaves[path], known, count)
        return updates, updated

    injected = {
        name: value
        for name, value in settings._asdict().items()
        if isinstance(value, jax.Array) and name != "key"
    }
    return call_on_automatic_axes(update, grads, leaves, clock, injected, like=(grads, leaves))


def _norm(x: Float[Array, "..."], axes: tuple[int, ...]) -> Float[Array, "..."]:
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=axes))


def limited_norm(
    norm: Float[Array, "*batch"], previous: Float[Array, "*batch"], limit: ArrayLike | None
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    """Returns what an update of this norm is divided by, and the norm to remember.

    A zero norm is not remembered: the published optimizer does, and then lets the weight move by no
    more than 1e-8.
    """
    if limit is None:
        return jnp.ones_like(norm), jnp.where(norm > 0, norm, previous)
    growth = norm / (previous + _NORM_EPS)
    divisor = jnp.where(previous > 0, jnp.maximum(growth, limit) / limit, 1).astype(norm.dtype)
    limited = norm / divisor
    return divisor, jnp.where(limited > 0, limited, previous)


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
    weight_dimension_numbers: WeightDimensionNumbers = None,
    use_pallas: bool = False,
    sequential: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales gradients by APOLLO's structured learning rates.

    For a matrix G let m be the size of its smaller side (the reduction axes on a tie):

    .. math::
      R &= P G, \quad P \in \mathbb{R}^{r \times m} \\
      M &= b_1 M + (1 - b_1) R, \quad V = b_2 V + (1 - b_2) R^2 \\
      \tilde R &= M / (\sqrt{V} + \epsilon) \\
      s &= \|\tilde R\| / (\|R\| + 10^{-8}) \quad \text{per channel of the larger side, or for the
      matrix} \\ U &= G s, \quad N = \|U\| \\ c &= \max(N / (N_{prev} + 10^{-8}), \gamma) / \gamma \
      \text{ if } N_{prev} > 0 \text{, else } 1 \\ \text{update} &= \text{scale} \, \frac{\sqrt{1 -
      b_2^t}}{1 - b_1^t} \, U / c

    and N_prev becomes N / c where that is not 0. Leaves that are not matrices get Adam's update.
    Gradients are read in their own dtype, everything else is computed in float32 (float64 for
    float64 leaves), and updates have the gradients' dtype.

    Args:
      rank: Rows of P, capped at a matrix's smaller side. `2 * rank * n + 1` numbers of state a
        matrix with larger side n.
      update_proj_gap: P is redrawn whenever `count % update_proj_gap == 0`. The moments are kept.
      scale: The paper's alpha, multiplying the updates of matrices: 1 for APOLLO, sqrt(128) for
        APOLLO-Mini.
      granularity: "channel": one factor per index of the larger side. "tensor": one factor a
        matrix. Or a function of R~ and R, float32 `(min(rank, m), *channel)` of one matrix, that
        returns factors which broadcast to the channels.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment.
      norm_growth_limit: gamma, the largest ratio of the norms of a matrix's consecutive updates;
        None for no limit.
      projection: `gaussian` (None means it), `rademacher`, `svd`, or a function
        `(key, refresh, rank, dim) -> float32 (rank, dim)` with `refresh = count //
        update_proj_gap`.
      key: Seed or PRNG key of all projections. A matrix's own key is folded in from its path and
        batch index, so that other leaves do not matter to it.
      mu_dtype: Dtype the first moment is kept in.
      weight_dimension_numbers: Which axes make a matrix: None (leaves with two axes are matrices;
        one with more is trained with Adam and warned of), one `ApolloDimensionNumbers` for every
        leaf with at least two axes, a tree of them (Muon's and GaLore's are taken too) with None
        for leaves left to Adam, or a function of the parameters that returns one, such as
        `transformer_dimension_numbers`.
      use_pallas: On TPUs and NVIDIA's GPUs, read a gradient once for R, its moments and the norms,
        by a Pallas kernel, where it fits: the matrix on the last two axes in float32 or bfloat16,
        float32 moments, "channel" or "tensor"; on a TPU `rank` a multiple of 8 and the smaller side
        of 128, on a GPU `rank` 1 or a multiple of 16 and both sides of 16. Elsewhere it does
        nothing. `benchmarks/hbm_traffic.py` tells what it saves. For one device, or within
        `jax.shard_map` with `check_vma=False`: XLA cannot divide a kernel over a mesh. With
        `jax.set_mesh` the plain code is taken; where only the arguments of `jax.jit` tell of a
        mesh, leave it False, or a GPU gathers whole gradients (a TPU refuses).
      sequential: Update leaves that stack several matrices one after another, so that fewer
        projections are in memory at a time. For layers that are scanned, whose gradients come all
        at once; a whole training step is packed by the compiler in its own way and mostly, but not
        always, needs less: plan both (`apollo_optax.planning`). Leave it False where such leaves
        come one by one, as the experts of layers that are not scanned: their gradients would wait
        for each other.

    Returns:
      A gradient transformation whose state is a `ScaleByApolloState`. Its `update` takes an extra
      argument `first_layer`: with slices of stacked leaves and of their state, the index at which
      the slices start on the leading batch axis, so that each layer keeps its own projection.

    Raises:
      TypeError: An argument of the wrong type, here; a parameter or gradient that is not real
        floating point, or a projection that returns another dtype than float32, at init.
      ValueError: An argument out of range, here; axes that do not fit a parameter, or a projection
        that returns another shape than (rank, dim), at init; gradients that do not match the state,
        at update.

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
    draw = gaussian if projection is None else projection
    settings = _Settings(
        rank,
        update_proj_gap,
        scale,
        granularity,
        b1,
        b2,
        eps,
        norm_growth_limit,
        draw,
        key,
        mu_dtype,
        use_pallas,
        sequential,
    )
    _check_settings(settings)

    def init(params: PyTree) -> ScaleByApolloState:
        count, key_array = jnp.zeros([], jnp.int32), key_data(key)
        named, _ = named_leaves(params)
        if not named:
            # Nothing to train, or the placeholder by which optax.tree_map_params finds the fields
            # of a state that mirror the parameters.
            stored = params if draw is svd else {}
            return ScaleByApolloState(count, key_array, params, params, params, stored)
        _require_real_floating(named)
        if weight_dimension_numbers is None:
            warn_of_unprojected_leaves(params)
        axes = axes_of_each_leaf(weight_dimension_numbers, params)
        leaves = {path: _init_leaf(leaf, axes[path], settings) for path, leaf in named}
        return _gather(count, key_array, leaves)

    def update(
        updates: PyTree,
        state: ScaleByApolloState,
        params: PyTree | None = None,
        *,
        first_layer: ArrayLike = 0,
        **extra_args: Any,
    ) -> tuple[PyTree, ScaleByApolloState]:
        del params, extra_args
        count = optax.safe_increment(state.count)
        named, treedef = named_leaves(updates)
        if not named:
            return updates, state._replace(count=count)
        axes = axes_of_each_leaf(weight_dimension_numbers, updates)
        leaves = {
            path: _leaf_state(state, path, _moment_shape(G.shape, axes[path], rank))
            for path, G in named
        }
        clock = _Clock(state.count, state.key, first_layer)
        scaled, leaves = _update_leaves(dict(named), axes, leaves, clock, settings)
        scaled_tree = jax.tree.unflatten(treedef, [scaled[path] for path, _ in named])
        return scaled_tree, _gather(count, state.key, leaves)

    return optax.GradientTransformationExtraArgs(init, update)


def _norm_of(state: LimitNormGrowthState, path: Path) -> Array:
    try:
        return lookup(state.norm, path)
    except KeyError as error:
        raise ValueError(
            f"The state has no norm for {spell(path)}: init made it for other parameters. Call "
            f"init again or restore one that fits."
        ) from error


def limit_norm_growth(
    limit: ArrayLike = 1.01, *, weight_dimension_numbers: WeightDimensionNumbers = None
) -> optax.GradientTransformationExtraArgs:
    r"""Limits how fast the norm of each leaf's update may grow: APOLLO's limiter, after any
    transformation.

    .. math::
      c = \max(N / (N_{prev} + 10^{-8}), \gamma) / \gamma, \quad U \leftarrow U / c

    where N is the norm of a leaf's update, in float32 (float64 for float64 leaves), and N_prev the
    norm of the last one that was not zero. The first update passes as it is.

    Args:
      limit: gamma, the largest ratio of consecutive norms.
      weight_dimension_numbers: Where given, as in `scale_by_apollo`: matrices are limited, each one
        of a stacked leaf by its own norm, and other leaves pass as they are. None: every leaf is
        limited by its norm.

    Returns:
      A gradient transformation whose state is a `LimitNormGrowthState`.

    Raises:
      TypeError: If `limit` is not a number.
      ValueError: If `limit` is not above 1.

    References:
      Chen et al., Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?, 2024,
      https://arxiv.org/abs/2410.01623

    Example:
      >>> import optax
      >>> from apollo_optax import limit_norm_growth
      >>> tx = optax.chain(optax.scale_by_adam(), limit_norm_growth(1.01), optax.scale(-0.001))
    """
    require_number("limit", limit, above=1)

    def batch_axes_of(tree: PyTree) -> dict[Path, tuple[int, ...]]:
        if weight_dimension_numbers is None:
            return {path: () for path, _ in named_leaves(tree)[0]}
        axes = axes_of_each_leaf(weight_dimension_numbers, tree)
        return {path: matrix.batch for path, matrix in axes.items() if matrix}

    def init(params: PyTree) -> LimitNormGrowthState:
        named, _ = named_leaves(params)
        if not named:
            return LimitNormGrowthState(params)
        _require_real_floating(named)
        leaves = dict(named)
        return LimitNormGrowthState(
            nest(
                (path, jnp.zeros([leaves[path].shape[a] for a in axes], _wide(leaves[path].dtype)))
                for path, axes in batch_axes_of(params).items()
            )
        )

    def update(
        updates: PyTree,
        state: LimitNormGrowthState,
        params: PyTree | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, LimitNormGrowthState]:
        del params, extra_args
        named, treedef = named_leaves(updates)
        if not named:
            return updates, state
        batch = batch_axes_of(updates)
        limited, norms = [], []
        for path, u in named:
            if path in batch:
                inner = tuple(a for a in range(u.ndim) if a not in batch[path])
                norm = _norm(u.astype(_wide(u.dtype)), inner)
                divisor, remembered = limited_norm(norm, _norm_of(state, path), limit)
                u = (u / jnp.expand_dims(divisor, inner)).astype(u.dtype)
                norms.append((path, remembered))
            limited.append(u)
        return jax.tree.unflatten(treedef, limited), LimitNormGrowthState(nest(norms))

    return optax.GradientTransformationExtraArgs(init, update)
