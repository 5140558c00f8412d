import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples.llama import model
from examples.llama.config import LlamaConfig
from examples.llama.layered import join_params, layered_model, layered_training, split_params
from examples.llama.optimizers import (
    FLOAT32_MOMENTS,
    OptimizerSettings,
    make_optimizer,
)
from examples.llama.train import make_loss, standard_training

CONFIG = LlamaConfig(
    vocab_size=48, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2
)
PARAMS = model.init_params(CONFIG, 0)
TOKENS = jax.random.randint(jax.random.key(1), (4, 9), 0, CONFIG.vocab_size)


def layered_loss(params, **options):
    layered = layered_model(CONFIG, dtype=jnp.float32, **options)
    parts = split_params(params)
    x = layered.embed(parts["rest"], TOKENS)
    for layer in range(CONFIG.num_layers):
        x = layered.block(jax.tree.map(lambda a, i=layer: a[i], parts["blocks"]), x)
    return layered.loss(parts["rest"], x, TOKENS)


def test_splitting_and_joining_parameters_changes_nothing():
    assert set(split_params(PARAMS)["rest"]) == {"embed", "norm", "lm_head"}
    jax.tree.map(np.testing.assert_array_equal, join_params(split_params(PARAMS)), PARAMS)


@pytest.mark.parametrize(
    "options",
    [{}, {"tokens_at_once": 8}, {"tokens_at_once": 3}, {"heads_at_once": 2}],
    ids=["whole", "chunks", "one_token_of_a_sequence", "groups_of_heads"],
)
def test_loss_and_gradients_are_the_models(options):
    whole = make_loss(CONFIG, dtype=jnp.float32, remat=False)
    expected = jax.jit(jax.value_and_grad(whole))(PARAMS, TOKENS)
    actual = jax.jit(jax.value_and_grad(lambda p: layered_loss(p, **options)))(PARAMS)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), actual, expected
    )


def test_logits_of_a_chunk_are_all_that_exists_at_one_time():
    def largest(tokens_at_once):
        loss = lambda params: layered_loss(params, tokens_at_once=tokens_at_once)  # noqa: E731
        return jax.jit(jax.grad(loss)).lower(PARAMS).as_text().count("4x8x48xf32")

    assert largest(512) > 0
    assert largest(8) == 0


@pytest.mark.parametrize("heads_at_once", [3, 1])
def test_groups_that_split_key_and_value_heads_are_refused(heads_at_once):
    with pytest.raises(ValueError, match=f"heads_at_once is {heads_at_once}; it must divide the 4"):
        layered_loss(PARAMS, heads_at_once=heads_at_once)


# That every transformation is is test_layerwise's.
@pytest.mark.parametrize("name", ["muon", pytest.param("apollo", marks=pytest.mark.slow)])
def test_layerwise_training_is_the_standard_training(name):
    tx = make_optimizer(OptimizerSettings(name, 1e-3, total_steps=10, rank=4, weight_decay=0.1))
    standard = standard_training(CONFIG, tx, dtype=jnp.float32)
    layered = layered_training(CONFIG, tx, weights="f32", dtype=jnp.float32)
    # Copies: the steps take over the memory of what they are given.
    states = [kind.init_state(jax.tree.map(jnp.copy, PARAMS)) for kind in (standard, layered)]
    for _ in range(3):
        states[0], expected = standard.step(states[0], TOKENS)
        states[1], actual = layered.step(states[1], TOKENS)
        np.testing.assert_allclose(actual.loss, expected.loss, rtol=1e-5)
    params = layered.float_params(states[1].params)
    if name == "apollo":
        # The matrices of `blocks` have the same names, so the same projections.
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), params, states[0].params
        )
    np.testing.assert_allclose(
        layered.loss(states[1].params, TOKENS), standard.loss(states[0].params, TOKENS), rtol=1e-5
    )


@pytest.mark.parametrize("weights", ["f32", "int8"])
def test_a_tied_table_gets_the_gradient_of_both_its_uses_layer_by_layer(weights):
    config = dataclasses.replace(CONFIG, tied=True)
    tx = optax.sgd(1.0)
    standard = standard_training(config, tx, dtype=jnp.float32)
    layered = layered_training(config, tx, weights=weights, dtype=jnp.float32, rounding="nearest")
    params = model.init_params(config, 0, convert=layered.keep)
    floats = jax.tree.map(jnp.copy, layered.float_params(split_params(params)))
    after, outcome = layered.step(layered.init_state(params), TOKENS)
    expected, expected_outcome = standard.step(standard.init_state(floats), TOKENS)
    np.testing.assert_allclose(outcome.loss, expected_outcome.loss, rtol=1e-5)
    table = layered.float_params(after.params)["embed"]["embedding"]
    rounding = 0.51 * np.abs(table).max() / 127 if weights == "int8" else 1e-6
    np.testing.assert_allclose(table, expected.params["embed"]["embedding"], atol=rounding)


@pytest.mark.parametrize("name", ["adamw", "apollo_mini"])
@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_moments_are_float32_whatever_the_weights_are(name, weights):
    tx = make_optimizer(OptimizerSettings(name, 1e-3, total_steps=10))
    training = layered_training(
        CONFIG,
        tx,
        weights=weights,
        dtype=jnp.bfloat16,
        float32_moments=name not in FLOAT32_MOMENTS,
    )
    dtype = jnp.bfloat16 if weights == "bf16" else jnp.float32

    def step():
        params = model.init_params(CONFIG, 0, param_dtype=dtype, convert=training.keep)
        return training.step(training.init_state(params), TOKENS)

    state, _ = jax.eval_shape(step)
    floats = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim > 1]
    assert {leaf.dtype for leaf in floats} == {jnp.dtype(jnp.float32)}


@pytest.mark.slow
def test_int8_weights_train_and_stay_int8():
    tx = make_optimizer(
        OptimizerSettings("apollo_mini", 0.01, total_steps=40, project_embeddings=True)
    )
    training = layered_training(CONFIG, tx, weights="int8", dtype=jnp.float32)
    state = training.init_state(model.init_params(CONFIG, 0, convert=training.keep))
    first = training.loss(state.params, TOKENS)
    for _ in range(40):
        state, outcome = training.step(state, TOKENS)
    assert outcome.loss < 0.9 * first
    kernels = state.params["blocks"]["mlp"]
    assert {leaf["kernel"].qvalue.dtype for leaf in kernels.values()} == {jnp.dtype(jnp.int8)}
    floats = training.float_params(state.params)
    expected = make_loss(CONFIG, dtype=jnp.float32, remat=False)(floats, TOKENS)
    np.testing.assert_allclose(training.loss(state.params, TOKENS), expected, rtol=1e-5)
    np.testing.assert_allclose(
        training.logits(state.params, TOKENS), model.forward(CONFIG, floats, TOKENS), atol=1e-5
    )
