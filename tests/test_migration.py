"""What docs/migration.md says of other packages' arguments holds of ours."""

from pathlib import Path
from typing import Any

import chex
import jax
import optax
import pytest

from apollo_optax import apollo, apollo_mini, limit_norm_growth, svd
from tests.test_docs import BLOCK

PAGE = Path(__file__).parent.parent / "docs" / "migration.md"
PARAMS = {"kernel": jax.random.normal(jax.random.key(0), (8, 16))}


@pytest.fixture(scope="module")
def apollo_from_optim_args():
    namespace: dict[str, Any] = {"__name__": "__docs__"}
    exec(compile(BLOCK.findall(PAGE.read_text())[0], "docs", "exec"), namespace)
    return namespace["apollo_from_optim_args"]


def gradients(steps):
    for number in range(steps):
        size = 1 + 3 * (number % 3)
        key = jax.random.key(number)
        yield {"kernel": size * jax.random.normal(key, PARAMS["kernel"].shape)}


def updates_of(tx, steps=6):
    state, updates = tx.init(PARAMS), []
    for grads in gradients(steps):
        update, state = tx.update(grads, state, PARAMS)
        updates.append(update)
    return updates


@pytest.mark.parametrize(
    ("optim_args", "direct"),
    [
        ({}, apollo(0.01, rank=128)),
        ("rank=4,scale=2.0,update_proj_gap=3", apollo(0.01, 4, update_proj_gap=3, scale=2**0.5)),
        ("rank=1, scale_type=tensor, scale=128, proj_type=std", apollo_mini(0.01)),
        ({"rank": "4", "proj": "svd"}, apollo(0.01, 4, projection=svd)),
    ],
)
def test_optim_args_of_hugging_face_make_the_optimizer_they_say(
    apollo_from_optim_args, optim_args, direct
):
    chex.assert_trees_all_equal(
        updates_of(apollo_from_optim_args(0.01, optim_args)), updates_of(direct)
    )


@pytest.mark.parametrize("optim_args", ["proj_type=left", "rank=1,alpha=2"])
def test_optim_args_without_a_counterpart_are_refused(apollo_from_optim_args, optim_args):
    with pytest.raises(ValueError, match="proj_type|alpha"):
        apollo_from_optim_args(0.01, optim_args)


def test_a_constant_scale_before_the_limiter_is_the_same_as_after_it():
    limiter, scale = limit_norm_growth(1.01), optax.scale(128**0.5)
    after = updates_of(optax.chain(scale, limiter))
    chex.assert_trees_all_close(after, updates_of(optax.chain(limiter, scale)), rtol=1e-5)
    assert optax.tree.norm(after[1]) < 1.02 * optax.tree.norm(after[0])


def test_a_learning_rate_undoes_the_bias_correction():
    b1, b2, lr = 0.9, 0.999, 0.01

    def learning_rate(count):
        t = count + 1
        return lr * (1 - b1**t) / (1 - b2**t) ** 0.5

    corrected = updates_of(apollo(lr, 4))
    without = updates_of(apollo(learning_rate, 4))
    for t, (update, uncorrected) in enumerate(zip(corrected, without, strict=True), start=1):
        factor = (1 - b2**t) ** 0.5 / (1 - b1**t)
        chex.assert_trees_all_close(
            update, jax.tree.map(lambda u, f=factor: u * f, uncorrected), rtol=1e-4
        )
