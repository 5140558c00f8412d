"""Reads a gradient once for its projection, its norms and the moments, by a chip's own kernel.

XLA makes two programs of projection and norms, and each reads the gradient. `_kernels_tpu` and
`_kernels_gpu` have the kernels; here is what they have in common.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, ArrayLike, Float

from apollo_optax._matrices import MatrixAxes, without_overflow


class Projected(NamedTuple):
    """What a step makes of a gradient before it is scaled.

    Attributes:
      mu: First moment of R = P G, `(*batch, rank, *channel)`.
      nu: Second moment.
      squared_direction: Squared norm of `mu / (sqrt(nu) + eps)` for every channel,
        `(*batch, *channel)`.
      squared_projection: Squared norm of R for every channel.
      squared_norm: Squared norm of G for every channel.
    """

    mu: Array
    nu: Array
    squared_direction: Array
    squared_projection: Array
    squared_norm: Array


def need_no_transpose(
    G: Float[Array, "*leaf"], mu: Float[Array, "*moments"], axes: MatrixAxes
) -> bool:
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


def project(
    program_of: Callable[[Sizes], Program],
    P: Float[Array, "*batch rank dim"],
    G: Float[Array, "*leaf"],
    mu: Float[Array, "*batch rank channels"],
    nu: Float[Array, "*batch rank channels"],
    axes: MatrixAxes,
    *,
    b1: ArrayLike,
    b2: ArrayLike,
    eps: ArrayLike,
    interpret: bool = False,
) -> Projected:
    """The moments of R = P G and the norms, all in float32.

    Args:
      program_of: The chip's.
      P: Projections, float32.
      G: Matrices; the chip's `fits` holds for them.
      mu: First moments before the step, float32; their memory is taken over.
      nu: Second moments before the step.
      axes: Of G.
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to the root of the second moment.
      interpret: Run it as a program of JAX, on any machine.
    """
    batch_shape, (rank, dim) = P.shape[:-2], P.shape[-2:]
    matrices, channels = math.prod(batch_shape), G.shape[axes.channel[0]]
    sizes = Sizes(matrices, rank, dim, channels, dim_is_last=axes.projected[0] == G.ndim - 1)
    program = program_of(sizes)
    of_moments = jax.ShapeDtypeStruct((matrices, rank, channels), jnp.float32)
    of_norms = jax.ShapeDtypeStruct((matrices, 1, channels), jnp.float32)
    new_mu, new_nu, *squares = pl.pallas_call(
        program.kernel,
        grid=program.grid,
        in_specs=[program.decays, program.P, program.G, program.moments, program.moments],
        out_specs=[program.moments] * 2 + [program.norms] * 3,
        out_shape=[of_moments] * 2 + [of_norms] * 3,
        input_output_aliases={3: 0, 4: 1},
        cost_estimate=cost_of(sizes, G.dtype.itemsize),
        interpret=interpret,
        **program.options,
    )(
        jnp.stack([jnp.asarray(x, jnp.float32) for x in (b1, b2, eps)]),
        P.reshape(matrices, rank, dim),
        G.reshape(matrices, *G.shape[-2:]),
        mu.reshape(of_moments.shape),
        nu.reshape(of_moments.shape),
    )
    per_channel = (x.reshape(*batch_shape, channels) for x in squares)
    return Projected(new_mu.reshape(mu.shape), new_nu.reshape(nu.shape), *per_channel)


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


def cost_of(sizes: Sizes, itemsize: int) -> pl.CostEstimate:
    """What a kernel does: P and G are read, moments read and written, norms written, each once.

    >>> cost_of(Sizes(1, rank=8, dim=128, channels=256, dim_is_last=False), 2).bytes_accessed
    105472
    """
    matrices, rank, dim, channels, _ = sizes
    moved = itemsize * dim * channels + 4 * (rank * dim + 4 * rank * channels + 3 * channels)
    return pl.CostEstimate(
        flops=2 * matrices * (rank + 1) * dim * channels,
        bytes_accessed=matrices * moved,
        transcendentals=matrices * rank * channels,
    )
