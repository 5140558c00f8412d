"""Parameters and the optimizer state, taken apart into layers and parts and put together again."""

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from apollo_optax._paths import named_leaves, spell
from apollo_optax.layerwise._model import Params

Part: TypeAlias = tuple[Params, list[Any]]
"""Some of the parameters, and their shares of the mirrored trees of the optimizer state."""


class _ParamLike:
    """A tree of an optimizer state that mirrors the parameters, as one leaf."""

    def __init__(self, tree: PyTree) -> None:
        self.tree = tree


class SplitState(NamedTuple):
    """An optimizer state, taken apart.

    Attributes:
      mirrored: The trees that mirror the parameters: moments, norms, traces.
      shared: The leaves that do not: counts, keys, hyperparameters.
      structure: Of the state, with each mirrored tree as a leaf.
      is_mirrored: For each leaf of `structure`, in order, whether it is a mirrored tree.
    """

    mirrored: list[PyTree]
    shared: list[Any]
    structure: Any
    is_mirrored: list[bool]


def split_state(tx: optax.GradientTransformation, state: optax.OptState) -> SplitState:
    """Tells the trees that mirror the parameters from the other leaves of a state."""
    marked = optax.tree_map_params(tx, _ParamLike, state, is_leaf=lambda _: True)
    leaves, structure = jax.tree.flatten(marked)
    is_mirrored = [isinstance(leaf, _ParamLike) for leaf in leaves]
    mirrored = [leaf.tree for leaf in leaves if isinstance(leaf, _ParamLike)]
    shared = [leaf for leaf in leaves if not isinstance(leaf, _ParamLike)]
    return SplitState(mirrored, shared, structure, is_mirrored)


def join_state(split: SplitState, mirrored: list[PyTree]) -> optax.OptState:
    """The state again, with these mirrored trees in place of its own."""
    trees, shared = iter(mirrored), iter(split.shared)
    leaves = [next(trees) if mirrors else next(shared) for mirrors in split.is_mirrored]
    return jax.tree.unflatten(split.structure, leaves)


def blocks_of(tree: PyTree) -> PyTree:
    """The part that is the blocks."""
    return {"blocks": tree["blocks"]}


def rest_of(tree: PyTree, keys: set[Any] | None) -> PyTree:
    """The entries of `rest` with these keys; None: all of it."""
    rest = tree["rest"]
    return {"rest": rest if keys is None else {key: rest[key] for key in rest if key in keys}}


def as_part(tree: PyTree, part: PyTree) -> PyTree:
    """The entries of `tree` that the part has."""
    return blocks_of(tree) if "blocks" in part else rest_of(tree, keys_of(part["rest"]))


def keys_of(rest: PyTree) -> set[Any] | None:
    """The keys of the entries of `rest` that may be updated apart; None if it is no dictionary."""
    return set(rest) if type(rest) is dict else None


def padded(part: PyTree, absent: PyTree) -> PyTree:
    """The part in the tree of all parameters, `optax.MaskedNode` in place of all other leaves.

    That is what `optax.masked` hands over. Masks and labels given as trees fit it.
    """
    if keys_of(part.get("rest")) is not None:
        part = {"rest": {**absent["rest"], **part["rest"]}}
    # A copy, for a dictionary of the type that the state was made for.
    whole = copy.copy(absent)
    whole.update(part)
    return whole


def share_of(part: Params, mirrored: PyTree) -> PyTree:
    """A tree of the state with `optax.MaskedNode` in place of what is not of the part's leaves."""
    keys = keys_of(part.get("rest"))
    prefixes = [(name,) for name in part] if keys is None else [("rest", str(k)) for k in keys]
    named, structure = named_leaves(mirrored)
    return structure.unflatten(
        leaf if any(path[: len(p)] == p for p in prefixes) else optax.MaskedNode()
        for path, leaf in named
    )


def layer_of(stacked: PyTree, index: Int[Array, ""]) -> PyTree:
    """The leaves of one layer, with a leading axis of size 1."""
    return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, index, 1), stacked)


def with_layer(stacked: PyTree, layer: PyTree, index: Int[Array, ""]) -> PyTree:
    """The stack with the leaves of one layer written into it."""

    def write(whole: Array, part: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(whole, part.astype(whole.dtype), index, 0)

    return jax.tree.map(write, stacked, layer)


def without_layer_axis(layer: PyTree) -> PyTree:
    """One layer as a model has it."""
    return jax.tree.map(lambda a: jnp.squeeze(a, 0), layer)


def number_of_layers(blocks: PyTree) -> int:
    """The size of the leading axis; raises ValueError unless all leaves share it."""
    leaves, _ = named_leaves(blocks)
    if not leaves:
        raise ValueError('params["blocks"] has no leaves; a layer-wise step needs stacked layers.')
    (first, leaf), *_ = leaves
    for path, other in leaves:
        if other.ndim == 0 or other.shape[0] != leaf.shape[0]:
            raise ValueError(
                f"Leaves of blocks must share a leading axis of layers: {spell(first)} has shape "
                f"{leaf.shape}, {spell(path)} {other.shape}."
            )
    return leaf.shape[0]


def require_form(params: Params) -> None:
    """Raises ValueError unless the parameters are `{"blocks": stacked, "rest": rest}`."""
    if not isinstance(params, dict) or set(params) != {"blocks", "rest"}:
        given = list(params) if isinstance(params, Mapping) else type(params).__name__
        raise ValueError(f'params must be a dict {{"blocks": stacked, "rest": rest}}, got {given}.')
    number_of_layers(params["blocks"])


def shapes_of(tree: PyTree) -> PyTree:
    """Shapes and dtypes, without shardings in the types: those do not matter to what is checked."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
