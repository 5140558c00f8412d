"""What the kernels of TPUs and GPUs have in common: what they return, need and cost.

Both read a gradient once for its projection, its norms and the moments. XLA makes two programs of
projection and norms, and each reads the gradient.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, ArrayLike, Float

from apollo_optax._matrices import MatrixAxes


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


def decays(b1: ArrayLike, b2: ArrayLike, eps: ArrayLike) -> Float[Array, "3"]:
    """The scalars of a kernel, which may be traced."""
    return jnp.stack([jnp.asarray(x, jnp.float32) for x in (b1, b2, eps)])


def update_moments(
    R: Float[Array, "rank width"],
    mu: Float[Array, "rank width"],
    nu: Float[Array, "rank width"],
    decays_ref: Any,
) -> tuple[Array, Array, Array]:
    """Both moments after a step, and Adam's direction without its bias correction."""
    b1, b2, eps = decays_ref[0], decays_ref[1], decays_ref[2]
    mu = b1 * mu + (1 - b1) * R
    nu = b2 * nu + (1 - b2) * jnp.square(R)
    return mu, nu, mu / (jnp.sqrt(nu) + eps)


def cost_of(matrices: int, rank: int, dim: int, channels: int, itemsize: int) -> pl.CostEstimate:
    """What a kernel does: P and G are read, moments read and written, norms written, each once.

    >>> cost_of(matrices=1, rank=8, dim=128, channels=256, itemsize=2).bytes_accessed
    105472
    """
    moved = itemsize * dim * channels + 4 * (rank * dim + 4 * rank * channels + 3 * channels)
    return pl.CostEstimate(
        flops=2 * matrices * (rank + 1) * dim * channels,
        bytes_accessed=matrices * moved,
        transcendentals=matrices * rank * channels,
    )
