"""The kernel of GPUs, by Triton: a program takes some channels and keeps their R in registers."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from apollo_optax._matrices import MatrixAxes
from apollo_optax.experimental._program import Program, Sizes, need_no_transpose, update_moments

# Triton's blocks have powers of two for sides, and its products at least 16.
_SIDE = 16
_WIDTHS, _DEPTHS = (64, 32, 16), (32, 16)
# Elements of R of one program, and of one of its warps: 64 registers a thread, which has 255.
_ELEMENTS, _ELEMENTS_OF_A_WARP = 1 << 14, 1 << 11

TAKES = (
    "it takes the last two axes in float32 or bfloat16, float32 moments, a rank of 1 or a multiple "
    "of 16, sides that are multiples of 16, and no R beyond its registers"
)


def fits(G: Any, mu: Any, rank: int, dim: int, axes: MatrixAxes) -> bool:
    """Whether the kernel takes these arrays or shapes: whole blocks, a small R, no transpose."""
    return (
        need_no_transpose(G, mu, axes)
        and (rank == 1 or rank % _SIDE == 0)
        and dim % _SIDE == 0
        and _width(rank, G.shape[axes.channel[0]]) is not None
    )


def _width(rank: int, channels: int) -> int | None:
    """Channels of a program."""
    widths = (size for size in _WIDTHS if channels % size == 0 and rank * size <= _ELEMENTS)
    return next(widths, None)


def _powers_of_two(rank: int) -> list[tuple[int, int]]:
    """Where parts of R start, and their rows.

    >>> _powers_of_two(208)
    [(0, 128), (128, 64), (192, 16)]
    """
    bits = [bit for bit in reversed(range(rank.bit_length())) if rank >> bit & 1]
    return [((rank >> bit + 1) << bit + 1, 1 << bit) for bit in bits]


def program(sizes: Sizes) -> Program:
    """The kernel for these sizes.

    Each of its programs reads all of P, which is small enough for a GPU's second cache to give it.
    """
    matrices, rank, dim, channels, dim_is_last = sizes
    depth, width = next(size for size in _DEPTHS if dim % size == 0), _width(rank, channels)
    assert width is not None
    if dim_is_last:
        block = pl.BlockSpec((None, width, dim), lambda j, b: (b, j, 0))
    else:
        block = pl.BlockSpec((None, dim, width), lambda j, b: (b, 0, j))
    num_warps = 8 if rank * width > 4 * _ELEMENTS_OF_A_WARP else 4
    return Program(
        functools.partial(_kernel, depth=depth, dim_is_last=dim_is_last),
        grid=(channels // width, matrices),
        decays=pl.BlockSpec((3,), lambda j, b: (0,)),
        P=pl.BlockSpec((None, rank, dim), lambda j, b: (b, 0, 0)),
        G=block,
        moments=pl.BlockSpec((None, rank, width), lambda j, b: (b, 0, j)),
        norms=pl.BlockSpec((None, None, width), lambda j, b: (b, 0, j)),
        options={"compiler_params": plgpu.CompilerParams(num_warps=num_warps, num_stages=2)},
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
    *,
    depth: int,
    dim_is_last: bool,
) -> None:
    """All of some channels: G is (dim, width), or with `dim_is_last` across."""
    rank, dim = p_ref.shape
    width = mu_ref.shape[1]
    parts = _powers_of_two(rank)
    axis = 1 if dim_is_last else 0

    def add(k: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        along = pl.ds(k * depth, depth)
        G = (g_ref[:, along] if dim_is_last else g_ref[along, :]).astype(jnp.float32)

        def product(start: int, size: int) -> Array:
            if rank == 1:
                row = p_ref[0, along]
                return jnp.sum(G * (row[None] if dim_is_last else row[:, None]), axis=axis)[None]
            P = p_ref[pl.ds(start, size), along]
            contracted = ((1,), (axis,)), ((), ())
            return jax.lax.dot_general(P, G, contracted, preferred_element_type=jnp.float32)

        *R, squares = sums
        R = [rows + product(*part) for rows, part in zip(R, parts, strict=True)]
        return (*R, squares + jnp.sum(jnp.square(G), axis=axis))

    zeros = [jnp.zeros((size, width), jnp.float32) for _, size in parts]
    nothing = jnp.zeros((width,), jnp.float32)
    *R, squared_norm_ref[...] = jax.lax.fori_loop(0, dim // depth, add, (*zeros, nothing))

    squared_direction, squared_projection = nothing, nothing
    for rows, (start, size) in zip(R, parts, strict=True):
        part = pl.ds(start, size), slice(None)
        mu, nu, direction = update_moments(rows, mu_ref[part], nu_ref[part], decays_ref)
        new_mu_ref[part], new_nu_ref[part] = mu, nu
        squared_direction += jnp.sum(jnp.square(direction), axis=0)
        squared_projection += jnp.sum(jnp.square(rows), axis=0)
    squared_direction_ref[...] = squared_direction
    squared_projection_ref[...] = squared_projection
