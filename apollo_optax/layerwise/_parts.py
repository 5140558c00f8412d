"""Takes parameters and the optimizer state apart into layers and parts, and joins them again."""

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
    """Wraps a tree of an optimizer state that mirrors the parameters, so that it is one leaf."""

    def __init__(self, tree: PyTree) -> None:
        self.tree = tree


class SplitState(NamedTuple):
    """An optimizer state, taken apart.

    Attributes:
      mirrored: The trees that mirror the parameters: moments, norms, traces.
      shared: The other leaves: counts, keys, hyperparameters.
      structure: The structure of the state, with each mirrored tree as a leaf.
      is_mirrored: Whether each leaf of `structure`, in order, is a mirrored tree.
    """

    mirrored: list[PyTree]
    shared: list[Any]
    structure: Any
    is_mirrored: list[bool]


def split_state(tx: optax.GradientTransformation, state: optax.OptState) -> SplitState:
    """Separates the trees that mirror the parameters from the other leaves of a state."""
    marked = optax.tree_map_params(tx, _ParamLike, state, is_leaf=lambda _: True)
    leaves, structure = jax.tree.flatten(marked)
    is_mirrored = [isinstance(leaf, _ParamLike) for leaf in leaves]
    mirrored = [leaf.tree for leaf in leaves if isinstance(leaf, _ParamLike)]
    shared = [leaf for leaf in leaves if not isinstance(leaf, _ParamLike)]
    return SplitState(mirrored, shared, structure, is_mirrored)


def join_state(split: SplitState, mirrored: list[PyTree]) -> optax.OptState:
    """Returns the state with these mirrored trees in place of its own."""
    trees, shared = iter(mirrored), iter(split.shared)
    leaves = [next(trees) if mirrors else next(shared) for mirrors in split.is_mirrored]
    return jax.tree.unflatten(split.structure, leaves)


def blocks_of(tree: PyTree) -> PyTree:
    """Returns the part with the blocks."""
    return {"blocks": tree["blocks"]}


def rest_of(tree: PyTree, keys: set[Any] | None) -> PyTree:
    """Returns the entries of `rest` with these keys, or all entries if `keys` is None."""
    rest = tree["rest"]
    return {"rest": rest if keys is None else {key: rest[key] for key in rest if key in keys}}


def as_part(tree: PyTree, part: PyTree) -> PyTree:
    """Returns the entries of `tree` that the part has."""
    return blocks_of(tree) if "blocks" in part else rest_of(tree, keys_of(part["rest"]))


def keys_of(rest: PyTree) -> set[Any] | None:
    """Returns the keys of the entries of `rest`, or None if `rest` is not a dictionary."""
    return set(rest) if type(rest) is dict else None


def padded(part: PyTree, absent: PyTree) -> PyTree:
    """Returns the tree of all parameters with `optax.MaskedNode` in place of those of other parts.

    `optax.masked` passes such trees to transformations. Masks and labels that are trees fit them.
    """
    if keys_of(part.get("rest")) is not None:
        part = {"rest": {**absent["rest"], **part["rest"]}}
    # Copied, so that the dictionary has the type that the state was made for.
    whole = copy.copy(absent)
    whole.update(part)
    return whole


def share_of(part: Params, mirrored: PyTree) -> PyTree:
    """Returns a tree of the state with `optax.MaskedNode` in place of the leaves of other parts."""
    keys = keys_of(part.get("rest"))
    prefixes = [(name,) for name in part] if keys is None else [("rest", str(k)) for k in keys]
    named, structure = named_leaves(mirrored)
    return structure.unflatten(
        leaf if any(path[: len(p)] == p for p in prefixes) else optax.MaskedNode()
        for path, leaf in named
    )


def layer_of(stacked: PyTree, index: Int[Array, ""]) -> PyTree:
    """Returns the leaves of one layer, with a leading axis of size 1."""
    return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, index, 1), stacked)


def with_layer(stacked: PyTree, layer: PyTree, index: Int[Array, ""]) -> PyTree:
    """Returns the stack with the leaves of one layer written into it."""

    def write(whole: Array, part: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(whole, part.astype(whole.dtype), index, 0)

    return jax.tree.map(write, stacked, layer)


def without_layer_axis(layer: PyTree) -> PyTree:
    """Returns one layer without the leading axis of size 1."""
    return jax.tree.map(lambda a: jnp.squeeze(a, 0), layer)


def number_of_layers(blocks: PyTree) -> int:
    """Returns the size of the leading axis; raises ValueError unless all leaves share it."""
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
    """Returns shapes and dtypes, without the shardings in the types, which checks do not need."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
