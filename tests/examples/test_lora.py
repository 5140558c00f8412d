"""LoRA begins with the loaded model, leaves its weights as they are, and is merged exactly."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples.llama import lora, model, train
from examples.llama.config import LlamaConfig
from examples.llama.plan import PlanConfig, plan_step

# qwix 0.1.8 uses names of Flax that have since been deprecated; the warnings are of its modules.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:qwix")

CONFIG = LlamaConfig(32, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2)
TOKENS = jax.random.randint(jax.random.key(0), (4, 9), 0, 32)
RANK = 4


def trained(
    dtype: Any, steps: int, **arguments: Any
) -> tuple[train.Training, train.TrainState, list[float]]:
    training = lora.lora_training(CONFIG, optax.adamw(0.05), rank=RANK, dtype=dtype, **arguments)
    state = training.init_state(loaded(dtype))
    losses = []
    for _ in range(steps):
        state, outcome = training.step(state, TOKENS)
        losses.append(float(outcome.loss))
    return training, state, losses


def loaded(dtype: Any) -> model.Params:
    return jax.jit(lambda: model.init_params(CONFIG, 0, param_dtype=dtype))()


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)])
def test_training_begins_with_the_loaded_model_and_leaves_its_weights(dtype: Any) -> None:
    _, state, losses = trained(dtype, 20, micro_batches=2, spike_limit=3.0)
    loss = jax.jit(train.make_loss(CONFIG, dtype=dtype, remat=False))
    assert losses[0] == pytest.approx(float(loss(loaded(dtype), TOKENS)), rel=1e-5)
    assert losses[-1] < losses[0] - 0.03
    jax.tree.map(np.testing.assert_array_equal, state.params["frozen"], loaded(dtype))
    leaves = jax.tree.leaves(state.params["lora"])
    attention, mlp = 4 * RANK * (16 + 16), 3 * RANK * (16 + 24)
    assert sum(leaf.size for leaf in leaves) == CONFIG.num_layers * (attention + mlp)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert moments == 2 * sum(leaf.size for leaf in leaves)


def test_the_merged_model_computes_the_same() -> None:
    training, state, _ = trained(jnp.float32, 5, remat=True)
    expected = training.logits(state.params, TOKENS)
    merged = model.forward(CONFIG, training.float_params(state.params), TOKENS)
    before = model.forward(CONFIG, loaded(jnp.float32), TOKENS)
    np.testing.assert_allclose(merged, expected, atol=1e-5)
    assert np.abs(merged - before).max() > 0.1


def test_a_plan_knows_that_the_state_is_small() -> None:
    adamw = PlanConfig("nano", "cpu", "adamw", weights="f32", sequence=32)
    full, thin = plan_step(adamw), plan_step(PlanConfig(**vars(adamw) | {"lora": 4}))
    assert full.argument_bytes is not None
    assert thin.argument_bytes is not None
    assert thin.argument_bytes < 0.4 * full.argument_bytes
    assert thin.peak_bytes < 0.7 * full.peak_bytes
