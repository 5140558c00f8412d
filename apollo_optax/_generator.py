"""Random words and normals in one pass.

The projections are drawn at every step and never stored, so that their generator is a large part of
the update. On a CPU `jax.random.normal` takes several times as long; `benchmarks/generator.py`
compares the two.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray, UInt32

from apollo_optax._keys import threefry_key

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def threefry2x32(
    key: UInt32[Array, "2"], high: UInt32[Array, "*shape"], low: UInt32[Array, "*shape"]
) -> tuple[UInt32[Array, "*shape"], UInt32[Array, "*shape"]]:
    """Returns two random words for each counter (high, low): Threefry-2x32 with 20 rounds.

    On a CPU `jax.random` has the same function as a loop, which goes through memory in each round.
    Here the rounds are written out and make one pass. The reference is Salmon et al., Parallel
    Random Numbers: As Easy as 1, 2, 3, 2011.
    """
    schedule = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(_PARITY))
    x, y = high + schedule[0], low + schedule[1]
    for group in range(5):
        for bits in _ROTATIONS[group % 2]:
            x = x + y
            y = ((y << bits) | (y >> (32 - bits))) ^ x
        x = x + schedule[(group + 1) % 3]
        y = y + schedule[(group + 2) % 3] + jnp.uint32(group + 1)
    return x, y


def random_words(
    key: PRNGKeyArray, stream: Int[ArrayLike, ""], rows: int, columns: int
) -> tuple[UInt32[Array, "rows columns"], UInt32[Array, "rows columns"]]:
    """Returns two arrays of independent random words.

    Every word is a function of the key, the stream and the word's place, so that each device can
    make the words that it needs.

    Args:
      key: A typed PRNG key, of any generator.
      stream: The number of the stream; another number gives other words.
      rows: The number of rows of both arrays.
      columns: The number of columns of both arrays.
    """
    shape = (rows, columns)
    row, column = (jax.lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in (0, 1))
    high = jnp.full(shape, jnp.asarray(stream, jnp.uint32))
    words = jax.random.key_data(threefry_key(jax.random.key_data(key)))
    return threefry2x32(words, high, row * jnp.uint32(columns) + column)


def random_bits(key: PRNGKeyArray, shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """Returns `jax.random.bits(key, shape, jnp.uint32)`, made in one pass also on a CPU.

    A number of 2^32 and more, which take counters of two words, and the numbers of other generators
    than Threefry are left to JAX.
    """
    if str(jax.random.key_impl(key)) != "threefry2x32" or math.prod(shape) >= 2**32:
        return jax.random.bits(key, shape, jnp.uint32)
    place = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = jnp.uint32(math.prod(shape[axis + 1 :]))
        place += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    x, y = threefry2x32(jax.random.key_data(key), jnp.zeros_like(place), place)
    return x ^ y


def normal_of_words(
    u: UInt32[Array, "*shape"], v: UInt32[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Returns a standard normal from two words, r cos(angle) (Box and Muller, 1958).

    The radius has 24 bits, and is at most 5.77. The angle has 2 bits for the quadrant and 24 bits
    for a place within [-pi/4, pi/4], where the Taylor polynomials are accurate to float32. An angle
    of another quarter turn gives a normal that is independent of the first.
    """
    radius = jnp.sqrt(
        -2 * jnp.log((u >> 8).astype(jnp.int32).astype(jnp.float32) * 2**-24 + 2**-24)
    )
    place = ((v << 2) >> 8).astype(jnp.int32).astype(jnp.float32) * 2**-24 - 0.5
    x = place * jnp.float32(math.pi / 2)
    square = jnp.square(x)
    sine = x * _polynomial(square, (1, -1 / 6, 1 / 120, -1 / 5040, 1 / 362880))
    cosine = _polynomial(square, (1, -1 / 2, 1 / 24, -1 / 720, 1 / 40320))
    quarter = v >> 30
    # cos, -sin, -cos, sin
    turned = jnp.where(quarter & 1 == 1, sine, cosine)
    return jnp.where((quarter == 1) | (quarter == 2), -radius, radius) * turned


def _polynomial(x: Float[Array, "*shape"], coefficients: tuple[float, ...]) -> Array:
    *others, value = (jnp.float32(c) for c in coefficients)
    for coefficient in reversed(others):
        value = value * x + coefficient
    return value


def stored(function: Callable[..., Any], *args: Any) -> Any:
    """Returns `function(*args)`, computed once on a CPU and not again for each use.

    XLA's CPU compiler drops optimization barriers before fusion, but not a call that it must not
    inline.
    """

    def in_line(*args: Any) -> Any:
        with set_xla_metadata(inlineable=None):  # the call only, not what it calls
            return function(*args)

    def call(*args: Any) -> Any:
        with set_xla_metadata(inlineable="false"):
            return jax.jit(in_line)(*args)

    return jax.lax.platform_dependent(*args, cpu=call, default=function)
