"""What the kernels of all chips have in common."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from apollo_optax._matrices import MatrixAxes, without_overflow


def need_no_transpose(G: Any, mu: Any, axes: MatrixAxes) -> bool:
    """Whether the matrices are a leaf's last two axes, of dtypes that kernels read."""
    return (
        axes.batch == tuple(range(len(axes.batch)))
        and len(axes.projected) == len(axes.channel) == 1
        and G.dtype in (jnp.float32, jnp.bfloat16)
        and mu.dtype == jnp.float32
    )


class Sizes(NamedTuple):
    """What a kernel works on: P of `(rank, dim)` for each of the matrices of `dim` x `channels`.

    Attributes:
      matrices: Their number.
      rank: Rows of P.
      dim: Size of the projected side.
      channels: Size of the other.
      dim_is_last: Whether the projected side is the last axis of G.
    """

    matrices: int
    rank: int
    dim: int
    channels: int
    dim_is_last: bool


class Program(NamedTuple):
    """A kernel and how its blocks pass over the arrays.

    Attributes:
      kernel: Takes references to the decays, P, G and both moments, then to what it writes: both
        moments, and squared norms of direction, R and G.
      grid: As of `pl.pallas_call`.
      decays: Block of (b1, b2, eps).
      P: Block of `(matrices, rank, dim)`.
      G: Block of `(matrices, dim, channels)`, or with `dim_is_last` across.
      moments: Block of `(matrices, rank, channels)`.
      norms: Block of `(matrices, 1, channels)`.
      options: More of `pl.pallas_call`'s.
    """

    kernel: Callable[..., None]
    grid: tuple[int, ...]
    decays: pl.BlockSpec
    P: pl.BlockSpec
    G: pl.BlockSpec
    moments: pl.BlockSpec
    norms: pl.BlockSpec
    options: dict[str, Any]


def update_moments(
    R: Float[Array, "rank width"],
    mu: Float[Array, "rank width"],
    nu: Float[Array, "rank width"],
    decays_ref: Any,
) -> tuple[Array, Array, Array]:
    """Both moments after a step, and Adam's direction without its bias correction."""
    b1, b2, eps = decays_ref[0], decays_ref[1], decays_ref[2]
    R = without_overflow(R)
    mu = b1 * mu + (1 - b1) * R
    nu = b2 * nu + (1 - b2) * jnp.square(R)
    return mu, nu, mu / (jnp.sqrt(nu) + eps)
