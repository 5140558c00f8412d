"""SWAN's whitened gradients."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from apollo_optax import ApolloDimensionNumbers, scale_by_swan, swan

DENSE = ApolloDimensionNumbers(-2, -1)


def whitened(g, numbers=DENSE):
    tx = scale_by_swan(weight_dimension_numbers=numbers)
    return jax.jit(tx.update)({"w": g}, tx.init({"w": g}))[0]["w"]


def gradient(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("shape", [(24, 60), (60, 24), (32, 32)])
def test_singular_values_are_near_the_root_of_the_larger_side(shape):
    U = whitened(gradient(*shape) @ jnp.diag(jnp.linspace(0.1, 3, shape[1])))
    values = jnp.linalg.svd(U / max(shape) ** 0.5, compute_uv=False)
    assert values.min() > 0.5
    assert values.max() < 1.3  # the iteration's, which does not converge to 1
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(U**2)), 1, atol=0.25)


def test_it_is_optaxs_orthogonalization_of_outputs_of_one_size():
    g = gradient(24, 60)
    X = g / jnp.sqrt(jnp.mean(g**2, axis=0, keepdims=True))
    numbers = optax.contrib.MuonDimensionNumbers(0, 1)
    muon = optax.contrib.scale_by_muon(
        beta=0.0, nesterov=False, weight_dimension_numbers={"w": numbers}
    )
    expected = muon.update({"w": X}, muon.init({"w": X}))[0]["w"]
    # Optax reshapes to have the larger side first; the products round differently.
    np.testing.assert_allclose(whitened(g), 60**0.5 * expected, atol=1e-4)


def test_the_size_of_an_output_does_not_matter():
    g, sizes = gradient(24, 60), jnp.geomspace(1e-6, 1e6, 60)
    np.testing.assert_allclose(whitened(g * sizes[None]), whitened(g), rtol=1e-3, atol=1e-4)
    # Of an input it does: its gradient is not brought to one size.
    assert jnp.abs(whitened(g * jnp.geomspace(1e-2, 1e2, 24)[:, None]) - whitened(g)).max() > 0.1


def test_every_matrix_of_a_stack_is_whitened_by_itself():
    stack = gradient(3, 24, 60)
    expected = jnp.stack([whitened(g) for g in stack])
    np.testing.assert_allclose(whitened(stack), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "numbers", "as_matrix"),
    [
        ((24, 4, 15), ApolloDimensionNumbers(0, (1, 2)), (24, 60)),
        ((4, 15, 24), ApolloDimensionNumbers((0, 1), 2), (60, 24)),
    ],
)
def test_heads_are_one_matrix_where_the_axes_say_so(shape, numbers, as_matrix):
    g = gradient(*shape)
    expected = whitened(g.reshape(as_matrix)).reshape(shape)
    np.testing.assert_allclose(whitened(g, numbers), expected, atol=1e-5)
    # (out, in) of PyTorch and Equinox
    transposed = whitened(g.reshape(as_matrix).T, ApolloDimensionNumbers(1, 0))
    np.testing.assert_allclose(transposed.T.reshape(shape), expected, atol=1e-5)


def test_layers_on_a_middle_axis_are_matrices_of_their_own():
    g = gradient(24, 3, 60)
    expected = jnp.stack([whitened(g[:, i]) for i in range(3)], axis=1)
    np.testing.assert_allclose(whitened(g, ApolloDimensionNumbers(0, 2)), expected, atol=1e-5)


@pytest.mark.parametrize("size", [1e-34, 1e-25, 1e25, 1e37])
def test_gradients_of_any_size_are_whitened_alike(size):
    g = gradient(24, 60)
    np.testing.assert_allclose(whitened(size * g), whitened(g), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("value", [jnp.inf, jnp.nan])
@pytest.mark.parametrize("shape", [(24, 60), (64, 100)], ids=str)
def test_nothing_comes_of_nothing_and_of_what_is_not_finite(shape, value):
    g = gradient(2, *shape)
    np.testing.assert_array_equal(whitened(0 * g), 0)
    one_bad = whitened(g.at[1, 0, 0].set(value))
    np.testing.assert_allclose(one_bad[0], whitened(g)[0], atol=1e-5)
    np.testing.assert_array_equal(one_bad[1], 0)


def test_of_a_matrix_nothing_is_kept():
    state = scale_by_swan(weight_dimension_numbers=DENSE).init({"w": jnp.zeros((3, 24, 60))})
    assert {x.shape for x in jax.tree.leaves((state.mu, state.nu, state.norm))} == {(3,)}


def test_updates_have_the_gradients_dtype():
    assert whitened(gradient(24, 60).astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_it_trains():
    target = {"w": gradient(24, 60), "b": gradient(60, seed=1)}

    def loss(params):
        return sum(jnp.sum((params[name] - target[name]) ** 2) for name in target)

    tx = swan(optax.linear_schedule(0.1, 0.0, 200), weight_dimension_numbers=DENSE)
    params = jax.tree.map(jnp.zeros_like, target)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(200):
        params, state = step(params, state)
    assert loss(params) < 1e-2 * loss(jax.tree.map(jnp.zeros_like, target))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"b2": 1.0}, ValueError, "b2"),
        ({"eps": 0.0}, ValueError, "eps"),
        ({"mu_dtype": jnp.int8}, TypeError, "mu_dtype"),
        ({"vocabulary": "sgd"}, ValueError, "vocabulary"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay"),
    ],
)
def test_bad_arguments_are_named(change, error, match):
    with pytest.raises(error, match=match):
        swan(0.01, **change)


def test_without_leaves_it_counts():
    tx = scale_by_swan()
    updates, state = tx.update({}, tx.init({}))
    chex.assert_trees_all_equal((updates, state.count), ({}, jnp.int32(1)))
