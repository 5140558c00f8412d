"""The shardings of an optimizer state that follow from the parameters'.

A state follows its parameters: moments in a parameter's shape have its sharding; APOLLO's low-rank
moments keep that of the batch and channel axes. Pass the result where a state is made or restored:

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

    Found by tracing `tx.init` with the parameters' shardings in their types, so that it holds for
    every transformation: what `init` makes like a parameter lies like it. Of APOLLO's state,
    batch and channel axes keep their sharding and the rank axis is whole; mesh axes that the
    projected side is sharded over divide the channels further where their number allows it, so that
    no device holds numbers that another has too. Counts, keys and whatever `init` makes otherwise
    are replicated. Nothing is run.

    Args:
      tx: Any Optax transformation.
      params: Arrays or ShapeDtypeStructs, bare or boxed (Flax Linen's `Partitioned`, NNX's
        variables).
      shardings: NamedShardings of the parameters, in a tree with as many leaves in the same order,
        such as Linen's `get_sharding` and NNX's `get_named_sharding` return for boxed parameters;
        None to take those that `params` have.

    Returns:
      A tree of `tx.init(params)`'s structure with a NamedSharding in place of each array: for
      `jax.jit(..., out_shardings=...)`, `jax.device_put` and the restoring of checkpoints.

    Raises:
      ValueError: A parameter without a NamedSharding, shardings over different meshes, or another
        number of shardings than of parameters.

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

    What `state_shardings` does for `make=tx.init`, whose arguments, result and errors it shares.

    Args:
      make: Makes a tree of arrays of the parameters; traced, not run.
      params: As for `state_shardings`.
      shardings: As for `state_shardings`.

    Returns:
      A tree of the structure of `make(params)` with a NamedSharding in place of each array.

    Raises:
      ValueError: As `state_shardings`.

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
            f"There are {len(given)} shardings and {len(named)} parameters; give a NamedSharding "
            f"for each parameter, and at least one parameter."
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
