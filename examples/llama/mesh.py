"""LLaMA on a mesh of devices: `data` and `fsdp` divide the batch, `fsdp` and `tensor` the weights.

`fsdp` keeps every weight in parts and gathers one layer's at a time (fully sharded data
parallelism); `tensor` divides heads, the feed-forward's width and the vocabulary (Megatron's way).
The model says where activations lie by `constrain`, which does nothing without a mesh.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

__all__ = [
    "MESH_AXES",
    "batch_sharding",
    "constrain",
    "devices_dividing_batch",
    "gathered",
    "make_mesh",
    "param_shardings",
    "parse_mesh",
]

MESH_AXES = ("data", "fsdp", "tensor")
_BATCH = ("data", "fsdp")

# The mesh axes of a matrix (in, out); of the embedding (vocabulary, hidden).
_WEIGHTS = {
    "embed": ("tensor", "fsdp"),
    "q_proj": ("fsdp", "tensor"),
    "k_proj": ("fsdp", "tensor"),
    "v_proj": ("fsdp", "tensor"),
    "o_proj": ("tensor", "fsdp"),
    "gate_proj": ("fsdp", "tensor"),
    "up_proj": ("fsdp", "tensor"),
    "down_proj": ("tensor", "fsdp"),
    "lm_head": ("fsdp", "tensor"),
}
# What an axis of an activation is, and the mesh axes that divide it.
_ACTIVATIONS = {
    "batch": _BATCH,
    "heads": ("tensor",),
    "width": ("tensor",),
    "vocabulary": ("tensor",),
}


def parse_mesh(text: str) -> dict[str, int]:
    """Reads the axes of a mesh and their sizes.

    Args:
      text: Such as `"data=2,fsdp=2,tensor=2"`; axes left out have size 1.

    Returns:
      The sizes of all of `MESH_AXES`, in their order.

    Raises:
      ValueError: If it is of another form or names another axis.

    >>> parse_mesh("fsdp=4,data=2")
    {'data': 2, 'fsdp': 4, 'tensor': 1}
    """
    sizes: dict[str, int] = {}
    for entry in text.split(","):
        name, _, size = (part.strip() for part in entry.partition("="))
        if name not in MESH_AXES or name in sizes or not size.isdigit() or int(size) == 0:
            raise ValueError(
                f"--mesh has {entry!r}; allowed are data=N, fsdp=N and tensor=N, once each, "
                f"separated by commas"
            )
        sizes[name] = int(size)
    return {name: sizes.get(name, 1) for name in MESH_AXES}


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of all devices, of all processes, with these sizes.

    Args:
      sizes: As `parse_mesh` returns them.
      devices: Other devices to use.

    Raises:
      ValueError: If the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    needed, present = math.prod(sizes.values()), len(devices)
    if needed != present:
        spelled = ",".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(
            f"--mesh {spelled} has {needed} devices and there are {present}; choose sizes that "
            f"multiply to it (several on one CPU: JAX_NUM_CPU_DEVICES={needed})"
        )
    automatic = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=automatic, devices=devices)


def devices_dividing_batch(sizes: Mapping[str, int]) -> int:
    """Into how many parts a mesh of these sizes divides a batch."""
    return math.prod(sizes.get(name, 1) for name in _BATCH)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch of tokens, `(batch, sequence)`."""
    return NamedSharding(mesh, PartitionSpec(_BATCH))


def param_shardings(mesh: Mesh, params: PyTree) -> PyTree:
    """The sharding of every parameter, quantized ones too.

    A mesh axis that does not divide an axis of a parameter leaves it whole; norms are replicated.

    Args:
      mesh: With some of `MESH_AXES`.
      params: What a step trains: arrays or ShapeDtypeStructs, stacked over layers or one layer's.
    """

    def sharding(path: jax.tree_util.KeyPath, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, _weight_spec(mesh.shape, path, leaf.shape, MESH_AXES))

    return jax.tree.map_with_path(sharding, params)


def gathered(layer: PyTree) -> PyTree:
    """One layer's weights as a product needs them: whole but for what `tensor` divides."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return layer

    def gather(path: jax.tree_util.KeyPath, leaf: Array) -> Array:
        spec = _weight_spec(mesh.shape, path, leaf.shape, ("tensor",))
        return jax.lax.with_sharding_constraint(leaf, spec)

    return jax.tree.map_with_path(gather, layer)


def constrain(x: Array, *axes: str | None) -> Array:
    """Says what the axes of an activation are: "batch", "heads", "width", "vocabulary" or None."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    wanted = [_ACTIVATIONS.get(axis or "", ()) for axis in axes]
    return jax.lax.with_sharding_constraint(x, _fitting(mesh.shape, wanted, x.shape))


def _weight_spec(
    sizes: Mapping[str, int],
    path: jax.tree_util.KeyPath,
    shape: tuple[int, ...],
    allowed: tuple[str, ...],
) -> PartitionSpec:
    names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
    axes = next((_WEIGHTS[name] for name in names if name in _WEIGHTS), ())
    wanted: list[tuple[str, ...]] = [()] * (len(shape) - len(axes))
    wanted += [(name,) if name in allowed else () for name in axes]
    return _fitting(sizes, wanted, shape)


def _fitting(
    sizes: Mapping[str, int], wanted: list[tuple[str, ...]], shape: tuple[int, ...]
) -> PartitionSpec:
    """The specification with the mesh axes that exist and divide the array's."""
    entries = []
    for names, size in zip(wanted, shape, strict=True):
        names = tuple(name for name in names if sizes.get(name, 1) > 1)
        fits = size % math.prod(sizes[name] for name in names) == 0
        entries.append(names if names and fits else None)
    return PartitionSpec(*entries)
