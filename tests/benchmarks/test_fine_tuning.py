"""LoRA and full fine-tuning begin with the same model and train what they say."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.fine_tuning import METHODS, training_of, wanted_runs
from examples.llama import model, train
from examples.llama.config import LlamaConfig
from examples.llama.optimizers import OptimizerSettings

# qwix 0.1.8 uses names of Flax that have since been deprecated; the warnings are of its modules.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:qwix")

CONFIG = LlamaConfig(32, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2)
TOKENS = np.random.default_rng(0).integers(0, 32, (4, 9)).astype(np.int32)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow if n == "lora_r8" else pytest.mark.release)
        for n in METHODS
    ],
)
def test_every_method_begins_with_the_checkpoint_and_learns(name: str) -> None:
    params = jax.jit(lambda: model.init_params(CONFIG, 0))()
    expected = train.make_loss(CONFIG, dtype=jnp.float32, remat=False)(params, TOKENS)
    method = METHODS[name]
    settings = OptimizerSettings(learning_rate=0.02, total_steps=20, **method.optimizer)
    training = training_of(method, settings, CONFIG)
    state, losses = training.init_state(params), []
    for _ in range(20):
        state, outcome = training.step(state, TOKENS)
        losses.append(float(outcome.loss))
    assert losses[0] == pytest.approx(float(expected), rel=1e-5)
    assert losses[-1] < losses[0] - 0.1


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
