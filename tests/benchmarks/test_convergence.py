"""The convergence benchmark asks for the right runs, and each of them is what it says."""

import dataclasses
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import nano_learning_rates
from benchmarks.convergence import report
from benchmarks.convergence.methods import ABLATIONS, METHODS, MODEL, Trial
from benchmarks.convergence.search import (
    best_learning_rate,
    next_learning_rates,
    wanted_trials,
)
from benchmarks.convergence.training import make_transformation
from benchmarks.rows import RESULTS, read_rows
from examples.llama import model
from examples.llama.optimizers import DEFAULT_LEARNING_RATES, OptimizerSettings


def loss_at(learning_rate: float, best: float) -> float:
    """A bowl over the logarithm of the learning rate."""
    return 2 + abs(math.log2(learning_rate / best))


def row(trial: Trial, loss: float | None, state_bytes: int = 1) -> dict[str, Any]:
    return {
        "trial": trial.name,
        "learning_rate": trial.learning_rate,
        "seed": trial.seed,
        "validation_loss": loss,
        "state_bytes": state_bytes,
    }


@pytest.mark.parametrize("fine", [False, True])
@pytest.mark.parametrize("best", [1e-6, 1e-4, 3e-3, 0.01, 0.3])
def test_a_sweep_ends_with_a_worse_learning_rate_on_both_sides(best: float, fine: bool) -> None:
    losses: dict[float, float] = {}
    while missing := next_learning_rates(0.01, losses, fine=fine):
        losses |= {rate: loss_at(rate, best) for rate in missing}
    found = min(losses, key=lambda rate: losses[rate])
    assert min(losses) < found < max(losses)
    assert abs(math.log2(found / best)) <= (0.26 if fine else 0.51)
    assert len(losses) >= 3


def test_a_diverged_training_is_an_edge_and_not_the_best() -> None:
    losses = {0.005: 2.5, 0.01: 2.0, 0.02: math.inf}
    assert next_learning_rates(0.01, losses, fine=False) == ()


def run_all(losses_of: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    while wanted := wanted_trials(rows):
        rows += [row(trial, losses_of(trial)) for trial in wanted]
    return rows


def test_every_method_is_swept_then_seeded_and_every_ablation_run() -> None:
    rows = run_all(lambda trial: loss_at(trial.learning_rate, 2.5 * trial.method.start))
    done = {(row["trial"], row["learning_rate"], row["seed"]) for row in rows}
    assert len(done) == len(rows)
    for name in METHODS:
        best = best_learning_rate(rows, name)
        assert {(name, best, seed) for seed in (0, 1, 2)} <= done
    assert {trial for trial, _, _ in done} == set(METHODS) | set(ABLATIONS)
    report.table([row | {"state_bytes": 2} for row in rows])
    assert report.ablation_table(rows).count("\n") == 1 + len(ABLATIONS)


def test_the_committed_rows_are_of_the_methods_as_they_are_now() -> None:
    # Settings that came later have their defaults, which are what was before them.
    defaults = {
        field.name: field.default
        for field in dataclasses.fields(OptimizerSettings)
        if field.default is not dataclasses.MISSING
    }
    for found in read_rows(RESULTS / "convergence.json"):
        trial = Trial(found["trial"], found["learning_rate"], found["seed"])
        settings = json.loads(json.dumps(dataclasses.asdict(trial.settings)))
        assert defaults | found["settings"] == settings


def test_sweeps_come_before_seeds_and_ablations() -> None:
    names = [trial.name for trial in wanted_trials([])]
    assert set(names) == set(METHODS)


def test_names_of_methods_and_ablations_are_distinct() -> None:
    assert not set(METHODS) & set(ABLATIONS)


@pytest.mark.parametrize("name", [*METHODS, *ABLATIONS])
def test_every_trial_has_an_optimizer_whose_state_can_be_made(name: str) -> None:
    shapes = jax.eval_shape(lambda: model.init_params(MODEL, 0))
    tx = make_transformation(Trial(name, 0.01))
    jax.eval_shape(tx.init, shapes)


@pytest.mark.parametrize("name", sorted(ABLATIONS))
def test_an_ablation_changes_something_of_its_method(name: str) -> None:
    ablation = ABLATIONS[name]
    assert ablation.method() != METHODS[ablation.of]


def test_the_vocabulary_factor_multiplies_embedding_and_head_alone() -> None:
    params = jax.jit(lambda: model.init_params(MODEL, 0))()
    grads = jax.tree.map(jnp.ones_like, params)

    def update(name: str) -> Any:
        tx = make_transformation(Trial(name, 0.01))
        return jax.jit(lambda: tx.update(grads, tx.init(params), params)[0])()

    plain, multiplied = update("adamw"), update("adamw_vocabulary_4x")
    for name in plain:
        factor = 4 if name in ("embed", "lm_head") else 1
        for a, b in zip(
            jax.tree.leaves(plain[name]), jax.tree.leaves(multiplied[name]), strict=True
        ):
            np.testing.assert_allclose(factor * a, b, rtol=1e-5)


def test_the_frontier_has_no_result_that_another_beats_in_both() -> None:
    def result(name: str, loss: float, state_bytes: int) -> report.Result:
        return report.Result(name, 0.01, (loss,), state_bytes, ())

    results = [
        result("adamw", 2.6, 100),
        result("muon", 2.4, 50),
        result("apollo_mini", 2.7, 10),
        result("sgd", 3.0, 20),
    ]
    assert [r.name for r in report.frontier(results)] == ["apollo_mini", "muon"]


def test_nothing_is_missing_and_the_pages_conclusions_hold() -> None:
    rows = read_rows(RESULTS / "convergence.json")
    assert wanted_trials(rows) == []
    found = {result.name: result for result in report.results_of(rows)}
    assert {len(result.losses) for result in found.values()} == {3}
    for name in ("apollo_r32", "apollo_r16", "apollo_mini"):
        assert found[name].mean < found["adamw"].mean - 3 * (found["adamw"].deviation or math.inf)
    loss = {row["trial"]: row["validation_loss"] for row in rows}
    assert loss["tensor_r1"] < loss["channel_r1_half"] < loss["channel_r1"]
    assert loss["adamw_vocabulary_10x"] < found["apollo_r32"].mean
    assert abs(loss["apollo_r32_rademacher"] - found["apollo_r32"].losses[0]) < 0.02


@pytest.mark.parametrize("name", ["adafactor", "lion", "muon", "galore", "sgd"])
def test_default_learning_rates_are_the_best_of_the_sweeps(name: str) -> None:
    rows = read_rows(RESULTS / "convergence.json")
    assert DEFAULT_LEARNING_RATES[name] == best_learning_rate(rows, name)


@pytest.mark.parametrize("name", ["adamw", "apollo", "apollo_mini", "swan"])
def test_default_learning_rates_of_the_comparison_are_the_best_of_its_sweep(name: str) -> None:
    losses = {
        row["learning_rate"]: row["validation_loss"]
        for row in read_rows(nano_learning_rates.OUTPUT)
        if (row["name"], row["total_steps"], row["sequences"])
        == (name, nano_learning_rates.STEPS, nano_learning_rates.SEQUENCES)
        and row.get("vocabulary_learning_rate") in (None, row["learning_rate"])
    }
    as_good = [rate for rate, loss in losses.items() if loss < min(losses.values()) + 1e-3]
    assert DEFAULT_LEARNING_RATES[name] == min(as_good)
    assert min(losses) < DEFAULT_LEARNING_RATES[name] < max(losses)
