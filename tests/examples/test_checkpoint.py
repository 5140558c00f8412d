import errno
import json
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.llama.checkpoint import (
    differing_settings,
    open_checkpoints,
    read_record,
    restore_state,
    save,
    tree_bytes,
)
from examples.llama.optimizers import OPTIMIZERS, OptimizerSettings, make_optimizer
from examples.llama.train import TrainState, init_state


def state_of(name: Any, step: int = 3, dtype: Any = jnp.float32) -> TrainState:
    settings = OptimizerSettings(name, learning_rate=0.1, total_steps=10, rank=2)
    params = {
        "embed": {"embedding": jnp.arange(12.0, dtype=dtype).reshape(4, 3)},
        "blocks": {"mlp": {"up_proj": {"kernel": jnp.ones((2, 3, 4), dtype)}}},
        "norm": {"scale": jnp.full(3, 0.1, dtype)},
    }
    return init_state(make_optimizer(settings), params)._replace(step=jnp.int32(step))


def numbered(state: TrainState) -> TrainState:
    """The same structure with a value of its own in every leaf."""
    leaves, treedef = jax.tree.flatten(state)
    return jax.tree.unflatten(treedef, [leaf + i for i, leaf in enumerate(leaves)])


def abstract(state: TrainState) -> TrainState:
    return jax.eval_shape(lambda: state)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_a_state_comes_back_to_the_bit_in_its_own_structure(
    tmp_path: Path, name: Any, dtype: Any
) -> None:
    state = numbered(state_of(name, dtype=dtype))
    with open_checkpoints(tmp_path) as checkpoints:
        save(checkpoints, state, {})
        restored = restore_state(checkpoints, abstract(state))
    before, treedef = jax.tree.flatten(state)
    after, restored_treedef = jax.tree.flatten(restored)
    assert str(restored_treedef) == str(treedef)
    for old, new in zip(before, after, strict=True):
        assert old.dtype == new.dtype
        np.testing.assert_array_equal(old, new)


def test_the_latest_record_is_read_without_the_arrays(tmp_path: Path) -> None:
    with open_checkpoints(tmp_path) as checkpoints:
        assert read_record(checkpoints) is None
        save(checkpoints, state_of("sgd", step=1), {"batches": {"next_index": 1}})
        save(checkpoints, state_of("sgd", step=2), {"batches": {"next_index": 2}})
    shutil.rmtree(tmp_path / "2" / "state")
    with open_checkpoints(tmp_path) as checkpoints:
        assert read_record(checkpoints) == {"batches": {"next_index": 2}}


def test_only_the_latest_are_kept(tmp_path: Path) -> None:
    with open_checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3):
            save(checkpoints, state_of("sgd", step=step), {})
        assert checkpoints.all_steps() == [2, 3]


def test_saving_a_step_again_leaves_it_as_it_is(tmp_path: Path) -> None:
    with open_checkpoints(tmp_path) as checkpoints:
        save(checkpoints, state_of("sgd", step=1), {"first": True})
        save(checkpoints, state_of("sgd", step=1), {"first": False})
        assert read_record(checkpoints) == {"first": True}


def test_keeping_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep is 0"), open_checkpoints(tmp_path, keep=0):
        pass


def test_differing_settings_are_named_with_both_values() -> None:
    saved = {"model": {"num_layers": 4, "rope": None}, "seed": 0}
    given = {"model": {"num_layers": 2, "rope": {"factor": 2}}, "seed": 0}
    assert differing_settings(saved, given) == [
        "model.num_layers is 4 there and 2 here",
        "model.rope is None there and absent here",
        "model.rope.factor is absent there and 2 here",
    ]
    assert differing_settings(saved, json.loads(json.dumps(saved))) == []


def test_bytes_are_counted_of_arrays_and_of_shapes_alike() -> None:
    state = state_of("adamw", dtype=jnp.bfloat16)
    assert tree_bytes(state.params) == 2 * (12 + 24 + 3)
    assert tree_bytes(abstract(state)) == tree_bytes(state)


class DiskUsage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_checkpoint_that_does_not_fit_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_checkpoints(tmp_path) as checkpoints:
        save(checkpoints, state_of("sgd", step=1), {})
        monkeypatch.setattr(shutil, "disk_usage", lambda _: DiskUsage(1000, 900, 100))
        with pytest.raises(OSError, match=r"step 2 .*100 are free.*step 1 is whole") as raised:
            save(checkpoints, state_of("sgd", step=2), {})
        assert raised.value.errno == errno.ENOSPC
        assert checkpoints.all_steps() == [1]


@pytest.fixture
def file_size_limit() -> Iterator[None]:
    """As a disk that fills up while a file is written: no file may grow beyond 64 KiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_leaves_the_checkpoint_before_it_whole(
    tmp_path: Path, file_size_limit: None
) -> None:
    small = state_of("sgd", step=1)
    # Random, so that it cannot be compressed below the limit.
    noise = jax.random.bits(jax.random.key(0), (1 << 16,), jnp.uint8)
    with open_checkpoints(tmp_path) as checkpoints:
        save(checkpoints, small, {"step": 1})
        with pytest.raises(OSError, match="step 2 .*File too large.*step 1 is whole"):
            save(checkpoints, TrainState(jnp.int32(2), {"noise": noise}, ()), {"step": 2})
    with open_checkpoints(tmp_path) as checkpoints:
        assert read_record(checkpoints) == {"step": 1}
        restored = restore_state(checkpoints, abstract(small))
    np.testing.assert_array_equal(restored.params["norm"]["scale"], small.params["norm"]["scale"])
    assert not list(tmp_path.glob("*tmp*"))
