"""Turns a seed or PRNG key into the uint32 array that the optimizer state keeps, and back."""

import numbers
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, UInt32

# Fixed, so that a seed gives the same projections with any default generator.
_SEED_IMPLEMENTATION = "threefry2x32"


def _is_typed(key: Any) -> bool:
    return isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)


def _is_raw(key: Any) -> bool:
    return isinstance(key, jax.Array) and key.dtype == jnp.uint32 and key.ndim == 1


def _is_seed(key: Any) -> bool:
    if isinstance(key, jax.Array):
        return key.ndim == 0 and jnp.issubdtype(key.dtype, jnp.integer)
    return isinstance(key, numbers.Integral) and not isinstance(key, bool)


def require_key(name: str, key: Any) -> None:
    """Raises TypeError or ValueError unless `key` is an int seed or one PRNG key."""
    if _is_typed(key):
        if key.shape:
            raise ValueError(
                f"{name} must be one PRNG key, got an array of keys of shape {key.shape}."
            )
    elif not (_is_raw(key) or _is_seed(key)):
        raise TypeError(f"{name} must be an int seed or a key from jax.random.key, got {key!r}.")
    elif isinstance(key, int) and not -(2**63) <= key < 2**63:
        raise ValueError(f"{name} must be a seed from -2**63 to 2**63 - 1, got {key!r}.")


def key_data(key: int | PRNGKeyArray) -> UInt32[Array, "..."]:
    """Returns a key's data in a new buffer; donating the state must not delete the user's key."""
    if _is_seed(key):
        return jax.random.key_data(jax.random.key(key, impl=_SEED_IMPLEMENTATION))
    return jnp.copy(jax.random.key_data(key) if _is_typed(key) else key)


def threefry_key(data: UInt32[Array, " words"]) -> PRNGKeyArray:
    """Returns a Threefry key from the data of any generator's key.

    JAX's `rbg` generators draw for a whole batch of keys from the first key. The projection of a
    matrix would then depend on the matrices beside it.
    """
    key = jax.random.wrap_key_data(data[:2], impl=_SEED_IMPLEMENTATION)
    for word in data[2:]:
        key = jax.random.fold_in(key, word)
    return key
