from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples.llama import model, train
from examples.llama.config import LlamaConfig

TOKENS = np.random.default_rng(0).integers(0, 32, (4, 9)).astype(np.int32)


def toy_loss(params: Any, tokens: Any) -> jax.Array:
    """Mean over the tokens of a loss in which each of them has a share of its own."""
    predictions = tokens / 32 * params["w"] + params["b"]
    return jnp.mean(jnp.square(predictions - 1), dtype=jnp.float32)


def toy_params(dtype: Any = jnp.float32) -> Any:
    return {"w": jnp.array(0.5, dtype), "b": jnp.array(-0.25, dtype)}


def one_step(tx: optax.GradientTransformation, **arguments: Any) -> tuple[Any, jax.Array]:
    dtype = arguments.pop("dtype", jnp.float32)
    step = train.make_train_step(toy_loss, tx, **arguments)
    state, outcome = step(train.init_state(tx, toy_params(dtype)), TOKENS)
    return state, outcome.loss


def test_loss_is_the_mean_negative_log_probability_of_the_next_token() -> None:
    config = LlamaConfig(32, hidden_size=8, intermediate_size=16, num_layers=1, num_heads=2)
    params = jax.jit(partial(model.init_params, config))(0)
    logits = jax.jit(partial(model.forward, config))(params, TOKENS[:, :-1])
    probabilities = np.asarray(jax.nn.softmax(logits))
    chosen = np.take_along_axis(probabilities, TOKENS[:, 1:, None], axis=-1)
    loss = jax.jit(train.make_loss(config, dtype=jnp.float32, remat=False))
    assert loss(params, TOKENS) == pytest.approx(-np.log(chosen).mean(), rel=1e-5)


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_micro_batches_take_the_step_of_the_whole_batch(micro_batches: int) -> None:
    whole, whole_loss = one_step(optax.sgd(0.1))
    parts, parts_loss = one_step(optax.sgd(0.1), micro_batches=micro_batches)
    assert parts_loss == pytest.approx(float(whole_loss), rel=1e-6)
    for name in ("w", "b"):
        np.testing.assert_allclose(parts.params[name], whole.params[name], rtol=1e-6)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_bfloat16_weights_have_float32_moments_and_stay_bfloat16(micro_batches: int) -> None:
    tx = train.in_float32(optax.adamw(1e-3))
    state, _ = one_step(tx, dtype=jnp.bfloat16, micro_batches=micro_batches)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params)} == {"bfloat16"}
    assert state.opt_state[0].nu["w"].dtype == jnp.float32


def test_bfloat16_weights_move_by_updates_below_their_spacing() -> None:
    tx = optax.sgd(1e-3)
    step = train.make_train_step(lambda params, _: -jnp.sum(params["w"]), tx)
    state = train.init_state(tx, {"w": jnp.ones(1000, jnp.bfloat16)})
    for _ in range(30):
        state, _ = step(state, TOKENS)
    # 30 steps of 0.001 in multiples of 0.0078.
    assert jnp.mean(state.params["w"].astype(jnp.float32)) == pytest.approx(1.03, abs=2e-3)


def test_step_counts_and_reports_the_loss_before_it() -> None:
    state, loss = one_step(optax.sgd(0.1))
    assert loss == pytest.approx(float(toy_loss(toy_params(), TOKENS)), rel=1e-6)
    assert toy_loss(state.params, TOKENS) < loss
    assert state.step == 1


def test_mean_loss_weighs_batches_alike() -> None:
    mean = train.mean_loss(lambda params, tokens: jnp.mean(tokens * 1.0), {}, [TOKENS, TOKENS + 2])
    assert mean == pytest.approx(TOKENS.mean() + 1)


@pytest.mark.parametrize(("rounding", "moves"), [("stochastic", True), ("nearest", False)])
def test_rounding_to_nearest_loses_what_stochastic_rounding_keeps(
    rounding: Any, moves: bool
) -> None:
    # Each step is far below half the spacing of bfloat16 numbers at the weight, 0.5.
    tx = optax.sgd(1e-4)
    step = train.make_train_step(toy_loss, train.in_float32(tx), rounding=rounding)
    state = train.init_state(train.in_float32(tx), toy_params(jnp.bfloat16))
    before = float(state.params["w"])
    for _ in range(300):
        state, _ = step(state, TOKENS)
    assert (float(state.params["w"]) != before) == moves
