import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples.llama.checkpoint import tree_bytes
from examples.llama.optimizers import (
    OPTIMIZERS,
    OptimizerSettings,
    decayed_leaves,
    learning_rate_schedule,
    make_optimizer,
    unstack_blocks,
)


def settings(name: Any, **overrides: Any) -> OptimizerSettings:
    arguments = {"learning_rate": 0.05, "total_steps": 20, "rank": 2} | overrides
    return OptimizerSettings(name, **arguments)


def params() -> dict[str, Any]:
    """Leaves named and shaped as those of a small LLaMA of three layers."""
    keys = iter(jax.random.split(jax.random.key(0), 5))
    return {
        "embed": {"embedding": jax.random.normal(next(keys), (16, 6))},
        "blocks": {
            "attention_norm": {"scale": jnp.ones((3, 6))},
            "attention": {"q_proj": {"kernel": jax.random.normal(next(keys), (3, 6, 6))}},
            "mlp": {"up_proj": {"kernel": jax.random.normal(next(keys), (3, 6, 10))}},
        },
        "norm": {"scale": jnp.ones(6)},
        "lm_head": {"kernel": jax.random.normal(next(keys), (6, 16))},
    }


def distance_to_target(params: Any) -> jax.Array:
    errors = [jnp.mean((leaf - 0.5) ** 2) for leaf in jax.tree.leaves(params)]
    return jnp.sum(jnp.stack(errors))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains_every_leaf(name: Any) -> None:
    # Each is judged on its own scale: Adafactor's and SGD's learning rates are relative.
    rate = {"adafactor": 0.2, "sgd": 2.0, "apollo_mini": 0.02}.get(name, 0.05)
    tx = make_optimizer(settings(name, learning_rate=rate))

    @jax.jit
    def step(params: Any, state: Any) -> tuple[Any, Any]:
        updates, state = tx.update(jax.grad(distance_to_target)(params), state, params)
        return optax.apply_updates(params, updates), state

    before = after = params()
    state = jax.jit(tx.init)(before)
    for _ in range(20):
        after, state = step(after, state)
    assert distance_to_target(after) < 0.8 * distance_to_target(before)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert jnp.mean((new - 0.5) ** 2) < jnp.mean((old - 0.5) ** 2)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_shrinks_every_matrix_by_the_learning_rate_and_spares_norms(name: Any) -> None:
    tx = make_optimizer(settings(name, learning_rate=0.1, weight_decay=0.5, warmup_fraction=0.05))
    given = params()
    zeros = jax.tree.map(jnp.zeros_like, given)
    updates = jax.jit(lambda: tx.update(zeros, tx.init(given), given)[0])()
    decayed = decayed_leaves(given)
    expected = jax.tree.map(lambda leaf, shrinks: -0.05 * shrinks * leaf, given, decayed)
    chex.assert_trees_all_close(updates, expected, rtol=1e-5)


def test_clipping_bounds_the_global_norm_of_the_gradients() -> None:
    tx = make_optimizer(settings("sgd", learning_rate=1.0, clip=0.1, warmup_fraction=0.05))
    given = params()
    grads = jax.tree.map(lambda leaf: 1e3 * jnp.ones_like(leaf), given)
    updates, _ = tx.update(grads, tx.init(given), given)
    assert optax.tree.norm(updates) == pytest.approx(0.1, rel=1e-5)


def test_learning_rate_rises_to_its_peak_and_falls_to_a_tenth_of_it() -> None:
    schedule = learning_rate_schedule(settings("adamw", learning_rate=2.0, warmup_fraction=0.25))
    rates = schedule(np.arange(20))
    np.testing.assert_allclose(rates[:5], [0.4, 0.8, 1.2, 1.6, 2.0], rtol=1e-6)
    assert np.all(np.diff(rates[5:]) < 0)
    assert rates[19] == pytest.approx(0.2)


def test_learning_rate_without_warm_up_begins_at_nearly_its_peak() -> None:
    schedule = learning_rate_schedule(settings("adamw", warmup_fraction=0.0, total_steps=1000))
    assert schedule(0) == pytest.approx(0.05, rel=1e-4)


def test_decayed_leaves_are_the_matrices() -> None:
    decayed = decayed_leaves(params())
    assert decayed["lm_head"]["kernel"]
    assert decayed["embed"]["embedding"]
    assert not decayed["norm"]["scale"]
    assert not decayed["blocks"]["attention_norm"]["scale"]


def test_galore_of_stacked_blocks_is_galore_of_each_layer() -> None:
    given = params()
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], given["blocks"]) for i in range(3)]
    galore = optax.contrib.galore(0.1, rank=2)
    stacked = unstack_blocks(galore)
    updates = jax.jit(lambda: stacked.update(given, stacked.init(given), given)[0])()
    apart = {**given, "blocks": layers}
    expected = jax.jit(lambda: galore.update(apart, galore.init(apart), apart)[0])()
    for i in range(3):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], updates["blocks"])
        jax.tree.map(np.testing.assert_array_equal, layer, expected["blocks"][i])


def test_optimizer_memory_is_ordered_as_the_papers_say() -> None:
    given = params()
    state_bytes = {
        name: tree_bytes(jax.eval_shape(make_optimizer(settings(name)).init, given))
        for name in OPTIMIZERS
    }
    assert state_bytes["sgd"] < state_bytes["adamw"]
    assert state_bytes["apollo_mini"] < state_bytes["apollo"] < state_bytes["galore"]
    assert state_bytes["galore"] < state_bytes["adamw"]


@pytest.mark.parametrize("name", ["apollo", "apollo_mini", "galore"])
def test_projecting_embeddings_leaves_no_full_moments(name: Any) -> None:
    given = params()
    kept, projected = (
        tree_bytes(
            jax.eval_shape(make_optimizer(settings(name, project_embeddings=choice)).init, given)
        )
        for choice in (False, True)
    )
    assert projected < kept


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"learning_rate": 0.0}, "--learning-rate is 0.0; expected a positive, finite number"),
        ({"name": "adam"}, "--optimizer is 'adam'; expected one of apollo, "),
        ({"granularity": "row"}, "granularity must be one of .*, got 'row'"),
        ({"projection": "sparse"}, "--projection is 'sparse'; expected one of gaussian, "),
    ],
)
def test_settings_out_of_range_are_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make_optimizer(dataclasses.replace(settings("apollo"), **change))


@pytest.mark.parametrize(
    "change",
    [{"granularity": "tensor"}, {"projection": "rademacher"}, {"projection": "svd"}],
)
def test_each_choice_of_apollo_reaches_the_update(change: dict[str, Any]) -> None:
    given = params()
    grads = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(0), leaf.shape), given)

    def update_of(chosen: OptimizerSettings) -> Any:
        tx = make_optimizer(chosen)
        return tx.update(grads, tx.init(given), given)[0]

    usual = update_of(settings("apollo"))["blocks"]
    changed = update_of(settings("apollo", **change))["blocks"]
    usual, changed = (blocks["mlp"]["up_proj"]["kernel"] for blocks in (usual, changed))
    assert not np.allclose(usual, changed, rtol=1e-3)


def test_no_limit_lets_the_norm_of_an_update_grow_faster() -> None:
    given = params()
    grads = jax.tree.map(lambda leaf: jax.random.normal(jax.random.key(0), leaf.shape), given)

    def growth(limit: float | None) -> float:
        tx = make_optimizer(settings("apollo", warmup_fraction=0.0, norm_growth_limit=limit))
        state = tx.init(given)
        first, state = tx.update(grads, state, given)
        second, state = tx.update(grads, state, given)
        first, second = (
            jnp.linalg.norm(updates["blocks"]["mlp"]["up_proj"]["kernel"][0])
            for updates in (first, second)
        )
        return float(second / first)

    # Of a constant gradient the factors grow by a third, before the bias is corrected.
    assert growth(None) > 1.2 * growth(1.01)


@pytest.mark.parametrize("name", ["apollo", "galore"])
def test_rank_out_of_range_is_named(name: Any) -> None:
    with pytest.raises(ValueError, match="rank"):
        make_optimizer(settings(name, rank=0))
