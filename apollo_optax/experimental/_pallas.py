"""Reads a gradient once for its projection, its norms and the moments, by a chip's own kernel.

XLA makes two programs of projection and norms, and each reads the gradient. `_pallas_tpu` has the
kernel of TPUs; here is what does not depend on the chip.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, ArrayLike, Float

from apollo_optax._apollo import Granularity
from apollo_optax._leaves import Hyperparameters
from apollo_optax._limiter import NORM_EPS
from apollo_optax._matrices import MatrixAxes
from apollo_optax._placement import compiler_divides_arrays
from apollo_optax.experimental import _pallas_tpu
from apollo_optax.experimental._program import Program, Sizes


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


def pallas_tpu(
    P: Float[Array, "*batch rank dim"],
    G: Float[Array, "*leaf"],
    mu: Float[Array, "*moments"],
    nu: Float[Array, "*moments"],
    axes: MatrixAxes,
    hyper: Hyperparameters,
    granularity: Granularity,
) -> tuple[Array, Array, Array, Array]:
    """The kernel for TPUs. Pass it as `implementation`.

    The kernel takes matrices on the last two axes in float32 or bfloat16, float32 moments, a rank
    that is a multiple of 8, a smaller side that is a multiple of 128, and "channel" or "tensor".
    The kernel runs on one device, or within `jax.shard_map` with `check_vma=False`, since XLA
    cannot divide a kernel.

    Raises:
      NotImplementedError: If the kernel does not take an argument, which the message names.

    Example:
      >>> import jax.numpy as jnp
      >>> from apollo_optax import apollo
      >>> from apollo_optax.experimental import pallas_tpu
      >>> tx = apollo(0.01, rank=128, implementation=pallas_tpu)
    """
    return _fused(_pallas_tpu, P, G, mu, nu, axes, hyper, granularity)


def _fused(
    kernels: Any,
    P: Array,
    G: Array,
    mu: Array,
    nu: Array,
    axes: MatrixAxes,
    hyper: Hyperparameters,
    granularity: Granularity,
) -> tuple[Array, Array, Array, Array]:
    """Moments, factors and squared norms as `apollo_update` computes them."""
    if callable(granularity):
        raise NotImplementedError(
            "A kernel computes factors with granularity 'channel' or 'tensor', got a function; "
            "leave implementation out."
        )
    if compiler_divides_arrays():
        raise NotImplementedError(
            "XLA cannot divide a kernel over the mesh that is set. Leave implementation out, or "
            "update within jax.shard_map with check_vma=False."
        )
    if not kernels.fits(G, mu, *P.shape[-2:], axes):
        raise NotImplementedError(
            f"The kernel does not take a {G.dtype} gradient of shape {G.shape} at rank "
            f"{P.shape[-2]} with {mu.dtype} moments and axes {tuple(axes)}: {kernels.TAKES}. Leave "
            f"implementation out, or give this leaf a transformation of its own with "
            f"optax.partition."
        )
    rank_axis = len(axes.batch)
    found = project(kernels.program, P, G, mu, nu, axes, b1=hyper.b1, b2=hyper.b2, eps=hyper.eps)
    squares = found.squared_direction, found.squared_projection, found.squared_norm
    direction, projection, G_squared = (jnp.expand_dims(x, rank_axis) for x in squares)
    if granularity == "tensor":
        direction, projection = (
            jnp.sum(x, axis=rank_axis + 1, keepdims=True) for x in (direction, projection)
        )
    s = jnp.sqrt(direction) / (jnp.sqrt(projection) + NORM_EPS)
    return found.mu, found.nu, s, G_squared


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
