"""Random words by counter, cheaper on a CPU than `jax.random.bits`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Int, PRNGKeyArray, UInt32

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def threefry2x32(
    key: UInt32[Array, "2"], high: UInt32[Array, "*shape"], low: UInt32[Array, "*shape"]
) -> tuple[UInt32[Array, "*shape"], UInt32[Array, "*shape"]]:
    """Two random words for each counter (high, low): Threefry-2x32 with 20 rounds.

    `jax.random` has the same function as a loop, which goes through memory in each round; written
    out, it is one pass. Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011.
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
    """Two arrays of independent random words.

    Every word is a function of the key, the stream and its own place, so that it can be made on
    whichever device needs it.

    Args:
      key: Typed PRNG key, of any generator.
      stream: Another one gives other words.
      rows: Rows of both arrays.
      columns: Columns of both.
    """
    shape = (rows, columns)
    if str(jax.random.key_impl(key)) != "threefry2x32":
        words = jax.random.bits(jax.random.fold_in(key, stream), (2, *shape), jnp.uint32)
        return words[0], words[1]
    row, column = (jax.lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in (0, 1))
    high = jnp.full(shape, jnp.asarray(stream, jnp.uint32))
    return threefry2x32(jax.random.key_data(key), high, row * jnp.uint32(columns) + column)
