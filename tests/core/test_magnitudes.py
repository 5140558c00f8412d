import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apollo_optax._magnitudes import largest_magnitude, largest_of_tree


def normal(*shape):
    return jax.random.normal(jax.random.key(0), shape)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("shape", [(), (5,), (64, 64), (3, 64, 100)], ids=str)
def test_it_is_numpys_and_nan_wherever_an_entry_is_nan(shape, dtype):
    x = normal(*shape).astype(dtype)
    for value in (None, -jnp.inf, jnp.nan):
        y = x if value is None else x.ravel().at[-1].set(value).reshape(shape)
        expected = np.max(np.abs(np.asarray(y, np.float32)))
        for found in (largest_magnitude(y), jax.jit(largest_magnitude)(y)):
            assert found.dtype == dtype
            np.testing.assert_array_equal(np.float32(found).ravel(), expected)


def test_along_axes_it_keeps_them():
    x = normal(3, 64, 100).at[1, 2, 3].set(jnp.nan)
    expected = np.max(np.abs(x), axis=(1, 2), keepdims=True)
    np.testing.assert_array_equal(largest_magnitude(x, (1, 2)), expected)


def test_of_a_tree_it_is_the_largest_of_all_leaves():
    tree = {"a": normal(64, 64), "b": jnp.full(3, -7.0, jnp.bfloat16), "c": None}
    assert largest_of_tree(tree) == 7
    assert jnp.isnan(largest_of_tree(tree | {"d": jnp.full((64, 64), jnp.nan)}))
    assert largest_of_tree({"a": None}) == largest_of_tree(jnp.zeros((0, 3))) == 0
