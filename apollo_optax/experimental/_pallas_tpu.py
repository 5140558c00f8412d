"""The kernel of TPUs: blocks of G pass through the chip's memory, where R, P and moments stay."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from apollo_optax._matrices import MatrixAxes
from apollo_optax.experimental._program import Program, Sizes, need_no_transpose, update_moments

# A TPU's tiles of float32 are of 8 rows and 128 columns.
_ROWS, _COLUMNS = 8, 128
_WIDTHS = (512, 256, 128)
_DEPTH = 512
# Of the chip's own memory, the smallest of a TPU in use having 32 MiB.
_VMEM_BYTES = 28 << 20

TAKES = (
    "it takes the last two axes in float32 or bfloat16, float32 moments, a rank that is a multiple "
    "of 8, a smaller side that is a multiple of 128, and no P beyond the chip's own memory"
)


def fits(G: Any, mu: Any, rank: int, dim: int, axes: MatrixAxes) -> bool:
    """Whether the kernel takes these arrays or shapes: whole tiles, a small P, no transpose."""
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


def program(sizes: Sizes) -> Program:
    """The kernel for these sizes."""
    matrices, rank, dim, channels, dim_is_last = sizes
    depth = max(size for size in range(_COLUMNS, _DEPTH + 1, _COLUMNS) if dim % size == 0)
    width = next(size for size in _WIDTHS if _vmem_bytes(rank, dim, size) <= _VMEM_BYTES)
    width = min(width, channels)
    if dim_is_last:
        block = pl.BlockSpec((None, width, depth), lambda b, j, k: (b, j, k))
    else:
        block = pl.BlockSpec((None, depth, width), lambda b, j, k: (b, k, j))
    return Program(
        functools.partial(_kernel, depth=depth, dim_is_last=dim_is_last),
        grid=(matrices, pl.cdiv(channels, width), dim // depth),
        decays=pl.BlockSpec(memory_space=pltpu.SMEM),
        P=pl.BlockSpec((None, rank, dim), lambda b, j, k: (b, 0, 0)),
        G=block,
        moments=pl.BlockSpec((None, rank, width), lambda b, j, k: (b, 0, j)),
        norms=pl.BlockSpec((None, 1, width), lambda b, j, k: (b, 0, j)),
        options={
            "scratch_shapes": [pltpu.VMEM((rank, width), jnp.float32)],
            "compiler_params": pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"),
                vmem_limit_bytes=_VMEM_BYTES,
            ),
        },
    )


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
