"""The sharding of a leaf on a mesh, and of the leaf's share of the optimizer state."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from apollo_optax._matrices import MatrixAxes


def placement_of(leaf: Any) -> NamedSharding | None:
    """Returns the mesh sharding of an array or ShapeDtypeStruct; of a traced array, its type's.

    Returns None if there is none, or if only the compiler will know (traced over automatic axes).
    """
    if isinstance(leaf, jax.core.Tracer):
        return explicit_sharding(leaf)
    sharding = getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def explicit_sharding(leaf: Any) -> NamedSharding | None:
    """Returns the sharding in an array's type, or None if no axis of its mesh is explicit."""
    sharding = jax.typeof(leaf).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def moments_placement(
    sharding: NamedSharding | None, shape: tuple[int, ...], axes: MatrixAxes | None
) -> NamedSharding | None:
    """Returns the placement of a leaf's moments, `(*batch, rank, *channel)` for a matrix.

    Batch and channel axes keep their sharding, and the rank axis is not sharded. Mesh axes that
    shard the projected axes would hold the same moments many times. Where the sizes divide evenly,
    these mesh axes shard the channel axes instead.
    """
    if sharding is None or axes is None:
        return sharding
    names = _names_of_each_axis(sharding, len(shape))
    channel = {axis: names[axis] for axis in axes.channel}
    for name in (name for axis in axes.projected for name in names[axis]):
        for axis in axes.channel:
            divided = (*channel[axis], name)
            if shape[axis] % _devices(sharding, divided) == 0:
                channel[axis] = divided
                break
    return _with_names(
        sharding, [*(names[a] for a in axes.batch), (), *(channel[a] for a in axes.channel)]
    )


def matrices_placement(
    sharding: NamedSharding | None, shape: tuple[int, ...], axes: MatrixAxes, whole: int = 0
) -> NamedSharding | None:
    """Returns the placement of an array of the batch axes and `whole` unsharded axes after them."""
    if sharding is None:
        return None
    names = _names_of_each_axis(sharding, len(shape))
    return _with_names(sharding, [*(names[a] for a in axes.batch), *((),) * whole])


def placement_without(
    sharding: NamedSharding | None, ndim: int, axes: tuple[int, ...]
) -> NamedSharding | None:
    """Returns the placement of an array without some axes of a leaf, counted from the last."""
    if sharding is None:
        return None
    names = _names_of_each_axis(sharding, ndim)
    return _with_names(sharding, [n for i, n in enumerate(names) if i - ndim not in axes])


def call_on_automatic_axes(function: Callable, *args: Any, like: Any) -> Any:
    """Returns `function(*args)`, with the structure and the shardings of `like`.

    If types have shardings, the compiler still chooses the shardings inside the function.
    """
    known = [sharding for leaf in jax.tree.leaves(like) if (sharding := explicit_sharding(leaf))]
    if not known:
        return function(*args)
    replicated = known[0].update(spec=PartitionSpec())
    shardings = jax.tree.map(lambda leaf: explicit_sharding(leaf) or replicated, like)
    return jax.sharding.auto_axes(function, out_sharding=shardings)(*args)


def on_automatic_axes(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Lets the compiler choose the shardings within an update, also on explicit mesh axes.

    On a mesh with explicit axes (`AxisType.Explicit`), JAX refuses products of sharded arrays if
    the sharding of the result is ambiguous, as in `optax.contrib.muon`. A wrapped transformation
    works on such a mesh. The updates keep the types of the gradients, and the new state keeps the
    types of the state. `scale_by_apollo` is wrapped already.

    Args:
      tx: Any Optax transformation.

    Returns:
      The transformation, with the same state. Without explicit axes, it does what `tx` does.

    Example:
      >>> import optax
      >>> from apollo_optax.sharding import on_automatic_axes
      >>> tx = on_automatic_axes(optax.contrib.muon(0.02))
    """
    tx = optax.with_extra_args_support(tx)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        functions = {name: value for name, value in extra_args.items() if callable(value)}
        arrays = {name: value for name, value in extra_args.items() if name not in functions}

        def call(updates: Any, state: Any, params: Any, arrays: Any) -> Any:
            return tx.update(updates, state, params, **arrays, **functions)

        args = updates, state, params, arrays
        return call_on_automatic_axes(call, *args, like=(updates, state))

    return optax.GradientTransformationExtraArgs(tx.init, update)


def compiler_divides_arrays() -> bool:
    """Whether a mesh is set with an axis of several devices that is not manual.

    Shardings that only the arguments of `jax.jit` have cannot be seen during tracing.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    return any(size > 1 and kind is not AxisType.Manual for size, kind in axes)


def result_shardings(function: Callable, tree: Any, shardings: Any) -> Any:
    """Returns the shardings of `function(tree)`; arrays made like a leaf have that leaf's.

    `function` is traced with the shardings in the types of the leaves. Nothing runs.

    Args:
      function: A function of `tree` that returns a tree of arrays.
      tree: A tree of arrays or ShapeDtypeStructs.
      shardings: A tree of the same structure with NamedShardings, all over one mesh.
    """
    mesh = jax.tree.leaves(shardings)[0].mesh
    explicit = AbstractMesh(
        mesh.axis_sizes, mesh.axis_names, axis_types=(AxisType.Explicit,) * len(mesh.axis_names)
    )

    def typed(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        in_types = NamedSharding(explicit, sharding.spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=in_types)

    with jax.sharding.use_abstract_mesh(explicit):
        result = jax.eval_shape(function, jax.tree.map(typed, tree, shardings))

    def concrete(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        spec = PartitionSpec() if leaf.sharding is None else leaf.sharding.spec
        return NamedSharding(mesh, spec)

    return jax.tree.map(concrete, result)


def _names_of_each_axis(sharding: NamedSharding, ndim: int) -> list[tuple[str, ...]]:
    entries = [*sharding.spec, *[None] * (ndim - len(sharding.spec))]
    return [
        entry if isinstance(entry, tuple) else () if entry is None else (entry,)
        for entry in entries
    ]


def _devices(sharding: NamedSharding, names: tuple[str, ...]) -> int:
    devices = 1
    for name in names:
        devices *= sharding.mesh.shape[name]
    return devices


def _with_names(sharding: NamedSharding, names: list[tuple[str, ...]]) -> NamedSharding:
    spec = PartitionSpec(
        *(each[0] if len(each) == 1 else each or None for each in names),
    )
    return sharding.update(spec=spec)
