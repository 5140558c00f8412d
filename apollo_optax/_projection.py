"""Draws the projection P of a matrix's smaller side."""

import math
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray

_BITS_PER_WORD = 32


class Projection(Protocol):
    """Signature of a projection: a pure function of a leaf's key and the number of refreshes so
    far.

    It returns P of shape `(rank, dim)`, float32, with `E[P.T @ P] = I`.
    """

    def __call__(
        self, key: PRNGKeyArray, refresh: Int[ArrayLike, ""], rank: int, dim: int, /
    ) -> Float[Array, "rank dim"]:
        """Returns P for one matrix whose smaller side has size `dim`."""
        ...


def gaussian(
    key: PRNGKeyArray, refresh: Int[ArrayLike, ""], rank: int, dim: int
) -> Float[Array, "rank dim"]:
    """Draws the paper's projection: independent normal entries of variance `1 / rank`.

    Args:
      key: Typed PRNG key of the matrix.
      refresh: Number of refreshes so far, `count // update_proj_gap`; every value gives an
        independent P.
      rank: Rows of P.
      dim: Columns of P, the size of the matrix's smaller side.

    Returns:
      P of shape `(rank, dim)`, float32, with `E[P.T @ P] = I`.

    Example:
      >>> import jax
      >>> gaussian(jax.random.key(0), 0, rank=4, dim=10).shape
      (4, 10)
    """
    entries = jax.random.normal(jax.random.fold_in(key, refresh), (rank, dim), jnp.float32)
    return entries * jnp.float32(rank**-0.5)


def rademacher(
    key: PRNGKeyArray, refresh: Int[ArrayLike, ""], rank: int, dim: int
) -> Float[Array, "rank dim"]:
    """Draws independent signs `±1 / sqrt(rank)`: one random bit an entry, far cheaper than a normal
    draw.

    Arguments and result are those of `gaussian`. Every column of P has norm 1 exactly.

    Example:
      >>> import jax
      >>> P = rademacher(jax.random.key(0), 0, rank=4, dim=3)
      >>> bool((abs(P) == 0.5).all())
      True
    """
    words = jax.random.bits(
        jax.random.fold_in(key, refresh), (rank, -(-dim // _BITS_PER_WORD)), jnp.uint32
    )
    shifts = jnp.arange(_BITS_PER_WORD, dtype=jnp.uint32)
    bits = (words[:, :, None] >> shifts[None, None, :]) & 1
    bits = bits.reshape(rank, -1)[:, :dim]
    magnitude = jnp.float32(rank**-0.5)
    return jnp.where(bits == 1, magnitude, -magnitude)


def svd(G: Float[Array, "*batch dim channels"], rank: int) -> Float[Array, "*batch rank dim"]:
    """Takes the projection from the gradient itself: the paper's "APOLLO with SVD".

    Pass it as `projection=svd`. Unlike the random projections it cannot be redrawn, so P is kept in
    the optimizer state (`rank * dim` more numbers a matrix) and recomputed at every refresh.

    Args:
      G: A gradient with its smaller side first, or a batch of them.
      rank: Number of singular vectors, at most `dim`.

    Returns:
      The `rank` leading left singular vectors of G as rows, float32.

    Example:
      >>> import jax.numpy as jnp
      >>> abs(svd(jnp.diag(jnp.array([1.0, 3.0])), rank=1)).tolist()
      [[0.0, 1.0]]
    """
    G = G.astype(jnp.promote_types(G.dtype, jnp.float32))
    left, _, _ = jnp.linalg.svd(G, full_matrices=False)
    return jnp.swapaxes(left[..., :rank], -1, -2).astype(jnp.float32)


def draw_for_each_matrix(
    draw: Projection,
    key: PRNGKeyArray,
    refresh: Int[ArrayLike, ""],
    batch_shape: tuple[int, ...],
    first: Int[ArrayLike, ""],
    rank: int,
    dim: int,
) -> Float[Array, "*batch rank dim"]:
    """Draws the projections of a leaf's matrices, each with the key of its batch index.

    `first` is where a slice of a stacked leaf starts on the leaf's leading batch axis.
    """
    if not batch_shape:
        return draw(jax.random.fold_in(key, 0), refresh, rank, dim)
    indices = jnp.arange(math.prod(batch_shape)) + first * math.prod(batch_shape[1:])
    keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(indices)
    projections = jax.vmap(lambda matrix_key: draw(matrix_key, refresh, rank, dim))(keys)
    return projections.reshape(*batch_shape, rank, dim)


def check_projection(draw: Projection, rank: int, dim: int) -> None:
    """Raises unless `draw` returns what a projection must, without running it.

    Raises:
      TypeError: Another dtype than float32, or no array.
      ValueError: Another shape than `(rank, dim)`.
    """
    key = jax.eval_shape(lambda: jax.random.key(0))
    P = jax.eval_shape(lambda k, refresh: draw(k, refresh, rank, dim), key, jnp.int32(0))
    name = getattr(draw, "__name__", repr(draw))
    if getattr(P, "dtype", None) != jnp.float32:
        raise TypeError(f"projection {name} must return a float32 array, got {P!r}.")
    if P.shape != (rank, dim):
        raise ValueError(
            f"projection {name} must return shape (rank, dim) = {(rank, dim)}, got {P.shape}."
        )
