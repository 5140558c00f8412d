"""Carries the axis names of Flax's boxed parameters over to the optimizer state.

Flax shards the content of a box by the names in the box: `nnx.get_partition_spec` and Linen's
`get_sharding` replicate a bare array. This module recognizes boxes by their methods, and does not
import Flax.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from apollo_optax._matrices import MatrixAxes
from apollo_optax._paths import Path, named_leaves
from apollo_optax._placement import moments_placement

# Metadata of an `nnx.Variable`. MaxText copies its names to the old key too, which Flax prefers.
_METADATA = ("out_sharding", "optimizer_sharding", "sharding_names")

Names = tuple[Any, ...]


def with_axis_names(state: Any, params: PyTree, axes: dict[Path, MatrixAxes | None]) -> Any:
    """Puts the arrays of a `ScaleByApolloState` into boxes like their parameter's.

    Batch and channel axes keep the parameter's names, and the rank axis has no name. A name of the
    projected side goes to a channel axis without a name, if every count that divides the old axis
    also divides the new one. If the mesh of an `nnx.Variable` is set, its names are those of
    `moments_placement`, which knows the counts. The names of Linen do not depend on the mesh, since
    `jax.jit` compares them with the shardings that it is given.

    Args:
      state: The state, with bare arrays.
      params: The parameters, boxed or bare. The state of a parameter without names stays bare.
      axes: The axes of each parameter.
    """
    named, _ = named_leaves(params, is_leaf=lambda node: bool(_names_of(node)))
    boxes = {path: box for path, box in named if path in axes and _names_of(box)}
    nu = dict(named_leaves(state.nu)[0])

    def boxed(field: str) -> PyTree:
        named, treedef = named_leaves(getattr(state, field))
        return treedef.unflatten(
            _box(boxes[path], leaf, field, axes[path], nu[path]) if path in boxes else leaf
            for path, leaf in named
        )

    return state._replace(**{field: boxed(field) for field in ("mu", "nu", "norm", "projection")})


def _names_of(node: Any) -> dict[str, Names | PartitionSpec]:
    """Returns the axis names in a box by their attributes, and nothing for other nodes."""
    if hasattr(node, "replace_boxed"):  # Linen's `Partitioned`
        held = {"names": getattr(node, "names", None)}
    elif hasattr(node, "get_metadata"):  # an `nnx.Variable`
        held = {name: node.get_metadata(name, None) for name in _METADATA}
    else:
        held = {}
    return {key: names for key, names in held.items() if isinstance(names, tuple | PartitionSpec)}


def _box(box: Any, leaf: Array, field: str, axes: MatrixAxes | None, nu: Array) -> Any:
    (parameter,) = jax.tree.leaves(box)
    named = {}
    for key, names in _names_of(box).items():
        padded = (*names, *[None] * (jnp.ndim(parameter) - len(names)))
        if axes is None:
            is_factored = nu.ndim < jnp.ndim(parameter)
            of_field = _names_of_other(padded, field, is_factored, leaf.ndim == len(padded))
        elif field in ("mu", "nu"):
            is_of_mesh = key != "names" and _are_of_mesh_that_is_set(padded)
            rule = _names_by_counts if is_of_mesh else _names_by_sizes
            of_field = rule(padded, jnp.shape(parameter), axes)
        else:
            whole = 2 if field == "projection" else 0
            of_field = (*(padded[a] for a in axes.batch), *[None] * whole)
        named[key] = PartitionSpec(*of_field) if isinstance(names, PartitionSpec) else of_field
    return box.replace(value=leaf, **named)


def _names_of_other(names: Names, field: str, is_factored: bool, is_whole: bool) -> Names:
    """Returns the names of moments, factors or placeholders of a leaf that is not a matrix."""
    if field in ("mu", "nu") and is_whole:
        return names
    if is_factored and field in ("mu", "nu", "norm"):
        return {"mu": names[:-2], "nu": names[:-1], "norm": (*names[:-2], names[-1])}[field]
    return names[: int(len(names) > 1)]


def _are_of_mesh_that_is_set(names: Names) -> bool:
    axes_of_mesh = jax.sharding.get_abstract_mesh().axis_names
    each = [name for entry in names for name in (entry if isinstance(entry, tuple) else (entry,))]
    return all(name is None or name in axes_of_mesh for name in each)


def _names_by_counts(names: Names, shape: tuple[int, ...], axes: MatrixAxes) -> Names:
    on_mesh = NamedSharding(jax.sharding.get_abstract_mesh(), PartitionSpec(*names))
    placed = moments_placement(on_mesh, shape, axes)
    return () if placed is None else tuple(placed.spec)


def _names_by_sizes(names: Names, shape: tuple[int, ...], axes: MatrixAxes) -> Names:
    channel = {axis: names[axis] for axis in axes.channel}
    for old in axes.projected:
        free = (a for a in channel if channel[a] is None and shape[a] % shape[old] == 0)
        if names[old] is not None and (new := next(free, None)) is not None:
            channel[new] = names[old]
    return (*(names[a] for a in axes.batch), None, *channel.values())
