"""The kernel of GPUs, by Triton: a program takes some channels and keeps their R in registers."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, ArrayLike, Float

from apollo_optax._kernels import Projected, cost_of, decays, need_no_transpose, update_moments
from apollo_optax._matrices import MatrixAxes

# Triton's blocks have powers of two for sides, and its products at least 16.
_SIDE = 16
_WIDTHS, _DEPTHS = (64, 32, 16), (32, 16)
# Elements of R of one program, and of one of its warps: 64 registers a thread, which has 255.
_ELEMENTS, _ELEMENTS_OF_A_WARP = 1 << 14, 1 << 11


def fits(
    G: Float[Array, "*leaf"], mu: Float[Array, "*moments"], rank: int, dim: int, axes: MatrixAxes
) -> bool:
    """Whether the kernel can take these: whole blocks, a small R, axes that need no transpose."""
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

    Every program reads all of P, which is small enough for a GPU's second cache to give it.

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
    depth = next(size for size in _DEPTHS if dim % size == 0)
    width = _width(rank, channels)
    assert width is not None

    if dim_is_last:
        block = pl.BlockSpec((None, width, dim), lambda j, b: (b, j, 0))
    else:
        block = pl.BlockSpec((None, dim, width), lambda j, b: (b, 0, j))
    moments = pl.BlockSpec((None, rank, width), lambda j, b: (b, 0, j))
    norms = pl.BlockSpec((None, width), lambda j, b: (b, j))
    of_moments = jax.ShapeDtypeStruct((matrices, rank, channels), jnp.float32)
    of_norms = jax.ShapeDtypeStruct((matrices, channels), jnp.float32)
    new_mu, new_nu, *squares = pl.pallas_call(
        functools.partial(_kernel, depth=depth, dim_is_last=dim_is_last),
        grid=(channels // width, matrices),
        in_specs=[
            pl.BlockSpec((3,), lambda j, b: (0,)),
            pl.BlockSpec((None, rank, dim), lambda j, b: (b, 0, 0)),
            block,
            moments,
            moments,
        ],
        out_specs=[moments, moments, norms, norms, norms],
        out_shape=[of_moments, of_moments, of_norms, of_norms, of_norms],
        input_output_aliases={3: 0, 4: 1},
        cost_estimate=cost_of(matrices, rank, dim, channels, G.dtype.itemsize),
        compiler_params=plgpu.CompilerParams(
            num_warps=8 if rank * width > 4 * _ELEMENTS_OF_A_WARP else 4, num_stages=2
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
