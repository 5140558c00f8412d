"""The shardings of an optimizer state that follow from the shardings of the parameters.

Moments in the shape of a parameter have the parameter's sharding. APOLLO's low-rank moments keep
the sharding of the batch and channel axes. Pass the result where a state is made or restored:

    shardings = state_shardings(tx, params)
    state = jax.jit(tx.init, out_shardings=shardings)(params)
"""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding
from jaxtyping import PyTree

from apollo_optax._paths import Path, named_leaves, spell
from apollo_optax._placement import on_automatic_axes, placement_of, result_shardings

__all__ = ["on_automatic_axes", "shardings_of", "state_shardings"]


def state_shardings(
    tx: optax.GradientTransformation, params: PyTree, shardings: PyTree | None = None
) -> PyTree:
    """Returns the sharding of every leaf of `tx.init(params)`.

    The function traces `tx.init` with the parameters' shardings in their types, so that it works
    for every transformation. Nothing runs. An array that `init` makes like a parameter gets the
    parameter's sharding. Counts, keys and other arrays are replicated.

    In APOLLO's state, batch and channel axes keep their sharding, and the rank axis is not sharded.
    A mesh axis that shards the projected side shards the channels instead, if the sizes divide
    evenly, so that the moments are not replicated.

    Args:
      tx: Any Optax transformation.
      params: The parameters, as arrays or ShapeDtypeStructs, bare or boxed (Flax Linen's
        `Partitioned`, NNX's variables).
      shardings: The NamedShardings of the parameters, in a tree with as many leaves in the same
        order. Linen's `get_sharding` and NNX's `get_named_sharding` return such trees for boxed
        parameters. None means the shardings that `params` have.

    Returns:
      A tree with the structure of `tx.init(params)` and a NamedSharding in place of each array, for
      `jax.jit(..., out_shardings=...)`, `jax.device_put` and restoring checkpoints.

    Raises:
      ValueError: If a parameter has no NamedSharding, if shardings are over different meshes, or if
        the numbers of shardings and of parameters differ.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jax.sharding import NamedSharding, PartitionSpec
      >>> from apollo_optax import scale_by_apollo
      >>> from apollo_optax.sharding import state_shardings
      >>> mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"))
      >>> sharding = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
      >>> kernel = jax.ShapeDtypeStruct((64, 256), "float32", sharding=sharding)
      >>> tuple(state_shardings(scale_by_apollo(rank=8), {"kernel": kernel}).mu["kernel"].spec)
      (None, ('tensor', 'fsdp'))
    """
    return shardings_of(tx.init, params, shardings)


def shardings_of(
    make: Callable[[PyTree], PyTree], params: PyTree, shardings: PyTree | None = None
) -> PyTree:
    """Returns the sharding of every leaf of `make(params)`, such as a whole training state.

    `state_shardings` is this function with `make=tx.init`.

    Args:
      make: A function of the parameters that returns a tree of arrays, which is traced and not run.
      params: As in `state_shardings`.
      shardings: As in `state_shardings`.

    Returns:
      A tree with the structure of `make(params)` and a NamedSharding in place of each array.

    Raises:
      ValueError: As in `state_shardings`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jax.sharding import NamedSharding, PartitionSpec
      >>> from apollo_optax.sharding import shardings_of
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> params = {"w": jax.device_put(jnp.ones(8), NamedSharding(mesh, PartitionSpec("data")))}
      >>> found = shardings_of(lambda p: {"params": p, "opt": optax.sgd(0.1, 0.9).init(p)}, params)
      >>> tuple(found["opt"][0].trace["w"].spec)
      ('data',)
    """
    named, treedef = named_leaves(params)
    placed = _shardings_of(named, shardings)
    return result_shardings(make, params, treedef.unflatten(placed))


def _shardings_of(named: list[tuple[Path, Any]], shardings: PyTree | None) -> list[NamedSharding]:
    if shardings is None:
        given = [placement_of(leaf) for _, leaf in named]
    else:
        given = jax.tree.leaves(shardings)
    if len(given) != len(named) or not named:
        raise ValueError(
            f"There are {len(given)} shardings and {len(named)} parameters; give at least one "
            f"parameter, and a NamedSharding for each."
        )
    found: list[NamedSharding] = []
    for (path, _), sharding in zip(named, given, strict=True):
        if not isinstance(sharding, NamedSharding):
            raise ValueError(
                f"{spell(path)} has no NamedSharding (found {sharding!r}); place the parameters on "
                f"a mesh, give ShapeDtypeStructs with a sharding, or pass shardings."
            )
        if found and sharding.mesh != found[0].mesh:
            raise ValueError(
                f"{spell(path)} is sharded over {sharding.mesh}, {spell(named[0][0])} over "
                f"{found[0].mesh}; all parameters must be on one mesh."
            )
        found.append(sharding)
    return found
