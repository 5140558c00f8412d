"""The rules of vector size for embedding tables and heads."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from apollo_optax import apollo, apollo_mini, scale_by_apollo, scale_by_swan, swan

TABLE = (150, 130)
RULES = ("factored", "factored_momentum")


def gradients(steps, shape=TABLE, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), steps)
    return [{"embed": jax.random.normal(key, shape, dtype)} for key in keys]


def trained(tx, grads):
    state, update = tx.init(grads[0]), jax.jit(tx.update)
    found = []
    for g in grads:
        updates, state = update(g, state)
        found.append(updates)
    return found, state


def test_factored_is_adafactors_second_moment_with_adams_average():
    def unbiased(step, decay):
        return decay * (1 - decay**step) / (1 - decay ** (step + 1))

    reference = optax.scale_by_factored_rms(decay_rate=0.99, decay_rate_fn=unbiased)
    grads = gradients(4)
    state = reference.init(grads[0])
    found, _ = trained(scale_by_apollo(b2=0.99, vocabulary="factored"), grads)
    for g, updates in zip(grads, found, strict=True):
        expected, state = reference.update(g, state, g)
        np.testing.assert_allclose(updates["embed"], expected["embed"], rtol=1e-4)


def test_with_momentum_it_is_adam_where_squares_have_rank_one():
    sizes = jnp.outer(jnp.linspace(0.5, 2, TABLE[0]), jnp.linspace(0.1, 3, TABLE[1]))
    grads = [{"embed": jnp.sign(g["embed"]) * sizes} for g in gradients(4)]
    tx = scale_by_apollo(vocabulary="factored_momentum", mu_dtype=jnp.float32)
    (found, _), (expected, _) = trained(tx, grads), trained(optax.scale_by_adam(), grads)
    chex.assert_trees_all_close(found, expected, rtol=1e-4)


def test_momentum_is_kept_in_bfloat16_unless_it_is_said():
    params = {"embed": jnp.zeros(TABLE), "norm": jnp.zeros(130)}
    state = scale_by_apollo(vocabulary="factored_momentum").init(params)
    assert state.mu["embed"].dtype == jnp.bfloat16
    assert state.mu["norm"].dtype == jnp.float32
    state = scale_by_apollo(vocabulary="factored_momentum", mu_dtype=jnp.float32).init(params)
    assert state.mu["embed"].dtype == jnp.float32


@pytest.mark.parametrize("make", [scale_by_apollo, scale_by_swan])
def test_state_of_a_table_is_about_as_many_numbers_as_it_has_rows_and_columns(make):
    params = {
        "embed": jnp.zeros((512, 128)),
        "stack": {"embed": jnp.zeros((3, 128, 256))},
        "small_embed": jnp.zeros((512, 127)),  # Adam's moments of it do not matter
    }
    state = make(vocabulary="factored").init(params)

    def numbers(name):
        fields = (state.mu, state.nu, state.norm)
        return sum(x.size for field in fields for x in jax.tree.leaves(field[name]))

    assert numbers("embed") == 512 + 128 + 1
    assert numbers("stack") == 3 * (128 + 256 + 1)
    assert numbers("small_embed") == 2 * 512 * 127 + 512


def test_matrices_and_small_leaves_are_trained_as_before():
    params = {
        "kernel": jnp.ones((128, 256)),
        "bias": jnp.ones(256),
        "embed": jnp.ones((256, 128)),
    }
    grads = jax.tree.map(jnp.cos, params)
    found, expected = (
        trained(scale_by_apollo(4, vocabulary=rule), [grads])[0][0] for rule in ("factored", "adam")
    )
    chex.assert_trees_all_equal(found["kernel"], expected["kernel"])
    chex.assert_trees_all_equal(found["bias"], expected["bias"])


@pytest.mark.parametrize("rule", RULES)
def test_a_token_without_a_gradient_stays_and_the_first_one_moves_it(rule):
    seen = jnp.zeros(TABLE).at[3].set(1e-3)
    later = jnp.zeros(TABLE).at[5].set(-1e-3)
    (first, second), _ = trained(
        scale_by_apollo(vocabulary=rule), [{"embed": seen}, {"embed": later}]
    )
    assert jnp.all(first["embed"][3] > 0)
    np.testing.assert_array_equal(first["embed"][4:], 0)
    assert jnp.all(second["embed"][5] < 0)
    np.testing.assert_array_equal(second["embed"][6:], 0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e25, 3e38])
def test_gradients_of_any_size_give_finite_updates(rule, size):
    grads = [{"embed": size * g["embed"] / 5} for g in gradients(3)]
    found, state = trained(scale_by_apollo(vocabulary=rule), grads)
    chex.assert_tree_all_finite((found, state))


@pytest.mark.parametrize("rule", RULES)
def test_bfloat16_gradients_have_float32_factors_and_bfloat16_updates(rule):
    found, state = trained(scale_by_apollo(vocabulary=rule), gradients(2, dtype=jnp.bfloat16))
    assert found[0]["embed"].dtype == jnp.bfloat16
    assert state.nu["embed"].dtype == state.norm["embed"].dtype == jnp.float32


@pytest.mark.parametrize("make", [apollo, apollo_mini, swan])
@pytest.mark.parametrize("rule", ["adam", *RULES])
def test_the_vocabulary_has_a_learning_rate_of_its_own(make, rule):
    params = {
        "kernel": jnp.ones((128, 256)),
        "bias": jnp.ones(256),
        "embed": jnp.ones((256, 128)),
    }
    grads = jax.tree.map(jnp.cos, params)

    def updates(**rates):
        tx = make(0.01, vocabulary=rule, **rates)
        return jax.jit(tx.update)(grads, tx.init(params), params)[0]

    plain = updates()
    found = updates(vocabulary_learning_rate=0.04)
    np.testing.assert_allclose(found["embed"], 4 * plain["embed"], rtol=1e-6)
    chex.assert_trees_all_equal(found["kernel"], plain["kernel"])
    chex.assert_trees_all_equal(found["bias"], plain["bias"])
    found = updates(adam_learning_rate=0.02, vocabulary_learning_rate=optax.constant_schedule(0.03))
    np.testing.assert_allclose(found["embed"], 3 * plain["embed"], rtol=1e-6)
    np.testing.assert_allclose(found["bias"], 2 * plain["bias"], rtol=1e-6)
    found = updates(adam_learning_rate=0.02)
    np.testing.assert_allclose(found["embed"], 2 * plain["embed"], rtol=1e-6)


@pytest.mark.parametrize("make", [scale_by_apollo, scale_by_swan])
def test_a_large_leaf_too_narrow_for_the_rule_is_warned_of(make):
    params = {
        "embed": jax.ShapeDtypeStruct((20_000, 64), jnp.float32),
        "kernel": jax.ShapeDtypeStruct((64, 512), jnp.float32),
    }
    with pytest.warns(UserWarning, match=r"embed \(20000, 64\) .* keep Adam's two moments"):
        jax.eval_shape(make(vocabulary="factored").init, params)
    jax.eval_shape(make(vocabulary="adam").init, params)  # as asked for: no warning


def test_a_rate_that_reaches_no_leaf_is_warned_of():
    tx = swan(0.01, vocabulary_learning_rate=0.1)
    with pytest.warns(UserWarning, match="vocabulary_learning_rate reaches no leaf"):
        tx.init({"kernel": jnp.zeros((128, 256)), "embed": jnp.zeros((256, 64))})
    tx.init({"kernel": jnp.zeros((128, 256)), "embed": jnp.zeros((256, 128))})


@pytest.mark.parametrize("make", [apollo, apollo_mini, swan])
def test_an_unknown_rule_is_named(make):
    with pytest.raises(ValueError, match="vocabulary must be .*'factored'.*got 'row'"):
        make(0.01, vocabulary="row")


def test_a_state_of_another_rule_is_refused():
    params = {"embed": jnp.zeros(TABLE)}
    state = scale_by_apollo(vocabulary="adam").init(params)
    with pytest.raises(ValueError, match="embed, whose gradient needs"):
        scale_by_apollo(vocabulary="factored").update(params, state)


def test_state_still_mirrors_the_parameters():
    params = {"embed": jnp.zeros(TABLE), "kernel": jnp.zeros((8, 16)), "bias": jnp.zeros(3)}
    for tx in (apollo(0.01, 2, vocabulary="factored"), swan(0.01, vocabulary_learning_rate=0.1)):
        state = tx.init(params)
        doubled = optax.tree_map_params(tx, lambda x: x + 1, state)
        chex.assert_trees_all_equal_structs(doubled, state)
        chex.assert_trees_all_equal(doubled[0].nu, jax.tree.map(lambda x: x + 1, state[0].nu))
