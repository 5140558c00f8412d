"""The kernel of TPUs: blocks of G pass through the chip's memory, where R, P and moments stay."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, ArrayLike, Float

from apollo_optax._kernels import Projected, cost_of, decays, need_no_transpose, update_moments
from apollo_optax._matrices import MatrixAxes

# A TPU's tiles of float32 are of 8 rows and 128 columns.
_ROWS, _COLUMNS = 8, 128
_WIDTHS = (512, 256, 128)
_DEPTH = 512
# Of the chip's own memory, the smallest of a TPU in use having 32 MiB.
_VMEM_BYTES = 28 << 20


def fits(
    G: Float[Array, "*leaf"], mu: Float[Array, "*moments"], rank: int, dim: int, axes: MatrixAxes
) -> bool:
    """Whether the kernel can take these: whole tiles, a small P, axes that need no transpose."""
    return (
        need_no_transpose(G, mu, axes)
        and rank % _ROWS == 0
        and dim % _COLUMNS == 0
        and _vmem_bytes(rank, dim, _WIDTHS[-1]) <= _VMEM_BYTES
    )


def _vmem_bytes(rank: int, dim: int, width: int) -> int:
    """All blocks, each twice while the next one comes, and R."""
    of_moments = 4 * rank * width
    return 2 * (4 * rank * dim + 4 * _DEPTH * width + 4 * of_moments) + of_moments


def project(
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
      P: Projections, float32.
      G: Matrices; `fits` holds for them.
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
    dim_is_last = axes.projected[0] == G.ndim - 1
    depth = max(size for size in range(_COLUMNS, _DEPTH + 1, _COLUMNS) if dim % size == 0)
    width = next(size for size in _WIDTHS if _vmem_bytes(rank, dim, size) <= _VMEM_BYTES)
    width = min(width, channels)

    if dim_is_last:
        block = pl.BlockSpec((None, width, depth), lambda b, j, k: (b, j, k))
    else:
        block = pl.BlockSpec((None, depth, width), lambda b, j, k: (b, k, j))
    moments = pl.BlockSpec((None, rank, width), lambda b, j, k: (b, 0, j))
    norms = pl.BlockSpec((None, 1, width), lambda b, j, k: (b, 0, j))
    of_moments = jax.ShapeDtypeStruct((matrices, rank, channels), jnp.float32)
    of_norms = jax.ShapeDtypeStruct((matrices, 1, channels), jnp.float32)
    new_mu, new_nu, *squares = pl.pallas_call(
        functools.partial(_kernel, depth=depth, dim_is_last=dim_is_last),
        grid=(matrices, pl.cdiv(channels, width), dim // depth),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            pl.BlockSpec((None, rank, dim), lambda b, j, k: (b, 0, 0)),
            block,
            moments,
            moments,
        ],
        out_specs=[moments, moments, norms, norms, norms],
        out_shape=[of_moments, of_moments, of_norms, of_norms, of_norms],
        input_output_aliases={3: 0, 4: 1},
        scratch_shapes=[pltpu.VMEM((rank, width), jnp.float32)],
        cost_estimate=cost_of(matrices, rank, dim, channels, G.dtype.itemsize),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=_VMEM_BYTES,
        ),
        interpret=interpret,
    )(
        decays(b1, b2, eps),
        P.reshape(matrices, rank, dim),
        G.reshape(matrices, *G.shape[-2:]),
        mu.reshape(of_moments.shape),
        nu.reshape(of_moments.shape),
    )
    per_channel = (x.reshape(*batch_shape, channels) for x in squares)
    return Projected(new_mu.reshape(mu.shape), new_nu.reshape(nu.shape), *per_channel)


def _kernel(
    decays_ref: Any,
    p_ref: Any,
    g_ref: Any,
    mu_ref: Any,
    nu_ref: Any,
    new_mu_ref: Any,
    new_nu_ref: Any,
    squared_direction_ref: Any,
    squared_projection_ref: Any,
    squared_norm_ref: Any,
    r_ref: Any,
    *,
    depth: int,
    dim_is_last: bool,
) -> None:
    """Adds a block of G, (depth, width) or with `dim_is_last` across, and ends with the last."""
    k = pl.program_id(2)

    @pl.when(k == 0)
    def _() -> None:
        r_ref[...] = jnp.zeros_like(r_ref)
        squared_norm_ref[...] = jnp.zeros_like(squared_norm_ref)

    G = g_ref[...].astype(jnp.float32)
    P = p_ref[:, pl.ds(pl.multiple_of(k * depth, depth), depth)]
    contracted = ((1,), (1 if dim_is_last else 0,))
    r_ref[...] += jax.lax.dot_general(
        P, G, (contracted, ((), ())), preferred_element_type=jnp.float32
    )
    squares = jnp.square(G)
    if dim_is_last:
        # A tile's width of them, so that no more is turned.
        tiles = [squares[:, start : start + _COLUMNS] for start in range(0, depth, _COLUMNS)]
        squares = functools.reduce(jnp.add, tiles).T
    squared_norm_ref[...] += jnp.sum(squares, axis=0, keepdims=True)

    @pl.when(k == pl.num_programs(2) - 1)
    def _() -> None:
        R = r_ref[...]
        mu, nu, direction = update_moments(R, mu_ref[...], nu_ref[...], decays_ref)
        new_mu_ref[...], new_nu_ref[...] = mu, nu
        squared_direction_ref[...] = jnp.sum(jnp.square(direction), axis=0, keepdims=True)
        squared_projection_ref[...] = jnp.sum(jnp.square(R), axis=0, keepdims=True)
