"""Checksums of arrays, computed where they lie and the same however they are divided."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Int, PyTree, UInt32

__all__ = ["array_checksums"]

_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
_SEEDS = (0x9E3779B1, 0x85EBCA77)
_HASHES_AT_ONCE = 2**20


def array_checksums(tree: PyTree[Array]) -> dict[str, str]:
    """Returns 64 bits, in hexadecimal, of every array of a tree that is not empty.

    Sums, modulo 2^32, of a hash of every element's bits and position: integers add up to the same
    in any order, so that an array has one checksum on one device and on a mesh of many processes.
    No array is moved or copied.

    Args:
      tree: Arrays of at most 4 bytes an element.

    Returns:
      The checksum by the array's path, its keys joined by points.

    >>> array_checksums({"w": jnp.zeros(2)}) == array_checksums({"w": jnp.array([0.0, -0.0])})
    False
    """
    named = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
        if leaf.size
    }
    on_one_device = all(len(leaf.sharding.device_set) == 1 for leaf in named.values())
    sums = jax.device_get(_sums(named, in_parts=on_one_device))
    return {name: "".join(f"{int(value):08x}" for value in sums[name]) for name in named}


@functools.partial(jax.jit, static_argnames="in_parts")
def _sums(named: dict[str, Array], in_parts: bool) -> dict[str, list[UInt32[Array, ""]]]:
    add_up = _sum_in_parts if in_parts else _sum
    return {name: [add_up(leaf, seed) for seed in _SEEDS] for name, leaf in named.items()}


def _sum_in_parts(leaf: Array, seed: int) -> UInt32[Array, ""]:
    """Adds up one part of the rows after another: XLA for CPUs writes all hashes to memory."""
    if leaf.size <= _HASHES_AT_ONCE:
        return _sum(leaf, seed)
    rows = leaf.shape[0]
    of_a_part = max(
        part
        for part in range(1, rows + 1)
        if rows % part == 0 and (part == 1 or part * leaf.size <= rows * _HASHES_AT_ONCE)
    )

    def add(number: Int[Array, ""], total: UInt32[Array, ""]) -> UInt32[Array, ""]:
        first = number * of_a_part
        part = jax.lax.dynamic_slice_in_dim(leaf, first, of_a_part)
        return total + _sum(part, seed, first)

    return jax.lax.fori_loop(0, rows // of_a_part, add, jnp.uint32(0))


def _sum(leaf: Array, seed: int, first_row: Int[ArrayLike, ""] = 0) -> UInt32[Array, ""]:
    if leaf.dtype == jnp.bool_:
        leaf = leaf.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(leaf, _BITS[leaf.dtype.itemsize]).astype(jnp.uint32)
    hashed = bits ^ jnp.uint32(seed)
    for axis in range(leaf.ndim):
        position = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        if axis == 0:
            position += jnp.asarray(first_row, jnp.uint32)
        hashed = _mixed(hashed + (position + 1) * jnp.uint32(seed))
    return jnp.sum(_mixed(hashed), dtype=jnp.uint32)


def _mixed(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The last step of MurmurHash3: every bit of the result depends on every bit of `x`."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
