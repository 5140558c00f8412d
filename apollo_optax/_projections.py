"""Draws the projection P of the smaller side of a matrix."""

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key, PRNGKeyArray

from apollo_optax._generator import normal_of_words, random_words, stored
from apollo_optax._matrices import MatrixAxes, matrices_of
from apollo_optax._paths import Path, stable_hash

_BITS_PER_WORD = 32
# Projections of one shape are drawn together up to this size, which may add to the peak memory.
_TOGETHER_BYTES = 1 << 26


@runtime_checkable
class Projection(Protocol):
    """The signature of a projection.

    A projection is a pure function of a matrix's key and the number of refreshes so far. The result
    is P of shape `(rank, dim)`, float32, with `E[P.T @ P] = I`.
    """

    def __call__(
        self, key: PRNGKeyArray, refresh: Int[ArrayLike, ""], rank: int, dim: int, /
    ) -> Float[Array, "rank dim"]:
        """Returns P for one matrix whose smaller side has size `dim`."""
        ...


@functools.partial(jax.jit, static_argnums=(2, 3))
def gaussian(
    key: PRNGKeyArray, refresh: Int[ArrayLike, ""], rank: int, dim: int
) -> Float[Array, "rank dim"]:
    """Draws the paper's projection: independent normal entries of variance `1 / rank`.

    Args:
      key: The typed PRNG key of the matrix.
      refresh: The number of refreshes so far, `count // update_proj_gap`. Every value gives an
        independent P.
      rank: The number of rows of P.
      dim: The number of columns of P, which is the size of the matrix's smaller side.

    Returns:
      P of shape `(rank, dim)`, float32, with `E[P.T @ P] = I`.

    Example:
      >>> import jax
      >>> gaussian(jax.random.key(0), 0, rank=4, dim=10).shape
      (4, 10)
    """
    draw = functools.partial(random_words, rows=-(-rank // 2), columns=dim)
    u, v = stored(draw, key, refresh)
    half = jax.lax.broadcasted_iota(jnp.uint32, (2, *u.shape), 0)
    entries = normal_of_words(
        jnp.broadcast_to(u, half.shape), jnp.broadcast_to(v, half.shape) + (half << 30)
    )
    return entries.reshape(-1, dim)[:rank] * jnp.float32(rank**-0.5)


@functools.partial(jax.jit, static_argnums=(2, 3))
def rademacher(
    key: PRNGKeyArray, refresh: Int[ArrayLike, ""], rank: int, dim: int
) -> Float[Array, "rank dim"]:
    """Draws independent signs `±1 / sqrt(rank)`.

    An entry takes one random bit, which is far cheaper than a normal draw. The arguments and the
    result are those of `gaussian`. Every column of P has norm 1 exactly.

    Example:
      >>> import jax
      >>> P = rademacher(jax.random.key(0), 0, rank=4, dim=3)
      >>> bool((abs(P) == 0.5).all())
      True
    """
    rows = -(-rank // (2 * _BITS_PER_WORD))
    draw = functools.partial(random_words, rows=rows, columns=dim)
    words = jnp.concatenate(stored(draw, key, refresh))
    shifts = jnp.arange(_BITS_PER_WORD, dtype=jnp.uint32)
    bits = (words[:, None, :] >> shifts[None, :, None]) & 1
    bits = bits.reshape(-1, dim)[:rank]
    magnitude = jnp.float32(rank**-0.5)
    return jnp.where(bits == 1, magnitude, -magnitude)


def svd(G: Float[Array, "*batch dim channels"], rank: int) -> Float[Array, "*batch rank dim"]:
    """Takes the projection from the gradient itself, the paper's "APOLLO with SVD".

    Pass this function as `projection=svd`. P cannot be redrawn from a key, so P is kept in the
    optimizer state (`rank * dim` more numbers per matrix) and recomputed at every refresh.

    Args:
      G: A gradient with its smaller side first, or a batch of gradients.
      rank: The number of singular vectors, at most `dim`.

    Returns:
      The `rank` leading left singular vectors of G as rows, float32.

    Example:
      >>> import jax.numpy as jnp
      >>> abs(svd(jnp.diag(jnp.array([1.0, 3.0])), rank=1)).tolist()
      [[0.0, 1.0]]
    """
    G = G.astype(jnp.promote_types(G.dtype, jnp.float32))
    largest = jnp.max(jnp.abs(G), axis=(-2, -1), keepdims=True)
    G = G / jnp.where(largest > 0, largest, 1)  # the squares of a huge G would overflow
    left, _, _ = jnp.linalg.svd(G, full_matrices=False)
    return jnp.swapaxes(left[..., :rank], -1, -2).astype(jnp.float32)


svd.keeps_state = True  # type: ignore[attr-defined]


def keeps_state(projection: Callable[..., Array]) -> bool:
    """Whether a projection is a function `(G, rank) -> P` of the gradient, kept until it is due.

    Such a projection has an attribute `keeps_state`, as `svd` has. All others are redrawn at every
    step.
    """
    return getattr(projection, "keeps_state", False)


def draw_projections(
    projection: Projection,
    key: PRNGKeyArray,
    refresh: Int[Array, ""],
    shapes: Mapping[Path, tuple[int, ...]],
    first: Int[ArrayLike, ""],
) -> dict[Path, Float[Array, "*batch rank dim"]]:
    """Draws P of every leaf, each matrix with a key from its leaf's path and its batch index.

    Where the rank is the whole side, nothing is projected: P is the identity.

    Compiling a generator takes longer than compiling the rest of a leaf's update. Leaves of one
    shape therefore share a generator, up to `_TOGETHER_BYTES`.

    Args:
      projection: The projection.
      key: The key of all leaves.
      refresh: The number of refreshes so far.
      shapes: The shapes of the result, `(*batch, rank, dim)`.
      first: The index on their leading batch axis at which slices of stacked leaves start.
    """
    in_order = dict(sorted(shapes.items(), key=lambda item: item[1]))
    keys = _keys_of_matrices(key, in_order, first)
    drawn: dict[Path, Array] = {}
    end = 0
    for shape, of_shape in itertools.groupby(in_order, key=in_order.__getitem__):
        (*batch, rank, dim), paths = shape, tuple(of_shape)

        together = 1 if batch else max(1, _TOGETHER_BYTES // (4 * rank * dim))
        for first_path in range(0, len(paths), together):
            some = paths[first_path : first_path + together]
            start, end = end, end + math.prod(batch) * len(some)
            if rank == dim:
                P = jnp.broadcast_to(jnp.eye(dim, dtype=jnp.float32), (len(some), *shape))
            else:
                P = _draw(projection, keys[start:end], refresh, rank, dim)
                P = P.reshape(len(some), *shape)
            drawn |= zip(some, P, strict=True)
    # The barrier has P drawn once, and not again for each tile of the product.
    return {path: jax.lax.optimization_barrier(P) for path, P in drawn.items()}


@functools.partial(jax.jit, static_argnames=("projection", "rank", "dim"))
def _draw(
    projection: Projection,
    keys: Key[Array, " matrices"],
    refresh: Int[Array, ""],
    rank: int,
    dim: int,
) -> Float[Array, "matrices rank dim"]:
    """Draws P for each key; traced once for all steps and all leaves of one size."""
    return jax.vmap(lambda key: projection(key, refresh, rank, dim))(keys)


def refit_projections(
    projection: Callable[..., Array],
    grads: Mapping[Path, Array],
    stored: Mapping[Path, Array],
    axes: Mapping[Path, MatrixAxes | None],
    is_due: Bool[Array, ""],
) -> dict[Path, Array]:
    """Returns the stored projections; those that are due are recomputed from the gradients.

    Where the rank is the whole side, nothing is projected: P is the identity.

    A gradient of zeros has no direction, so its P does not change. A P that was never computed is
    all zeros, and is computed from the first gradient that is not zero.
    """

    def refit(G: Array, P: Array, matrix: MatrixAxes) -> Array:
        rank, dim = P.shape[-2:]
        if rank == dim:
            return jnp.broadcast_to(jnp.eye(dim, dtype=P.dtype), P.shape)
        matrices = matrices_of(G, matrix)
        is_zero = ~jnp.any(matrices != 0, axis=(-2, -1), keepdims=True)
        is_missing = ~jnp.any(P != 0, axis=(-2, -1), keepdims=True)
        takes = ~is_zero & (is_due | is_missing)

        def taken() -> Array:
            return jnp.where(takes, projection(matrices, rank), P)

        return jax.lax.cond(jnp.any(takes), taken, lambda: P)

    return {
        path: P if (matrix := axes[path]) is None else refit(grads[path], P, matrix)
        for path, P in stored.items()
    }


def _keys_of_matrices(
    key: PRNGKeyArray, shapes: Mapping[Path, tuple[int, ...]], first: Int[ArrayLike, ""]
) -> Key[Array, " matrices"]:
    """Returns a key for each matrix of each leaf, from the leaf's path and the batch index."""
    hashes, indices = [], []
    for path, (*batch, _, _) in shapes.items():
        index = jnp.arange(math.prod(batch), dtype=jnp.uint32)
        if batch:
            index += jnp.asarray(first * math.prod(batch[1:]), jnp.uint32)
        hashes.append(jnp.full(index.shape, stable_hash(path), jnp.uint32))
        indices.append(index)
    if not shapes:
        return key[None][:0]

    def key_of(path_hash: Array, index: Array) -> PRNGKeyArray:
        return jax.random.fold_in(jax.random.fold_in(key, path_hash), index)

    return jax.vmap(key_of)(jnp.concatenate(hashes), jnp.concatenate(indices))


def check_projection(
    projection: Callable[..., Array], rank: int, matrices: jax.ShapeDtypeStruct
) -> None:
    """Checks what a projection of `matrices`, (*batch, dim, channels), returns; nothing runs.

    Raises:
      TypeError: If `projection` returns another dtype than float32, or no array.
      ValueError: If `projection` returns another shape than `(rank, dim)`, with the batch axes in
        front if it is a function of the gradient.
    """
    *batch, dim, _ = matrices.shape
    if keeps_state(projection):
        expected = (*batch, rank, dim)
        P = jax.eval_shape(lambda G: projection(G, rank), matrices)
    else:
        expected = (rank, dim)
        key = jax.eval_shape(lambda: jax.random.key(0))
        P = jax.eval_shape(lambda k, refresh: projection(k, refresh, rank, dim), key, jnp.int32(0))
    name = getattr(projection, "__name__", repr(projection))
    if getattr(P, "dtype", None) != jnp.float32:
        raise TypeError(f"projection {name} must return a float32 array, got {P!r}.")
    if P.shape != expected:
        what = "(*batch, rank, dim)" if batch else "(rank, dim)"
        raise ValueError(f"projection {name} must return shape {what} = {expected}, got {P.shape}.")
