"""APOLLO inside Optax's wrappers and JAX's transformations."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import apollo_optax
from apollo_optax import apollo, apollo_mini, scale_by_apollo


def make(**kwargs):
    """`apollo_mini` is this at rank 1, so what holds in wrappers for one holds for both."""
    return apollo(0.01, 4, **kwargs)


def make_params():
    return {"w": jax.random.normal(jax.random.key(0), (6, 9)), "b": jnp.ones(9)}


def make_grads(step):
    w = jax.random.normal(jax.random.key(step + 1), (6, 9))
    return {"w": w, "b": w[0]}


def train(tx, steps=4, params=None):
    params = make_params() if params is None else params
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(steps):
        updates, state = update(make_grads(step), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_trees_equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def assert_trees_close(left, right):
    """Equal to float32's rounding under another order of operations, over a few steps of size 1."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), left, right)


def test_apollo_is_its_chain():
    schedule = optax.linear_schedule(0.1, 0.0, 10)
    alias, _ = train(apollo(schedule, 4, update_proj_gap=2, scale=0.5, weight_decay=0.1))
    chain, _ = train(
        optax.chain(
            scale_by_apollo(4, 2, 0.5),
            optax.add_decayed_weights(0.1),
            optax.scale_by_learning_rate(schedule),
        )
    )
    assert_trees_equal(alias, chain)


def test_apollo_mini_is_apollo_at_rank_one_with_one_factor_a_matrix():
    mini, state = train(apollo_mini(0.01))
    full, _ = train(apollo(0.01, 1, scale=128**0.5, granularity="tensor"))
    assert_trees_equal(mini, full)
    assert state[0].mu["w"].shape == (1, 9)


def test_mask_limits_weight_decay():
    decayed, _ = train(apollo(0.01, 4, weight_decay=0.5, mask={"w": True, "b": False}))
    plain, _ = train(apollo(0.01, 4))
    assert_trees_equal(decayed["b"], plain["b"])
    assert np.any(decayed["w"] != plain["w"])


def test_negative_weight_decay_is_refused():
    with pytest.raises(ValueError, match="weight_decay must be .*>= 0, got -1"):
        apollo(0.01, weight_decay=-1)
    with pytest.raises(TypeError, match="weight_decay must be .*>= 0, got None"):
        apollo(0.01, weight_decay=None)


def test_chains_with_clipping():
    tx = optax.chain(optax.clip_by_global_norm(1.0), make(weight_decay=0.1))
    params, _ = train(tx)
    assert all(np.all(np.isfinite(p)) for p in jax.tree.leaves(params))


def test_is_a_transformation_with_extra_args():
    tx = make()
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    params = make_params()
    tx.update(make_grads(0), tx.init(params), params, value=jnp.float32(1.0))


def test_hyperparameters_are_injected_and_scheduled():
    static = ("rank", "update_proj_gap")
    schedule = optax.linear_schedule(0.1, 0.0, 10)
    injected, state = train(
        optax.inject_hyperparams(apollo, static_args=static)(schedule, rank=4, weight_decay=0.1)
    )
    plain, _ = train(apollo(schedule, 4, weight_decay=0.1))
    assert_trees_close(injected, plain)
    assert set(state.hyperparams) >= {"learning_rate", "scale", "b1", "b2", "norm_growth_limit"}

    tx = optax.inject_hyperparams(apollo_mini, static_args="update_proj_gap")(0.1)
    params, state = make_params(), tx.init(make_params())
    state.hyperparams["learning_rate"] = jnp.asarray(0.0)
    updates, _ = jax.jit(tx.update)(make_grads(0), state, params)
    assert not np.any(updates["w"])


def test_injecting_the_rank_is_refused_with_the_remedy():
    tx = optax.inject_hyperparams(apollo)(0.1, rank=4)
    with pytest.raises(TypeError, match=r"static_args=\('rank', 'update_proj_gap', "):
        tx.init(make_params())


def test_multi_steps_accumulates():
    multi = optax.MultiSteps(make(), every_k_schedule=2)
    params, state = make_params(), multi.init(make_params())
    for step in (0, 1):
        updates, state = jax.jit(multi.update)(make_grads(step), state, params)
        params = optax.apply_updates(params, updates)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, make_grads(0), make_grads(1))
    tx = make()
    updates, _ = tx.update(mean, tx.init(make_params()), make_params())
    assert_trees_close(params, optax.apply_updates(make_params(), updates))


def test_masked_leaves_pass_by():
    tx = optax.masked(make(), {"w": True, "b": False})
    params = make_params()
    updates, _ = tx.update(make_grads(0), tx.init(params), params)
    assert_trees_equal(updates["b"], make_grads(0)["b"])
    assert_trees_equal(
        updates["w"], make().update(make_grads(0), make().init(params), params)[0]["w"]
    )


def test_partition_gives_each_label_its_optimizer():
    tx = optax.partition({"matrix": make(), "rest": optax.sgd(0.1)}, {"w": "matrix", "b": "rest"})
    trained, _ = train(tx)
    alone, _ = train(make())
    assert_trees_equal(trained["w"], alone["w"])
    expected = make_params()["b"] - 0.1 * sum(make_grads(step)["b"] for step in range(4))
    np.testing.assert_allclose(trained["b"], expected, rtol=1e-5, atol=1e-6)


def test_apply_if_finite_skips_bad_steps_and_keeps_the_state():
    tx = optax.apply_if_finite(make(), max_consecutive_errors=3)
    params, state = train(tx)
    bad = {"w": jnp.full((6, 9), jnp.nan), "b": jnp.zeros(9)}
    updates, after = jax.jit(tx.update)(bad, state, params)
    assert not any(np.any(u) for u in jax.tree.leaves(updates))
    assert_trees_equal(after.inner_state, state.inner_state)


def test_tree_map_params_reaches_moments_and_norms_only():
    tx = make()
    _, state = train(tx)
    doubled = optax.tree_map_params(
        tx, lambda leaf: 2 * leaf, state, transform_non_params=lambda leaf: leaf
    )
    for field in ("mu", "nu", "norm"):
        before, after = getattr(state[0], field), getattr(doubled[0], field)
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(b, 2 * a), before, after)
    assert_trees_equal(doubled[0].count, state[0].count)
    assert_trees_equal(doubled[0].key, state[0].key)


def test_tree_map_params_reaches_the_kept_projection():
    tx = scale_by_apollo(4, projection=apollo_optax.svd)
    state = tx.init(make_params())
    seen = []
    optax.tree_map_params(tx, lambda leaf: seen.append(leaf.shape), state)
    assert seen.count((4, 6)) == 1


def test_tree_map_params_on_the_limiter():
    tx = apollo_optax.limit_norm_growth()
    state = tx.init(make_params())
    assert jax.tree.leaves(optax.tree_map_params(tx, lambda leaf: leaf + 1, state)) == [1, 1]


def test_tree_get_and_set():
    _, state = train(make())
    assert int(optax.tree.get(state, "count")) == 4
    assert optax.tree.get(state, "mu")["w"].ndim == 2
    reset = optax.tree.set(state, count=jnp.zeros([], jnp.int32))
    assert int(reset[0].count) == 0


def test_state_is_plain_arrays_in_plain_dictionaries():
    _, state = train(make())
    for leaf in jax.tree.leaves(state):
        assert isinstance(leaf, jax.Array)
        assert not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)


def test_init_from_shapes_gives_the_state_of_arrays():
    tx = make()
    abstract = jax.eval_shape(make_params)
    for state in (tx.init(abstract), jax.jit(tx.init)(make_params())):
        assert_trees_equal(state, tx.init(make_params()))
    shapes = jax.eval_shape(tx.init, abstract)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, tx.init(abstract))


def test_jit_and_scan_give_what_single_steps_give_without_recompiling():
    tx = make(update_proj_gap=2, weight_decay=0.1)
    params, state = train(tx, steps=6)

    traces = 0

    @jax.jit
    def step(carry, grads):
        nonlocal traces
        traces += 1
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    start = (make_params(), tx.init(make_params()))
    carry = start
    for index in range(6):
        carry, _ = step(carry, make_grads(index))
    assert traces == 1
    assert_trees_close(carry, (params, state))

    grads = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[make_grads(s) for s in range(6)])
    scanned, _ = jax.lax.scan(step, start, grads)
    assert_trees_close(scanned, (params, state))


def test_vmap_over_a_population():
    tx = make()
    population = jax.vmap(lambda seed: jax.tree.map(lambda p: p * seed, make_grads(0)))(
        jnp.arange(1.0, 4.0)
    )
    states = jax.vmap(tx.init)(population)
    updates, states = jax.vmap(tx.update)(population, states, population)
    for member in range(3):
        grads = jax.tree.map(lambda leaf, member=member: leaf[member], population)
        alone, _ = tx.update(grads, tx.init(grads), grads)
        assert_trees_close(jax.tree.map(lambda u, m=member: u[m], updates), alone)


def test_vmap_over_seeds_and_learning_rates():
    def first_update(seed, learning_rate):
        tx = apollo(learning_rate, 4, key=seed)
        return tx.update(make_grads(0), tx.init(make_params()), make_params())[0]["w"]

    updates = jax.vmap(first_update)(jnp.arange(3), jnp.asarray([0.1, 0.1, 0.2]))
    np.testing.assert_allclose(updates[1], first_update(1, 0.1), rtol=1e-5)
    assert np.any(updates[0] != updates[1])


@pytest.mark.optimized
@pytest.mark.slow
def test_donated_state_and_parameters_are_updated_in_place():
    tx = apollo_mini(0.01)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = make_params()
    compiled = (
        jax.jit(step, donate_argnums=(0, 1)).lower(params, tx.init(params), make_grads(0)).compile()
    )
    memory: Any = compiled.memory_analysis()
    donated = sum(leaf.nbytes for leaf in jax.tree.leaves((params, tx.init(params))))
    assert memory.alias_size_in_bytes == donated


def test_two_steps_can_be_differentiated_for_the_learning_rate():
    shapes = {f"w{i}": (2, 8 * i + 8, 16) for i in range(4)}
    params = {n: jax.random.normal(jax.random.key(i), shapes[n]) for i, n in enumerate(shapes)}
    stacked = apollo_optax.ApolloDimensionNumbers(-2, -1)

    def loss(params):
        return sum(jnp.sum(jnp.tanh(leaf) ** 2) for leaf in params.values())

    @jax.jit
    def loss_after(learning_rate):
        tx = apollo(learning_rate, 4, weight_dimension_numbers=stacked)
        trained, state = params, tx.init(params)
        for _ in range(2):
            updates, state = tx.update(jax.grad(loss)(trained), state, trained)
            trained = optax.apply_updates(trained, updates)
        return loss(trained)

    differences = (loss_after(0.06) - loss_after(0.04)) / 0.02
    np.testing.assert_allclose(jax.grad(loss_after)(0.05), differences, rtol=1e-2)


MIXED = {"kernel": jnp.ones((8, 16)) / 4, "bias": jnp.ones(16) / 2}


@pytest.mark.parametrize("make", [functools.partial(apollo, rank=2), apollo_mini])
@pytest.mark.parametrize("decay", [{}, {"weight_decay": 0.1}])
def test_adam_learning_rate_is_that_of_the_leaves_that_are_no_matrices(make, decay):
    grads = jax.tree.map(jnp.cos, MIXED)

    def updates(**options):
        tx = make(**options, **decay)
        return jax.jit(tx.update)(grads, tx.init(MIXED), MIXED)[0]

    both = updates(learning_rate=0.01, adam_learning_rate=optax.constant_schedule(0.3))
    chex.assert_trees_all_equal(both["kernel"], updates(learning_rate=0.01)["kernel"])
    chex.assert_trees_all_equal(both["bias"], updates(learning_rate=0.3)["bias"])


def test_adam_weight_decay_is_that_of_the_leaves_that_are_no_matrices():
    zeros = jax.tree.map(jnp.zeros_like, MIXED)
    tx = apollo(0.5, 2, weight_decay=0.1, adam_weight_decay=0.0)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(MIXED), MIXED)
    np.testing.assert_allclose(updates["kernel"], -0.05 * MIXED["kernel"], rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 0)


def test_with_two_learning_rates_the_state_still_mirrors_the_parameters():
    tx = apollo_mini(0.01, adam_learning_rate=0.1)
    state = tx.init(MIXED)
    doubled = optax.tree_map_params(tx, lambda x: x + 1, state)
    chex.assert_trees_all_equal_structs(doubled, state)
    chex.assert_trees_all_equal(doubled[0].mu, jax.tree.map(lambda x: x + 1, state[0].mu))
