"""The state of each leaf, and the update rules of leaves that are not matrices."""

import warnings
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, PyTree, UInt32

from apollo_optax._arguments import require_number, require_one_of, require_static, wide
from apollo_optax._matrices import MatrixAxes, low_rank_shape, projection_shape, without_overflow
from apollo_optax._paths import Path, named_leaves, nest, spell
from apollo_optax._placement import (
    matrices_placement,
    moments_placement,
    placement_of,
    placement_without,
)

Vocabulary = Literal["adam", "factored", "factored_momentum"]
# The threshold of Adafactor. The moments of a leaf with fewer indices are small.
FACTORED_SIDE = 128
# With fewer weights, leaves take a few megabytes of state at most.
MANY_WEIGHTS = 1 << 20
_CHILD = "array"


class ScaleByApolloState(NamedTuple):
    """The state of `scale_by_apollo`, arrays in plain dictionaries nested by the parameters' names.

    If a parameter is in a Flax box with axis names, its arrays here are boxed too, each with the
    names of its own axes.

    Some entries are only zeros. The dictionaries need them to fit the parameters, as
    `optax.tree_map_params` requires.

    Attributes:
      count: The number of steps taken, an int32 scalar.
      key: The uint32 data of the PRNG key from which every projection is redrawn.
      mu: The first moment, float32 (float64 for float64 leaves) unless `mu_dtype` is given. For a
        matrix: of the projected gradient, `(*batch, min(rank, m), *channel)`. For any other leaf:
        of the gradient, in the leaf's shape. For a factored leaf without a first moment: zeros, one
        for each index before the last two axes.
      nu: The second moment, in the shape of `mu`, float32 or float64. For a leaf whose second
        moment is factored: its mean over the last axis.
      norm: The norm of a matrix's last update that was not zero, `(*batch,)`, and 0 before the
        first. For a leaf whose second moment is factored: its mean over the last axis but one. For
        any other leaf: zeros, one for each index of the leaf's first axis (one in all if the leaf
        has a single axis).
      projection: With `svd`, or another projection that keeps state, the P in use,
        `(*batch, min(rank, m), m)`, and zeros as in `norm` for other leaves. Otherwise empty.
    """

    count: Int[Array, ""]  # type: ignore[assignment]  # tuple has a method of this name
    key: UInt32[Array, "..."]
    mu: PyTree
    nu: PyTree
    norm: PyTree
    projection: PyTree = {}  # noqa: RUF012


class LeafState(NamedTuple):
    """The state of one leaf, `mu`, `nu` and `norm` as in `ScaleByApolloState`.

    The fields may also hold the shape or the placement of each array.
    """

    mu: Any
    nu: Any
    norm: Any


@jax.tree_util.register_pytree_node_class
class Hyperparameters(NamedTuple):
    """The hyperparameters of `scale_by_apollo`; numbers are constants of the program."""

    b1: ArrayLike
    b2: ArrayLike
    eps: ArrayLike
    scale: ArrayLike
    norm_growth_limit: ArrayLike | None

    def tree_flatten(self) -> tuple[list[Any], tuple[Any, ...]]:
        """Arrays are children; None and Python's numbers are structure."""
        structure = tuple(x if isinstance(x, float | int | None) else _CHILD for x in self)
        return [x for x in self if not isinstance(x, float | int | None)], structure

    @classmethod
    def tree_unflatten(cls, structure: tuple[Any, ...], children: Any) -> "Hyperparameters":
        """The inverse."""
        arrays = iter(children)
        return cls(*(next(arrays) if x is _CHILD else x for x in structure))


def checked(hyper: Hyperparameters) -> Hyperparameters:
    """Returns scalars; a TypeError or ValueError names the first hyperparameter out of range."""
    b1, b2, eps, scale, norm_growth_limit = hyper
    require_number("b1", b1, at_least=0, below=1, precise=True)
    require_number("b2", b2, at_least=0, below=1, precise=True)
    require_number("eps", eps, above=0, precise=True)
    require_number("scale", scale, above=0)
    if norm_growth_limit is not None:
        require_number("norm_growth_limit", norm_growth_limit, above=1, precise=True)
    # A product with a narrower scalar would be as narrow as the scalar, and with NumPy's float64,
    # which is one of Python's floats, as wide.
    values: list[Any] = [float(x) if isinstance(x, float) else x for x in hyper]
    hyper = Hyperparameters(*values)
    return jax.tree.map(lambda x: jnp.asarray(x, wide(jnp.asarray(x).dtype)), hyper)


@jax.jit
def adam_update(
    g: Float[Array, "*leaf"],
    state: LeafState,
    t: Int[Array, ""],
    hyper: Hyperparameters,
) -> tuple[Float[Array, "*leaf"], LeafState]:
    """Takes one step of Adam (Kingma and Ba, 2015), for a leaf that is not a matrix.

    A finite entry whose square overflows counts as zero: its second moment would stay infinite.
    """
    b1, b2, eps, *_ = hyper
    in_float32 = g.astype(wide(g.dtype))
    in_float32 = jnp.where(jnp.isfinite(g), without_overflow(in_float32), in_float32)
    mu, nu = moments(in_float32, state.mu, state.nu, hyper)
    update = mu / (1 - b1**t) / (jnp.sqrt(nu / (1 - b2**t)) + eps)
    mu, nu = mu.astype(state.mu.dtype), nu.astype(state.nu.dtype)
    return jnp.asarray(update, g.dtype), LeafState(mu, nu, state.norm)


@jax.jit
def factored_update(
    g: Float[Array, "*leaf"],
    state: LeafState,
    t: Int[Array, ""],
    hyper: Hyperparameters,
) -> tuple[Float[Array, "*leaf"], LeafState]:
    """Takes one step of Adam with a second moment of rank 1 (Shazeer and Stern, 2018).

    The step has no first moment if the state has none.
    """
    b1, b2, eps, *_ = hyper
    in_float32 = without_overflow(g.astype(wide(g.dtype)))
    squares = jnp.square(in_float32)
    rows = jnp.asarray(b2 * state.nu + (1 - b2) * jnp.mean(squares, axis=-1))
    columns = jnp.asarray(b2 * state.norm + (1 - b2) * jnp.mean(squares, axis=-2))
    mean = jnp.mean(rows, axis=-1, keepdims=True)
    of_rows = jnp.sqrt(rows / jnp.where(mean > 0, mean, 1))
    root = of_rows[..., :, None] * jnp.sqrt(columns / (1 - b2**t))[..., None, :]
    mu, direction = state.mu, in_float32
    if mu.shape == g.shape:
        mu = jnp.asarray(b1 * mu.astype(in_float32.dtype) + (1 - b1) * in_float32)
        direction = mu / (1 - b1**t)
    kept = LeafState(
        mu.astype(state.mu.dtype), rows.astype(state.nu.dtype), columns.astype(state.norm.dtype)
    )
    return jnp.asarray(direction / (root + eps), g.dtype), kept


def moments(x: Array, mu: Array, nu: Array, hyper: Hyperparameters) -> tuple[Array, Array]:
    """Returns both moments after a step with x."""
    mu = jnp.asarray(hyper.b1 * mu.astype(x.dtype) + (1 - hyper.b1) * x)
    nu = jnp.asarray(hyper.b2 * nu + (1 - hyper.b2) * jnp.square(x))
    return mu, nu


def others_update(
    g: Float[Array, "*leaf"], state: LeafState, t: Int[Array, ""], hyper: Hyperparameters
) -> tuple[Float[Array, "*leaf"], LeafState]:
    """Takes one step of a leaf that is not a matrix, by the rule that its state belongs to."""
    rule = adam_update if state.nu.shape == g.shape else factored_update
    return rule(g, state, t, hyper)


def require_vocabulary(vocabulary: Any) -> None:
    """Raises ValueError unless `vocabulary` names a rule."""
    require_one_of("vocabulary", vocabulary, get_args(Vocabulary))


def require_mu_dtype(mu_dtype: Any) -> None:
    """Raises TypeError unless `mu_dtype` is None or a floating dtype with float32's range."""
    allowed = "None or a floating dtype with the range of float32, such as bfloat16"
    require_static("mu_dtype", mu_dtype, allowed)
    if mu_dtype is None:
        return
    is_floating = jnp.issubdtype(mu_dtype, jnp.floating)
    if not is_floating or float(jnp.finfo(mu_dtype).max) < 1e38:
        raise TypeError(
            f"mu_dtype must be {allowed}, got {mu_dtype!r}."
            + (" A moment could overflow, and small ones would be zero." if is_floating else "")
        )


def is_full_size(shape: tuple[int, ...], axes: MatrixAxes | None) -> bool:
    """Whether Adam's moments of a leaf are large: as a rule, an embedding table or a head."""
    return axes is None and len(shape) > 1 and min(shape[-2:]) >= FACTORED_SIDE


def warn_of_whole_moments(
    named: list[tuple[Path, Any]], axes: dict[Path, MatrixAxes | None], vocabulary: Vocabulary
) -> None:
    """Warns once if no leaf is a matrix, or if leaves too narrow to be factored are large."""
    weights = sum(leaf.size for _, leaf in named)
    if vocabulary == "adam" and not any(axes.values()) and weights >= MANY_WEIGHTS:
        path, leaf = max(named, key=lambda item: item[1].size)
        warnings.warn(
            f"No leaf is a matrix: all {weights:,} weights, such as {spell(path)} "
            f"{tuple(leaf.shape)}, keep Adam's two moments, and no memory is saved. Give the "
            f"matrices dimension numbers, for example with infer_dimension_numbers. "
            f"optax.flatten makes one vector of all matrices, so leave it out.",
            stacklevel=4,
        )
    left = [
        (path, leaf)
        for path, leaf in named
        if axes[path] is None and leaf.ndim > 1 and not is_full_size(leaf.shape, None)
    ]
    size = sum(leaf.size for _, leaf in left)
    if vocabulary == "adam" or size < MANY_WEIGHTS:
        return
    path, leaf = max(left, key=lambda item: item[1].size)
    warnings.warn(
        f"vocabulary={vocabulary!r} applies to leaves with {FACTORED_SIDE} indices or more on each "
        f"of the last two axes. Narrower leaves such as {spell(path)} {tuple(leaf.shape)} have "
        f"{size:,} weights together and keep Adam's two moments. To keep less, give these leaves "
        f"dimension numbers, so that they are projected.",
        stacklevel=4,
    )


def state_shapes(
    shape: tuple[int, ...], axes: MatrixAxes | None, rank: int, vocabulary: Vocabulary
) -> LeafState:
    """Returns the shapes of a leaf's state; a matrix at rank 0 has only zeros."""
    if axes is not None:
        low_rank = low_rank_shape(shape, axes, rank)
        of_each = low_rank[: len(axes.batch)]
        of_moments = low_rank if rank else of_each
        return LeafState(of_moments, of_moments, of_each)
    if vocabulary == "adam" or not is_full_size(shape, axes):
        return LeafState(shape, shape, shape[:1] if len(shape) > 1 else ())
    first = shape if vocabulary == "factored_momentum" else shape[:-2]
    return LeafState(first, shape[:-1], (*shape[:-2], shape[-1]))


def init_leaf(
    leaf: Any, axes: MatrixAxes | None, rank: int, mu_dtype: Any, vocabulary: Vocabulary
) -> LeafState:
    """Returns zeros of `state_shapes`, placed as the leaf's own placement requires."""
    dtype = wide(leaf.dtype)
    shapes = state_shapes(leaf.shape, axes, rank, vocabulary)
    if vocabulary == "factored_momentum" and is_full_size(leaf.shape, axes):
        mu_dtype = mu_dtype or jnp.bfloat16
    mu, nu, norm = (
        jnp.zeros(shape, of_field, device=device)
        for shape, of_field, device in zip(
            shapes, (mu_dtype or dtype, dtype, dtype), _placements(leaf, axes, shapes), strict=True
        )
    )
    return LeafState(mu, nu, norm)


def _placements(leaf: Any, axes: MatrixAxes | None, shapes: LeafState) -> LeafState:
    """Returns the placements of the arrays of these shapes."""
    on_mesh = placement_of(leaf)
    of_each = matrices_placement(on_mesh, leaf.shape, _each_of(leaf, axes))
    of_moments = moments_placement(on_mesh, leaf.shape, axes)
    if axes is None and shapes.nu != leaf.shape:
        rows, columns, neither = (
            placement_without(on_mesh, leaf.ndim, left) for left in ((-1,), (-2,), (-1, -2))
        )
        return LeafState(of_moments if shapes.mu == leaf.shape else neither, rows, columns)
    if axes is not None and shapes.mu == shapes.norm:
        of_moments = of_each
    return LeafState(of_moments, of_moments, of_each)


def _each_of(leaf: Any, axes: MatrixAxes | None) -> MatrixAxes:
    """Returns the axes of a leaf's matrices, or the first axis of another leaf, as batch axes."""
    return axes or MatrixAxes((0,) if leaf.ndim > 1 else (), (), ())


def no_projection(leaf: Any, axes: MatrixAxes | None, rank: int) -> Array:
    """Returns zeros in the shape of the P of every matrix of a leaf."""
    each = _each_of(leaf, axes)
    whole = () if axes is None else projection_shape(leaf.shape, axes, rank)[-2:]
    device = matrices_placement(placement_of(leaf), leaf.shape, each, whole=len(whole))
    shape = (*(leaf.shape[a] for a in each.batch), *whole)
    return jnp.zeros(shape, jnp.float32, device=device)


def nested(
    count: Array, key: Array, leaves: dict[Path, LeafState], stored: dict[Path, Array]
) -> ScaleByApolloState:
    """Returns the state whose dictionaries hold the state of each leaf."""
    mu, nu, norm = (
        nest((path, getattr(leaf, field)) for path, leaf in leaves.items())
        for field in LeafState._fields
    )
    return ScaleByApolloState(count, key, mu, nu, norm, nest(stored.items()))


def require_state_of(state: Any, named: list[tuple[Path, Array]], stores_projections: bool) -> None:
    """Raises ValueError unless the state belongs to this transformation and to these leaves."""
    remedy = "Call init, or restore into what init returns."
    if not isinstance(state, ScaleByApolloState):
        raise ValueError(
            f"The state must be a ScaleByApolloState, got a "
            f"{type(state).__name__}: {state!r:.60}. {remedy}"
        )
    has_projections = bool(jax.tree.leaves(state.projection))
    if named and has_projections is not stores_projections:
        kept, given = ("keeps", "has none") if stores_projections else ("does not keep", "has some")
        raise ValueError(
            f"The state is of another projection: this transformation {kept} projections in its "
            f"state, and the given state {given}. {remedy}"
        )
    has_gradient = {path for path, _ in named}
    has_moments = {path for path, _ in named_leaves(state.mu)[0]}
    if has_gradient < has_moments:
        path = spell(min(has_moments - has_gradient))
        raise ValueError(
            f"The state has moments for {path}, which has no gradient (it is None or left out). To "
            f"keep the state, give a gradient of zeros. To train without {path}, leave it out of "
            f"init too, for example with optax.masked or optax.partition."
        )


def leaf_state(of_field: dict[str, dict[Path, Array]], path: Path, needed: LeafState) -> LeafState:
    """Returns the state of the leaf at `path`; ValueError unless it has the needed shapes."""
    found: dict[str, Any] = {}
    for field, shape_needed in needed._asdict().items():
        found[field] = of_field[field].get(path)
        shape_found = getattr(found[field], "shape", None)
        if shape_found != shape_needed:
            name = "norm" if field == "norm" else "moments"
            given = f"no {name}" if shape_found is None else f"{name} of shape {shape_found}"
            raise ValueError(
                f"The state has {given} for {spell(path)}, whose gradient needs {shape_needed}: "
                f"init made it for other parameters, rank or axes. Call init again, or restore a "
                f"state that fits."
            )
    return LeafState(**found)
