"""Which axes of a leaf make a matrix; products and norms over them that move no axis of G."""

import math
import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from apollo_optax._paths import Path, lookup, named_leaves, nest, spell


class ApolloDimensionNumbers(NamedTuple):
    """Which axes of a weight are its inputs and which its outputs.

    The same specification as `optax.contrib.MuonDimensionNumbers`; a tree of Muon's or GaLore's is
    accepted wherever a tree of these is. Axes named in neither field are batch axes (scanned
    layers, experts): each of their indices is a matrix of its own, with its own projection and its
    own norm.

    Attributes:
      reduction_axis: Axis or axes the layer contracts with its input. Negative axes count from the
        end.
      output_axis: Axis or axes of the layer's output.

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
    """The axes of a leaf, each group by its role in `R = P G`.

    Attributes:
      batch: Axes whose indices are independent matrices, ascending.
      projected: Axes of the smaller side, which P contracts, in the order of P's columns.
      channel: Axes of the larger side, ascending.
    """

    batch: tuple[int, ...]
    projected: tuple[int, ...]
    channel: tuple[int, ...]


def is_dimension_numbers(spec: Any) -> bool:
    """Whether `spec` is Apollo's, Muon's or GaLore's dimension numbers."""
    return hasattr(spec, "reduction_axis") and hasattr(spec, "output_axis")


def _normalized(name: str, axis: Sequence[int] | int, ndim: int, where: str) -> tuple[int, ...]:
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
            f"{where}: {name} must name at least one axis and each once, got {axis!r}."
        )
    return axes


def matrix_axes(spec: Any, shape: tuple[int, ...], path: Path) -> MatrixAxes:
    """Resolves dimension numbers for a leaf of `shape`.

    Raises:
      TypeError: An axis that is not an int.
      ValueError: An axis out of range, named twice, or both reduction and output.
    """
    where = f"weight_dimension_numbers of {spell(path)} with shape {shape}"
    reduction = _normalized("reduction_axis", spec.reduction_axis, len(shape), where)
    output = _normalized("output_axis", spec.output_axis, len(shape), where)
    if both := sorted(set(reduction) & set(output)):
        raise ValueError(
            f"{where}: reduction_axis={spec.reduction_axis!r} and output_axis="
            f"{spec.output_axis!r} overlap in {both}; an axis is one or the other."
        )
    fan_in, fan_out = (math.prod(shape[a] for a in axes) for axes in (reduction, output))
    projected, channel = (reduction, output) if fan_in <= fan_out else (output, reduction)
    batch = tuple(a for a in range(len(shape)) if a not in reduction + output)
    return MatrixAxes(batch, projected, tuple(sorted(channel)))


def _spec_of_each_leaf(weight_dimension_numbers: WeightDimensionNumbers, tree: PyTree) -> PyTree:
    """Nested dictionary of the specification of each leaf, None for a leaf that is not a matrix."""
    if callable(weight_dimension_numbers):
        weight_dimension_numbers = weight_dimension_numbers(tree)
    leaves, _ = named_leaves(tree)
    default = ApolloDimensionNumbers()
    if weight_dimension_numbers is None:
        return nest((path, default if leaf.ndim == 2 else None) for path, leaf in leaves)
    if is_dimension_numbers(weight_dimension_numbers):
        return nest((p, weight_dimension_numbers if leaf.ndim >= 2 else None) for p, leaf in leaves)

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


def _longest_prefix(specs: PyTree, path: Path) -> Any:
    """The specification at `path`, or at the subtree that holds it."""
    for end in range(len(path), -1, -1):
        try:
            spec = lookup(specs, path[:end])
        except KeyError:
            continue
        if spec is None or is_dimension_numbers(spec):
            return spec
    raise ValueError(
        f"weight_dimension_numbers has no entry for {spell(path)}; give one, or None if it is "
        f"trained with Adam."
    )


def axes_of_each_leaf(
    weight_dimension_numbers: WeightDimensionNumbers, tree: PyTree
) -> dict[Path, MatrixAxes | None]:
    """Maps each leaf's path to its matrix axes, or to None where the leaf is not a matrix."""
    specs = _spec_of_each_leaf(weight_dimension_numbers, tree)
    axes: dict[Path, MatrixAxes | None] = {}
    for path, leaf in named_leaves(tree)[0]:
        spec = lookup(specs, path)
        is_matrix = spec is not None and math.prod(leaf.shape) > 0
        axes[path] = matrix_axes(spec, leaf.shape, path) if is_matrix else None
    return axes


def warn_of_unprojected_leaves(tree: PyTree) -> None:
    """Warns of leaves with more than two axes, trained with Adam for want of a specification."""
    for path, leaf in named_leaves(tree)[0]:
        if leaf.ndim > 2:
            moment_bytes = 2 * leaf.size * max(leaf.dtype.itemsize, 4)
            warnings.warn(
                f"{spell(path)} has {leaf.ndim} axes {tuple(leaf.shape)} and is trained with Adam, "
                f"whose moments take {moment_bytes:,} bytes. To project it, pass "
                f"weight_dimension_numbers, for example transformer_dimension_numbers or "
                f"ApolloDimensionNumbers(reduction_axis=-2, output_axis=-1).",
                stacklevel=2,
            )


def side(shape: tuple[int, ...], axes: tuple[int, ...]) -> int:
    """Number of indices of the side that `axes` make."""
    return math.prod(shape[a] for a in axes)


def low_rank_shape(shape: tuple[int, ...], axes: MatrixAxes, rank: int) -> tuple[int, ...]:
    """Shape of R = P G: (*batch, rank, *channel), the rank capped at the smaller side."""
    rank = min(rank, side(shape, axes.projected))
    return (*(shape[a] for a in axes.batch), rank, *(shape[a] for a in axes.channel))


def projection_shape(shape: tuple[int, ...], axes: MatrixAxes, rank: int) -> tuple[int, ...]:
    """Shape of P for every matrix of a leaf: (*batch, rank, m), the rank capped at m."""
    low_rank = low_rank_shape(shape, axes, rank)
    return (*low_rank[: len(axes.batch) + 1], side(shape, axes.projected))


def matrices_of(G: Float[Array, "*leaf"], axes: MatrixAxes) -> Float[Array, "*batch dim channels"]:
    """A leaf as matrices, smaller side first: a copy, for what cannot contract over axes."""
    batch_shape = tuple(G.shape[a] for a in axes.batch)
    moved = jnp.transpose(G, (*axes.batch, *axes.projected, *axes.channel))
    return moved.reshape(*batch_shape, side(G.shape, axes.projected), side(G.shape, axes.channel))


def project(
    P: Float[Array, "*batch rank dim"], G: Float[Array, "*leaf"], axes: MatrixAxes
) -> Float[Array, "..."]:
    """R = P G for every matrix of a leaf, accumulated in float32 or better."""
    batch = len(axes.batch)
    projected_shape = tuple(G.shape[a] for a in axes.projected)
    dtype = jnp.promote_types(G.dtype, P.dtype)
    return jax.lax.dot_general(
        P.reshape(*P.shape[: batch + 1], *projected_shape).astype(dtype),
        G.astype(dtype),
        (
            (tuple(range(batch + 1, batch + 1 + len(axes.projected))), axes.projected),
            (tuple(range(batch)), axes.batch),
        ),
        preferred_element_type=dtype,
    )


def sum_of_squares_per_channel(G: Float[Array, "*leaf"], axes: MatrixAxes) -> Float[Array, "..."]:
    """Squared norm of every channel of G, in float32 or better."""
    squares = jnp.square(G.astype(jnp.promote_types(G.dtype, jnp.float32)))
    return _batch_first(jnp.sum(squares, axis=axes.projected), axes)


def _kept_axes(axes: MatrixAxes) -> tuple[int, ...]:
    return (*axes.batch, *axes.channel)


def _batch_first(x: Float[Array, "..."], axes: MatrixAxes) -> Float[Array, "..."]:
    """Orders the axes that a sum over the projected axes leaves, as `low_rank_shape` does."""
    kept = _kept_axes(axes)
    position = {axis: i for i, axis in enumerate(sorted(kept))}
    return jnp.transpose(x, tuple(position[axis] for axis in kept))


def broadcast_to_leaf(factor: Float[Array, "..."], axes: MatrixAxes) -> Float[Array, "*leaf"]:
    """Gives a factor per channel or matrix the leaf's axes, of size 1 where it is constant."""
    kept = _kept_axes(axes)
    factor = factor.reshape(factor.shape + (1,) * (len(kept) - factor.ndim))
    order = sorted(range(len(kept)), key=kept.__getitem__)
    return jnp.expand_dims(jnp.transpose(factor, order), axes.projected)


_DENSE_GENERAL = {
    "query": ApolloDimensionNumbers(-3, (-2, -1)),
    "key": ApolloDimensionNumbers(-3, (-2, -1)),
    "value": ApolloDimensionNumbers(-3, (-2, -1)),
    "out": ApolloDimensionNumbers((-3, -2), -1),
}
_DENSE = ApolloDimensionNumbers(-2, -1)
_KERNELS = ("kernel", "wi", "wi_0", "wi_1", "wo")
_EMBEDDINGS = (
    "embed",
    "embedding",
    "embeddings",
    "embed_tokens",
    "token_embed",
    "position_embed",
    "wte",
    "wpe",
)
_HEADS = ("head", "lm_head", "logits", "logits_dense", "unembed", "unembedding", "classifier")


def transformer_dimension_numbers(params: PyTree, *, project_embeddings: bool = False) -> PyTree:
    """Finds the matrices of a transformer by the names Flax gives them.

    - `kernel` of Dense and of scanned or expert Dense, (..., in, out): the last two axes are the
      matrix, all others batch axes; likewise mixture-of-experts weights named `wi`, `wi_0`, `wi_1`,
      `wo`.
    - `kernel` of DenseGeneral in attention: `query`, `key`, `value` (..., embed, heads, head_dim)
      and `out` (..., heads, head_dim, embed). Three axes that do not fit together as attention
      kernels (`out` against `query`) are taken for scanned Dense kernels of those names.
    - Embeddings, output heads, convolutions, biases and norms are left to Adam, as in the paper.

    Args:
      params: Parameters, bare or boxed; arrays or ShapeDtypeStructs.
      project_embeddings: Project embedding tables (vocabulary, embed) and output heads too. Beyond
        the paper: no full-size moments are left in the optimizer state.

    Returns:
      A tree of `params`' structure with `ApolloDimensionNumbers`, or None for a leaf left to Adam.
      Pass it, or this function itself, as `weight_dimension_numbers`.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"mlp": {"kernel": jnp.zeros((12, 64, 256)), "bias": jnp.zeros((12, 256))}}
      >>> transformer_dimension_numbers(params)["mlp"]
      {'bias': None, 'kernel': ApolloDimensionNumbers(reduction_axis=-2, output_axis=-1)}
    """
    named, treedef = named_leaves(params)
    leaves = dict(named)
    specs = [_transformer_spec(path, leaves, project_embeddings) for path in leaves]
    return jax.tree.unflatten(treedef, specs)


def _transformer_spec(
    path: Path, leaves: dict[Path, Any], project_embeddings: bool
) -> ApolloDimensionNumbers | None:
    leaf, name = leaves[path], path[-1] if path else ""
    module = path[-2] if len(path) > 1 else ""
    if leaf.ndim < 2:
        return None
    is_head = any(part in _HEADS for part in path) or path in (
        ("output", "kernel"),
        ("params", "output", "kernel"),
    )
    if is_head or name == "embedding" or any(part in _EMBEDDINGS for part in path[:-1]):
        return _DENSE if project_embeddings and name in ("embedding", "kernel") else None
    if name not in _KERNELS or module.lower().startswith("conv"):
        return None
    if module in _DENSE_GENERAL and leaf.ndim > 2 and _is_dense_general(path[:-2], leaves):
        return _DENSE_GENERAL[module]
    return _DENSE


def _is_dense_general(attention: Path, leaves: dict[Path, Any]) -> bool:
    query, out = (leaves.get((*attention, name, "kernel")) for name in ("query", "out"))
    if query is None or out is None or query.ndim < 3 or out.ndim < 3:
        return True
    return query.shape[-2:] == out.shape[-3:-1]
