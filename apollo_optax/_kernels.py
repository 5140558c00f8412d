"""A TPU kernel that reads a gradient once for both its projection and its norms.

XLA makes two programs of the two, and each reads the gradient.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from apollo_optax._matrices import MatrixAxes

# A TPU's tiles of float32 are of 8 rows and 128 columns.
_ROWS, _COLUMNS = 8, 128
# P stays in the chip's own memory, twice while that of the next matrix comes.
_MOST_P_BYTES = 8 << 20
_VMEM_BYTES = 32 << 20
_BLOCK = 512


def fits(P: Float[Array, "*batch rank dim"], G: Float[Array, "*leaf"], axes: MatrixAxes) -> bool:
    """Whether the kernel can take these: whole tiles, a small P, axes that need no transpose."""
    batch = len(axes.batch)
    matrices_are_last = (
        axes.batch == tuple(range(batch)) and len(axes.projected) == len(axes.channel) == 1
    )
    rank, dim = P.shape[-2:]
    return (
        matrices_are_last
        and G.dtype in (jnp.float32, jnp.bfloat16)
        and rank % _ROWS == 0
        and dim % _COLUMNS == 0
        and 4 * rank * dim <= _MOST_P_BYTES
    )


def project_and_square(
    P: Float[Array, "*batch rank dim"],
    G: Float[Array, "*leaf"],
    axes: MatrixAxes,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "*batch rank channels"], Float[Array, "*batch channels"]]:
    """R = P G and the squared norm of every channel of G, both in float32.

    Args:
      P: Projections, float32.
      G: Matrices; `fits` holds for them.
      axes: Of G.
      interpret: Run it as a program of JAX, on any machine.
    """
    batch_shape, (rank, dim) = P.shape[:-2], P.shape[-2:]
    matrices, channels = math.prod(batch_shape), G.shape[axes.channel[0]]
    dim_is_last = axes.projected[0] == G.ndim - 1
    depth = max(size for size in range(_COLUMNS, _BLOCK + 1, _COLUMNS) if dim % size == 0)
    width = min(_BLOCK, channels)

    if dim_is_last:
        block = pl.BlockSpec((None, width, depth), lambda b, j, k: (b, j, k))
    else:
        block = pl.BlockSpec((None, depth, width), lambda b, j, k: (b, k, j))
    R, squares = pl.pallas_call(
        functools.partial(_kernel, depth=depth, dim_is_last=dim_is_last),
        grid=(matrices, pl.cdiv(channels, width), dim // depth),
        in_specs=[pl.BlockSpec((None, rank, dim), lambda b, j, k: (b, 0, 0)), block],
        out_specs=[
            pl.BlockSpec((None, rank, width), lambda b, j, k: (b, 0, j)),
            pl.BlockSpec((None, 1, width), lambda b, j, k: (b, 0, j)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((matrices, rank, channels), jnp.float32),
            jax.ShapeDtypeStruct((matrices, 1, channels), jnp.float32),
        ],
        cost_estimate=cost_of(matrices, rank, dim, channels, G.dtype.itemsize),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=_VMEM_BYTES,
        ),
        interpret=interpret,
    )(P.reshape(matrices, rank, dim), G.reshape(matrices, *G.shape[-2:]))
    return R.reshape(*batch_shape, rank, channels), squares.reshape(*batch_shape, channels)


def cost_of(matrices: int, rank: int, dim: int, channels: int, itemsize: int) -> pl.CostEstimate:
    """What the kernel does: every block of P, G and R is moved once.

    >>> cost_of(matrices=1, rank=8, dim=128, channels=256, itemsize=2).bytes_accessed
    78848
    """
    moved = itemsize * dim * channels + 4 * rank * dim + 4 * (rank + 1) * channels
    return pl.CostEstimate(
        flops=2 * matrices * (rank + 1) * dim * channels,
        bytes_accessed=matrices * moved,
        transcendentals=0,
    )


def _kernel(
    p_ref: Any, g_ref: Any, r_ref: Any, squares_ref: Any, *, depth: int, dim_is_last: bool
) -> None:
    """Adds a block's share. P is all there; G is (depth, width), or across with `dim_is_last`."""
    k = pl.program_id(2)

    @pl.when(k == 0)
    def _() -> None:
        r_ref[...] = jnp.zeros_like(r_ref)
        squares_ref[...] = jnp.zeros_like(squares_ref)

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
    squares_ref[...] += jnp.sum(squares, axis=0, keepdims=True)
