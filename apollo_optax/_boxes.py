"""Axis names of Flax's boxed parameters, carried over to the state that is kept of them.

Flax shards what its boxes hold by the names in them: `nnx.get_partition_spec` and Linen's
`get_sharding` replicate a bare array. Flax is not imported: boxes are told by their methods.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, PyTree

from apollo_optax._matrices import MatrixAxes
from apollo_optax._paths import Path, named_leaves

_METADATA = ("out_sharding", "optimizer_sharding")  # of an `nnx.Variable`

Names = tuple[Any, ...]


def with_axis_names(state: Any, params: PyTree, axes: dict[Path, MatrixAxes | None]) -> Any:
    """Puts the arrays of a `ScaleByApolloState` into boxes like their parameter's.

    Batch and channel axes keep the parameter's names, and the rank axis has none. A name of the
    projected side goes to a channel axis without one, if any count that divides the old axis
    divides the new one too.

    Args:
      state: Its arrays bare.
      params: Boxed or bare. Where they are bare, or have no names, the state stays bare.
      axes: Of each parameter.
    """
    named, _ = named_leaves(params, is_leaf=lambda node: bool(_names_of(node)))
    boxes = {path: box for path, box in named if path in axes and _names_of(box)}

    def boxed(field: str) -> PyTree:
        named, treedef = named_leaves(getattr(state, field))
        return treedef.unflatten(
            _box(boxes[path], leaf, field, axes[path]) if path in boxes else leaf
            for path, leaf in named
        )

    return state._replace(**{field: boxed(field) for field in ("mu", "nu", "norm", "projection")})


def _names_of(node: Any) -> dict[str, Names | PartitionSpec]:
    """The axis names that a box holds, by the attribute that holds them; of other nodes none."""
    if hasattr(node, "replace_boxed"):  # Linen's `Partitioned`
        held = {"names": getattr(node, "names", None)}
    elif hasattr(node, "get_metadata"):  # an `nnx.Variable`
        held = {name: node.get_metadata(name, None) for name in _METADATA}
    else:
        held = {}
    return {key: names for key, names in held.items() if isinstance(names, tuple | PartitionSpec)}


def _box(box: Any, leaf: Array, field: str, axes: MatrixAxes | None) -> Any:
    (parameter,) = jax.tree.leaves(box)
    named = {}
    for key, names in _names_of(box).items():
        names_of_field = _names_of_field(field, tuple(names), jnp.shape(parameter), axes)
        as_given = PartitionSpec if isinstance(names, PartitionSpec) else lambda *names: names
        named[key] = as_given(*names_of_field)
    return box.replace(value=leaf, **named)


def _names_of_field(
    field: str, names: Names, shape: tuple[int, ...], axes: MatrixAxes | None
) -> Names:
    names = (*names, *[None] * (len(shape) - len(names)))
    if field in ("mu", "nu"):
        return names if axes is None else _names_of_moments(names, shape, axes)
    if axes is None:
        return names[:1] if len(shape) > 1 else ()
    whole = 2 if field == "projection" else 0
    return (*(names[a] for a in axes.batch), *[None] * whole)


def _names_of_moments(names: Names, shape: tuple[int, ...], axes: MatrixAxes) -> Names:
    channel = {axis: names[axis] for axis in axes.channel}
    for old in axes.projected:
        free = (a for a in channel if channel[a] is None and shape[a] % shape[old] == 0)
        if names[old] is not None and (new := next(free, None)) is not None:
            channel[new] = names[old]
    return (*(names[a] for a in axes.batch), None, *channel.values())
