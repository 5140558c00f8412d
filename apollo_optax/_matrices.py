"""Which axes of a leaf make a matrix, and products and norms over them without moving axes of G."""

import math
import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from apollo_optax._paths import Path, lookup, named_arrays, named_leaves, nest, spell

_LONGEST_STACK = 127


class ApolloDimensionNumbers(NamedTuple):
    """Which axes of a weight are inputs and which are outputs.

    The specification is the same as `optax.contrib.MuonDimensionNumbers`. A tree of Muon's or
    GaLore's dimension numbers is accepted wherever a tree of these is. Axes that neither field
    names are batch axes, such as scanned layers and experts. Each index of the batch axes is a
    matrix of its own, with its own projection and its own norm.

    Attributes:
      reduction_axis: The axis or axes that the layer contracts with its input. Negative axes count
        from the end.
      output_axis: The axis or axes of the layer's output.

    Example:
      A query kernel of shape (embed, heads, head_dim), and a stack of dense kernels (layers, in,
      out):

      >>> query = ApolloDimensionNumbers(reduction_axis=0, output_axis=(1, 2))
      >>> stacked = ApolloDimensionNumbers(reduction_axis=-2, output_axis=-1)
    """

    reduction_axis: Sequence[int] | int = 0
    output_axis: Sequence[int] | int = 1


WeightDimensionNumbers: TypeAlias = ApolloDimensionNumbers | Any | Callable[[PyTree], PyTree] | None


class MatrixAxes(NamedTuple):
    """The axes of a leaf, grouped by their role in `R = P G`.

    Attributes:
      batch: The axes whose indices are independent matrices, ascending.
      projected: The axes of the smaller side, which P contracts, in the order of P's columns.
      channel: The axes of the larger side, ascending.
      reduction: The side that the layer contracts with its input, `projected` or `channel`.
    """

    batch: tuple[int, ...]
    projected: tuple[int, ...]
    channel: tuple[int, ...]
    reduction: tuple[int, ...] = ()


def is_dimension_numbers(spec: Any) -> bool:
    """Whether `spec` is Apollo's, Muon's or GaLore's dimension numbers."""
    return hasattr(spec, "reduction_axis") and hasattr(spec, "output_axis")


def _normalized(name: str, axis: Any, ndim: int, where: str) -> tuple[int, ...]:
    try:
        axes = tuple(operator.index(a) for a in (axis if isinstance(axis, Sequence) else (axis,)))
    except TypeError as error:
        raise TypeError(
            f"{where}: {name} must be an int or a sequence of ints, got {axis!r}."
        ) from error
    for a in axes:
        if not -ndim <= a < ndim:
            raise ValueError(
                f"{where}: {name}={axis!r} is out of range; allowed are {-ndim} to {ndim - 1}."
            )
    axes = tuple(a % ndim for a in axes)
    if not axes or len(set(axes)) != len(axes):
        raise ValueError(
            f"{where}: {name} must name at least one axis, and each axis once, got {axis!r}."
        )
    return axes


def matrix_axes(spec: Any, shape: tuple[int, ...], path: Path) -> MatrixAxes:
    """Resolves dimension numbers for a leaf of `shape`.

    Raises:
      TypeError: If an axis is not an int.
      ValueError: If an axis is out of range, named twice, or both reduction and output.
    """
    where = f"weight_dimension_numbers of {spell(path)} with shape {shape}"
    reduction = _normalized("reduction_axis", spec.reduction_axis, len(shape), where)
    output = _normalized("output_axis", spec.output_axis, len(shape), where)
    if both := sorted(set(reduction) & set(output)):
        raise ValueError(
            f"{where}: reduction_axis={spec.reduction_axis!r} and output_axis="
            f"{spec.output_axis!r} overlap in {both}; name each axis in one of the two."
        )
    fan_in, fan_out = (math.prod(shape[a] for a in axes) for axes in (reduction, output))
    projected, channel = (reduction, output) if fan_in <= fan_out else (output, reduction)
    batch = tuple(a for a in range(len(shape)) if a not in reduction + output)
    return MatrixAxes(batch, projected, tuple(sorted(channel)), reduction)


def _spec_of_each_leaf(weight_dimension_numbers: WeightDimensionNumbers, tree: PyTree) -> PyTree:
    """Returns nested dictionaries of the specifications, None for leaves that are no matrices."""
    # A tree may be callable too: a module of Equinox or Flax NNX with specifications as its leaves.
    if callable(weight_dimension_numbers) and jax.tree_util.all_leaves([weight_dimension_numbers]):
        weight_dimension_numbers = weight_dimension_numbers(tree)
    leaves, _ = named_arrays(tree)
    if is_dimension_numbers(weight_dimension_numbers):
        spec, vectors = weight_dimension_numbers, stacked_vectors(leaves)
        return nest(
            (path, spec if leaf.ndim >= 2 and path not in vectors else None)
            for path, leaf in leaves
        )
    if hasattr(weight_dimension_numbers, "ndim"):
        raise TypeError(
            f"weight_dimension_numbers must be dimension numbers, a tree of them, a function of "
            f"the parameters or None, got {weight_dimension_numbers!r}. With "
            f"optax.inject_hyperparams, name weight_dimension_numbers in static_args."
        )

    def is_spec(node: Any) -> bool:
        return node is None or is_dimension_numbers(node)

    specs, _ = named_leaves(weight_dimension_numbers, is_leaf=is_spec)
    for path, spec in specs:
        if not is_spec(spec):
            raise TypeError(
                f"weight_dimension_numbers has {spec!r} at {spell(path)}; allowed are "
                f"ApolloDimensionNumbers, Muon's or GaLore's, and None for a leaf left to Adam."
            )
    given = nest(specs)
    return nest((path, _longest_prefix(given, path)) for path, _ in leaves)


def stacked_vectors(leaves: list[tuple[Path, Any]]) -> set[Path]:
    """Finds norms and biases of stacked layers, (layers, features), which look like matrices.

    Such a leaf is in a subtree whose leaves all have the same first axis, and some of these leaves
    have two axes after the first. A square matrix may be beside a leaf (d, 3, d) too, and the
    number of layers tells it from a vector: a longer stack than `_LONGEST_STACK` is not found.
    """
    under: dict[Path, list[tuple[Path, Any]]] = {}
    for path, leaf in leaves:
        for end in range(len(path)):
            under.setdefault(path[:end], []).append((path, leaf))
    vectors: set[Path] = set()
    for subtree in under.values():
        first_axes = {leaf.shape[:1] for _, leaf in subtree}
        is_stack = len(first_axes) == 1 and max(first_axes) <= (_LONGEST_STACK,)
        if is_stack and max(leaf.ndim for _, leaf in subtree) > 2:
            vectors |= {path for path, leaf in subtree if leaf.ndim == 2}
    return vectors


def _longest_prefix(specs: PyTree, path: Path) -> Any:
    """Returns the specification at `path`, or at the subtree that holds the leaf."""
    # Beside None, the attribute `value` of a module is not taken for the accessor of a box.
    for prefix in ((*path, "value"), *(path[:end] for end in range(len(path), -1, -1))):
        try:
            spec = lookup(specs, prefix)
        except KeyError:
            continue
        if spec is None or is_dimension_numbers(spec):
            return spec
    raise ValueError(
        f"weight_dimension_numbers has no entry for {spell(path)}; add dimension numbers, or None "
        f"to train the leaf with Adam."
    )


def axes_of_each_leaf(
    weight_dimension_numbers: WeightDimensionNumbers, tree: PyTree, *, quiet: bool = False
) -> dict[Path, MatrixAxes | None]:
    """Maps each leaf's path to its matrix axes, or to None where the leaf is not a matrix.

    A function of the parameters should warn once, when a state is made. `quiet` silences it after
    that.
    """
    if quiet:
        with warnings.catch_warnings(action="ignore"):
            return axes_of_each_leaf(weight_dimension_numbers, tree)
    specs = _spec_of_each_leaf(weight_dimension_numbers, tree)
    axes: dict[Path, MatrixAxes | None] = {}
    for path, leaf in named_arrays(tree)[0]:
        spec = lookup(specs, path)
        is_matrix = spec is not None and math.prod(leaf.shape) > 0
        axes[path] = matrix_axes(spec, leaf.shape, path) if is_matrix else None
    return axes


def side(shape: tuple[int, ...], axes: tuple[int, ...]) -> int:
    """Returns the number of indices of the side that `axes` make."""
    return math.prod(shape[a] for a in axes)


def low_rank_shape(shape: tuple[int, ...], axes: MatrixAxes, rank: int) -> tuple[int, ...]:
    """Returns the shape of R = P G, (*batch, rank, *channel), with a rank of at most m."""
    rank = min(rank, side(shape, axes.projected))
    return (*(shape[a] for a in axes.batch), rank, *(shape[a] for a in axes.channel))


def projection_shape(shape: tuple[int, ...], axes: MatrixAxes, rank: int) -> tuple[int, ...]:
    """Returns the shape of P for all matrices of a leaf, (*batch, rank, m), the rank at most m."""
    low_rank = low_rank_shape(shape, axes, rank)
    return (*low_rank[: len(axes.batch) + 1], side(shape, axes.projected))


def matrices_of(G: Float[Array, "*leaf"], axes: MatrixAxes) -> Float[Array, "*batch dim channels"]:
    """Returns a leaf as matrices, smaller side first, for what cannot contract over axes."""
    batch_shape = tuple(G.shape[a] for a in axes.batch)
    moved = jnp.transpose(G, (*axes.batch, *axes.projected, *axes.channel))
    return moved.reshape(*batch_shape, side(G.shape, axes.projected), side(G.shape, axes.channel))


def leaf_of(
    matrices: Float[Array, "*batch dim channels"], shape: tuple[int, ...], axes: MatrixAxes
) -> Float[Array, "*leaf"]:
    """Returns the leaf of `shape`; the inverse of `matrices_of`."""
    order = (*axes.batch, *axes.projected, *axes.channel)
    moved = matrices.reshape(tuple(shape[a] for a in order))
    return jnp.transpose(moved, sorted(range(len(order)), key=order.__getitem__))


def project(
    P: Float[Array, "*batch rank dim"], G: Float[Array, "*leaf"], axes: MatrixAxes
) -> Float[Array, "..."]:
    """Returns R = P G for every matrix of a leaf, accumulated in float32 or better.

    If G is bfloat16 or float16, P is rounded to its dtype, so that both factors have one dtype.
    """
    batch = len(axes.batch)
    projected_shape = tuple(G.shape[a] for a in axes.projected)
    accumulated = jnp.promote_types(G.dtype, P.dtype)
    dtype = G.dtype if G.dtype.itemsize < P.dtype.itemsize else accumulated
    return jax.lax.dot_general(
        P.reshape(*P.shape[: batch + 1], *projected_shape).astype(dtype),
        G.astype(dtype),
        (
            (tuple(range(batch + 1, batch + 1 + len(axes.projected))), axes.projected),
            (tuple(range(batch)), axes.batch),
        ),
        preferred_element_type=accumulated,
    )


def without_overflow(R: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Replaces entries whose squares could not be summed, or that are not finite, by zero."""
    largest = 1e-4 * float(jnp.finfo(R.dtype).max) ** 0.5
    return jnp.where(jnp.abs(R) <= largest, R, 0)


def sum_of_squares_per_channel(G: Float[Array, "*leaf"], axes: MatrixAxes) -> Float[Array, "..."]:
    """Returns the squared norm of every channel of G, in float32 or better."""
    squares = jnp.square(G.astype(jnp.promote_types(G.dtype, jnp.float32)))
    return _batch_first(jnp.sum(squares, axis=axes.projected), axes)


def _kept_axes(axes: MatrixAxes) -> tuple[int, ...]:
    return (*axes.batch, *axes.channel)


def _batch_first(x: Float[Array, "..."], axes: MatrixAxes) -> Float[Array, "..."]:
    """Orders the axes that remain after a sum over the projected axes as `low_rank_shape` does."""
    kept = _kept_axes(axes)
    position = {axis: i for i, axis in enumerate(sorted(kept))}
    return jnp.transpose(x, tuple(position[axis] for axis in kept))


def expand_to_leaf(factor: Float[Array, "..."], axes: MatrixAxes) -> Float[Array, "..."]:
    """Brings factors `(*batch, 1, *channel)` into the order of a leaf's axes, to broadcast."""
    factor = jnp.squeeze(factor, len(axes.batch))
    kept = _kept_axes(axes)
    order = sorted(range(len(kept)), key=kept.__getitem__)
    return jnp.expand_dims(jnp.transpose(factor, order), axes.projected)
