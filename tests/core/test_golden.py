"""The published optimizer's recorded trajectories, replayed through the public API."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import apollo_optax

TRAJECTORIES = sorted((Path(__file__).parent / "golden").glob("*.npz"), key=lambda path: path.stem)


class Trajectory(NamedTuple):
    config: dict[str, Any]
    init: np.ndarray
    grads: np.ndarray
    projections: np.ndarray
    params: np.ndarray
    norms: np.ndarray


def load(path: Path) -> Trajectory:
    data = np.load(path)
    as_kernel = {name: np.swapaxes(data[name], -1, -2) for name in ("init", "grads", "params")}
    wide = data["init"].shape[0] < data["init"].shape[1]
    projections = np.swapaxes(data["projections"], -1, -2) if wide else data["projections"]
    return Trajectory(
        json.loads(str(data["config"])), projections=projections, norms=data["norms"], **as_kernel
    )


def optimizer(recorded: Trajectory, **overrides: Any) -> optax.GradientTransformation:
    config = recorded.config
    projections = jnp.asarray(recorded.projections)

    def recorded_projection(key: jax.Array, refresh: jax.Array, rank: int, dim: int) -> jax.Array:
        return projections[refresh * config["update_proj_gap"]]

    arguments: dict[str, Any] = {
        "learning_rate": config["lr"],
        "rank": config["rank"],
        "update_proj_gap": config["update_proj_gap"],
        "scale": config["scale_squared"] ** 0.5,
        "granularity": config["scale_type"],
        "b1": config["betas"][0],
        "b2": config["betas"][1],
        "eps": config["eps"],
        "weight_decay": config["weight_decay"],
        "projection": recorded_projection,
    }
    return apollo_optax.apollo(**(arguments | overrides))


def replay(
    recorded: Trajectory, tx: optax.GradientTransformation, dtype: Any = jnp.float32
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the weight and the remembered norm after every step."""

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = jnp.asarray(recorded.init, dtype)
    state = tx.init(params)
    weights, norms = [], []
    for grads in recorded.grads:
        params, state = step(params, state, jnp.asarray(grads, dtype))
        weights.append(np.asarray(params, np.float32))
        norms.append(np.asarray(optax.tree.get(state, "norm")))
    return np.stack(weights), np.stack(norms)


def relative_error(actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """The norm of the difference over the norm, a number a step."""
    axes = tuple(range(1, expected.ndim))
    return np.sqrt(np.sum((actual - expected) ** 2, axes) / np.sum(expected**2, axes))


def decay_order_tolerance(recorded: Trajectory) -> float:
    """The published optimizer decays the updated weight, Optax the old: lr wd |update| a step."""
    config = recorded.config
    moved = np.diff(recorded.params, axis=0, prepend=recorded.init[None])
    relative_update = np.linalg.norm(moved, axis=(1, 2)) / np.linalg.norm(
        recorded.params, axis=(1, 2)
    )
    return 1.1 * config["lr"] * config["weight_decay"] * float(relative_update.sum())


class Replay(NamedTuple):
    recorded: Trajectory
    weights: np.ndarray
    norms: np.ndarray


@pytest.fixture(scope="module", params=TRAJECTORIES, ids=lambda path: path.stem)
def replayed(request: pytest.FixtureRequest) -> Replay:
    recorded = load(request.param)
    return Replay(recorded, *replay(recorded, optimizer(recorded)))


def test_replays_the_published_weights_and_norms(replayed):
    tolerance = 1e-5 + decay_order_tolerance(replayed.recorded)
    assert relative_error(replayed.weights, replayed.recorded.params).max() < tolerance
    np.testing.assert_allclose(replayed.norms, replayed.recorded.norms, rtol=1e-5)


def test_bfloat16_follows_float32_within_its_precision(replayed):
    recorded, weights, _ = replayed
    coarse, _ = replay(recorded, optimizer(recorded), jnp.bfloat16)
    epsilon = float(jnp.finfo(jnp.bfloat16).eps)
    steps = np.arange(1, len(weights) + 1)
    # Half a unit in the last place for the initial weight, and again for every step.
    assert (relative_error(coarse, weights) < epsilon / 2 * (1 + np.sqrt(steps))).all()


def test_the_recorded_spike_makes_the_limiter_act(replayed):
    recorded, limited, _ = replayed
    unlimited, _ = replay(recorded, optimizer(recorded, norm_growth_limit=None))
    assert relative_error(unlimited, limited).max() > 1e-3
