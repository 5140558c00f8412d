from typing import Any

import jax
import numpy as np
import pytest

from benchmarks.real_model import (
    METHODS,
    STEPS,
    Trial,
    best_trial,
    losses_of,
    next_trials,
    training_of,
)
from examples.llama import model
from examples.llama.config import LlamaConfig

# qwix 0.1.8 uses names of Flax that have since been deprecated; the warnings are of its modules.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:qwix")

CONFIG = LlamaConfig(
    256, 128, 256, num_layers=2, num_heads=4, num_kv_heads=2, rms_norm_eps=1e-5, tied=True
)
SLOW = ("apollo_mini_int8", "lora")
TOKENS = jax.random.randint(jax.random.key(1), (4, 17), 0, 256)


def test_of_rates_within_a_thousandth_the_ones_tried_first_are_best() -> None:
    first, second, worse = (Trial(rate, 5e-5) for rate in (1e-4, 2e-4, 4e-4))
    assert best_trial({first: 2.0009, second: 2.0, worse: 2.1}) == first
    assert best_trial({first: 2.0011, second: 2.0, worse: 2.1}) == second
    assert best_trial({first: 2.0, second._replace(seed=1): 1.9}) == first


@pytest.mark.parametrize("name", METHODS)
def test_both_rates_are_swept_until_worse_on_both_sides_and_run_with_three_seeds(name: str) -> None:
    method = METHODS[name]
    rows: list[dict[str, Any]] = []

    def loss(trial: Trial) -> float:
        matrices = np.log2(trial.learning_rate / (5 * method.start))
        vocabulary = np.log2(trial.vocabulary_learning_rate / 3e-5)
        return 2 + abs(matrices) + abs(vocabulary)

    while wanted := next_trials(method, losses_of(rows, name)):
        rows += [
            {"method": name, **trial._asdict(), "steps": STEPS, "validation_loss": loss(trial)}
            for trial in wanted
        ]
    losses = losses_of(rows, name)
    best = min(losses, key=lambda trial: losses[trial])
    assert {trial.seed for trial in losses if trial[:2] == best[:2]} == {0, 1, 2}
    rates = {trial.learning_rate for trial in losses}
    assert min(rates) < best.learning_rate < max(rates)
    if not method.lora_rank:
        of_vocabulary = {trial.vocabulary_learning_rate for trial in losses}
        assert min(of_vocabulary) < best.vocabulary_learning_rate < max(of_vocabulary)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow if n in SLOW else pytest.mark.release)
        for n in METHODS
    ],
)
def test_every_method_begins_with_the_checkpoint_and_learns(name: str) -> None:
    params: Any = jax.jit(lambda: model.init_params(CONFIG, 0))()
    expected = model.cross_entropy(
        model.forward(CONFIG, params, TOKENS[:, :-1]), TOKENS[:, 1:]
    ).mean()
    method = METHODS[name]
    training = training_of(method, Trial(20 * method.start, 2e-3), CONFIG)
    state = training.init_state(training.keep(params))
    losses = []
    for _ in range(20):
        state, outcome = training.step(state, TOKENS)
        losses.append(float(outcome.loss))
    assert losses[0] == pytest.approx(float(expected), abs=0.01 if method.int8 else 1e-4)
    assert losses[-1] < losses[0] - 0.05
