"""LoRA and full fine-tuning begin with the same model and train what they say."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import fine_tuning
from benchmarks.fine_tuning import METHODS, prepare, wanted_runs
from examples.llama import model, train
from examples.llama.config import LlamaConfig
from examples.llama.optimizers import OptimizerSettings

# qwix 0.1.8 uses names of Flax that have since been deprecated; the warnings are of its modules.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:qwix")

CONFIG = LlamaConfig(32, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2)
TOKENS = np.random.default_rng(0).integers(0, 32, (4, 9)).astype(np.int32)


def prepared(name: str) -> fine_tuning.FineTuning:
    method = METHODS[name]
    settings = OptimizerSettings(learning_rate=0.02, total_steps=20, **method.optimizer)
    return prepare(method, settings, CONFIG, jax.jit(lambda: model.init_params(CONFIG, 0))())


def after_steps(tuning: fine_tuning.FineTuning, steps: int) -> tuple[Any, list[float]]:
    step = train.make_train_step(tuning.loss, tuning.tx)
    state = train.init_state(tuning.tx, jax.tree.map(jnp.copy, tuning.params))
    losses = []
    for _ in range(steps):
        state, outcome = step(state, TOKENS)
        losses.append(float(outcome.loss))
    return state.params, losses


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_begins_with_the_checkpoint_and_learns(name: str) -> None:
    expected = float(prepared("adamw").loss(prepared("adamw").params, TOKENS))
    _, losses = after_steps(prepared(name), 20)
    assert losses[0] == pytest.approx(expected, rel=1e-5)
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.slow
def test_lora_leaves_the_checkpoints_weights_bit_for_bit() -> None:
    tuning = prepared("lora_r8")
    trained, _ = after_steps(tuning, 5)
    jax.tree.map(np.testing.assert_array_equal, trained["frozen"], tuning.params["frozen"])
    sizes = [leaf.size for leaf in jax.tree.leaves(tuning.trained)]
    attention, mlp = 4 * 8 * (32 + 32), 3 * 8 * (32 + 48)
    assert sum(sizes) == CONFIG.num_layers * (attention + mlp)


def test_every_method_is_swept_and_run_with_three_seeds() -> None:
    rows: list[dict[str, Any]] = []
    while wanted := wanted_runs(rows):
        for name, rate, seed in wanted:
            loss = 2 + abs(np.log2(rate / (3 * METHODS[name].start)))
            rows.append(
                {"trial": name, "learning_rate": rate, "seed": seed, "validation_loss": loss}
            )
    for name in METHODS:
        own = [row for row in rows if row["trial"] == name]
        best = min(own, key=lambda row: row["validation_loss"])["learning_rate"]
        assert {row["seed"] for row in own if row["learning_rate"] == best} == {0, 1, 2}
        rates = [row["learning_rate"] for row in own]
        assert min(rates) < best < max(rates)
