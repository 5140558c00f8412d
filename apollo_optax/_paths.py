"""Names the leaves of a pytree, and builds plain nested dictionaries from those names.

The optimizer state is not built on the parameters' own tree nodes, for two reasons. Flax's boxes
have axis names that do not fit a low-rank leaf (`_boxes.py` makes names that fit). And the same
parameters may be boxed in one call and bare in the next.
"""

import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey, keystr

Path = tuple[str, ...]


def _name(entry: Any) -> str:
    match entry:
        case DictKey(key=name) | FlattenedIndexKey(key=name) | SequenceKey(idx=name):
            return str(name)
        case GetAttrKey(name=name):
            return name
    return keystr((entry,))


def named_leaves(tree: Any, is_leaf: Any = None) -> tuple[list[tuple[Path, Any]], Any]:
    """Returns (path, leaf) pairs in the tree's own order, and its treedef.

    The accessor of a box (`.value` of Flax's `Partitioned` and `nnx.Variable`) is not part of a
    leaf's name, so that boxed and bare parameters have the same names.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    children: dict[tuple[Any, ...], int] = {}
    for keys, _ in leaves:
        for depth in range(len(keys)):
            children[keys[:depth]] = children.get(keys[:depth], 0) + 1
    named = []
    for keys, leaf in leaves:
        boxed = keys and keys[-1] == GetAttrKey("value") and children[keys[:-1]] == 1
        named.append((tuple(_name(entry) for entry in (keys[:-1] if boxed else keys)), leaf))
    return named, treedef


def named_arrays(tree: Any, is_leaf: Any = None) -> tuple[list[tuple[Path, Any]], Any]:
    """Returns `named_leaves` with Python's and NumPy's numbers as arrays, as Optax does."""
    named, treedef = named_leaves(tree, is_leaf)
    return [(path, x if hasattr(x, "ndim") else jnp.asarray(x)) for path, x in named], treedef


def nest(items: Iterable[tuple[Path, Any]]) -> Any:
    """Builds nested dictionaries from (path, value) pairs; an empty path is the value itself."""
    tree: dict[str, Any] = {}
    for path, value in items:
        if not path:
            return value
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = value
    return tree


def lookup(tree: Any, path: Path) -> Any:
    """Returns the value `nest` put at `path`; KeyError where there is none."""
    for name in path:
        if not isinstance(tree, Mapping):
            raise KeyError(name)
        tree = tree[name]
    if isinstance(tree, Mapping):
        raise KeyError(path)
    return tree


def replaced(tree: Any, *parts: Any) -> Any:
    """Returns the tree with the leaves of the parts in place of its own."""
    new = {path: leaf for part in parts for path, leaf in named_leaves(part)[0]}
    named, structure = named_leaves(tree)
    return structure.unflatten(new.get(path, leaf) for path, leaf in named)


def spell(path: Path) -> str:
    """Returns the path as errors and warnings show it."""
    return "/".join(path) or "(the only leaf)"


def stable_hash(path: Path) -> int:
    """Returns a 32-bit hash of a path, the same in every process and on every machine."""
    return zlib.crc32("/".join(path).encode())
