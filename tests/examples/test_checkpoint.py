import errno
import itertools
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from examples.llama import checkpoint
from examples.llama.checkpoint import (
    differing_settings,
    open_checkpoints,
    read_record,
    restore,
    save,
    tree_bytes,
)
from examples.llama.optimizers import OPTIMIZERS, OptimizerSettings, make_optimizer
from examples.llama.train import TrainState, init_state

# When one array cannot be read or written, Orbax
# closes the loop that its other threads still report to.
after_failed_reads = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def state_of(name: Any, step: int = 3, dtype: Any = jnp.float32) -> TrainState:
    settings = OptimizerSettings(name, learning_rate=0.1, total_steps=10, rank=2)
    params = {
        "embed": {"embedding": jnp.arange(12.0, dtype=dtype).reshape(4, 3)},
        "blocks": {"mlp": {"up_proj": {"kernel": jnp.ones((2, 3, 4), dtype)}}},
        "norm": {"scale": jnp.full(3, 0.1, dtype)},
        # Too long to be kept beside its name, as the others are.
        "head": {"kernel": jax.random.normal(jax.random.key(0), (3, 200), dtype)},
    }
    return init_state(make_optimizer(settings), params)._replace(step=jnp.int32(step))


def numbered(state: TrainState) -> TrainState:
    """The same structure with a value of its own in every leaf."""
    leaves, treedef = jax.tree.flatten(state)
    return jax.tree.unflatten(treedef, [leaf + i for i, leaf in enumerate(leaves)])


def abstract(state: TrainState) -> TrainState:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state)


@pytest.mark.parametrize(
    ("name", "dtype"),
    list(zip(OPTIMIZERS, itertools.cycle([jnp.float32, jnp.bfloat16]), strict=False)),
)
def test_a_state_comes_back_to_the_bit_in_its_own_structure(
    tmp_path: Path, name: Any, dtype: Any
) -> None:
    state = numbered(state_of(name, dtype=dtype))
    with open_checkpoints(tmp_path) as checkpoints:
        save(checkpoints, state, {})
    restored = restore(tmp_path, abstract(state)).state
    before, treedef = jax.tree.flatten(state)
    after, restored_treedef = jax.tree.flatten(restored)
    assert str(restored_treedef) == str(treedef)
    for old, new in zip(before, after, strict=True):
        assert old.dtype == new.dtype
        np.testing.assert_array_equal(old, new)


def test_the_latest_record_is_read_without_the_arrays(tmp_path: Path) -> None:
    assert read_record(tmp_path / "missing") is None
    assert read_record(tmp_path) is None
    with open_checkpoints(tmp_path) as checkpoints:
        save(checkpoints, state_of("sgd", step=1), {"batches": {"next_index": 1}})
        save(checkpoints, state_of("sgd", step=2), {"batches": {"next_index": 2}})
    shutil.rmtree(tmp_path / "2" / "state")
    assert read_record(tmp_path) == {"batches": {"next_index": 2}}


def test_only_the_latest_are_kept(tmp_path: Path) -> None:
    with open_checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3):
            save(checkpoints, state_of("sgd", step=step), {})
        assert checkpoints.all_steps() == [2, 3]


def test_saving_a_step_again_leaves_it_as_it_is(tmp_path: Path) -> None:
    with open_checkpoints(tmp_path) as checkpoints:
        save(checkpoints, state_of("sgd", step=1), {"first": True})
        save(checkpoints, state_of("sgd", step=1), {"first": False})
    assert read_record(tmp_path) == {"first": True}


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
    assert tree_bytes(state.params) == 2 * (12 + 24 + 3 + 600)
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


@after_failed_reads
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
    with open_checkpoints(tmp_path):
        pass
    restored, record, damaged = restore(tmp_path, abstract(small))
    assert record == {"step": 1}
    assert not damaged
    np.testing.assert_array_equal(restored.params["norm"]["scale"], small.params["norm"]["scale"])
    assert not list(tmp_path.glob("*tmp*"))


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    with open_checkpoints(folder) as checkpoints:
        for step in (1, 2):
            save(checkpoints, numbered(state_of("sgd", step=step)), {"at": step})
    return folder


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "truncated": truncate,
    "flipped": flip_a_bit,
    "missing": Path.unlink,
}


@after_failed_reads
@pytest.mark.parametrize("damage", DAMAGES)
def test_whatever_file_is_damaged_the_state_is_whole_or_that_of_the_checkpoint_before(
    damage: str, two_checkpoints: Path, tmp_path: Path
) -> None:
    found = 0
    for number, path in enumerate(files_of(two_checkpoints / "2")):
        folder = tmp_path / str(number) / "checkpoints"
        shutil.copytree(two_checkpoints, folder)
        DAMAGES[damage](folder / path.relative_to(two_checkpoints))
        restored = restore(folder, abstract(state_of("sgd")))
        # What is written about a checkpoint, such as its time, is not the checkpoint.
        step = 1 if restored.damaged else 2
        found += len(restored.damaged)
        assert restored.record == {"at": step}
        expected = numbered(state_of("sgd", step=step))
        jax.tree.map(np.testing.assert_array_equal, restored.state, expected)
        assert [each.step for each in restored.damaged] == [2] * (step == 1)
        assert (folder / "2").exists() == (step == 2)
        assert (folder.parent / "damaged" / "2-1").exists() == (step == 1)
    assert found >= 3


@after_failed_reads
def test_a_step_that_was_damaged_can_be_saved_again(two_checkpoints: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_checkpoints, folder)
    for number in (1, 2):
        shutil.rmtree(folder / "2" / "state")
        restored = restore(folder, abstract(state_of("sgd")))
        assert "arrays cannot be read" in restored.damaged[0].reason
        with open_checkpoints(folder) as checkpoints:
            save(checkpoints, state_of("sgd", step=2), {"again": number})
        assert read_record(folder) == {"again": number}
    assert {path.name for path in (tmp_path / "damaged").iterdir()} == {"2-1", "2-2"}


def test_a_changed_value_is_found_and_named(two_checkpoints: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_checkpoints, folder)
    other = numbered(state_of("sgd", step=2))
    scale = other.params["norm"]["scale"]
    other.params["norm"]["scale"] = scale.at[1].set(jnp.nextafter(scale[1], 9.0))
    shutil.rmtree(folder / "2" / "state")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute() / "2" / "state", other)
    (damage,) = restore(folder, abstract(other)).damaged
    assert damage.reason == "not what was written: params.norm.scale"


def test_when_all_are_damaged_nothing_is_moved_and_each_is_named(
    two_checkpoints: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_checkpoints, folder)
    for step in ("1", "2"):
        truncate(folder / step / "record" / "metadata")
    with pytest.raises(OSError, match=r"no checkpoint in .* is whole: .*step 2.*step 1"):
        restore(folder, abstract(state_of("sgd")))
    with pytest.raises(OSError, match="no checkpoint in .* is whole"):
        read_record(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]


def test_no_memory_left_is_not_taken_for_damage(
    two_checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_checkpoints, folder)

    def restore_nothing(*args: Any, **kwargs: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(ocp.CheckpointManager, "restore", restore_nothing)
    with pytest.raises(MemoryError):
        restore(folder, abstract(state_of("sgd")))
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_PAUSES_SECONDS", (0.0, 0.0))


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EACCES])
@pytest.mark.parametrize("quoted", [False, True], ids=["raised", "quoted"])
def test_a_read_error_that_passes_does_not_cost_the_newest_checkpoint(
    code: int,
    quoted: bool,
    no_pauses: None,
    two_checkpoints: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_checkpoints, folder)
    read = ocp.CheckpointManager.restore
    failures = [OSError(code, os.strerror(code)), ValueError(f"UNKNOWN: [os_error_code='{code}']")]

    def fail_twice(*args: Any, **kwargs: Any) -> Any:
        if failures_left:
            failures_left.pop()
            raise failures[quoted]
        return read(*args, **kwargs)

    failures_left = [1, 2]
    monkeypatch.setattr(ocp.CheckpointManager, "restore", fail_twice)
    restored = restore(folder, abstract(state_of("sgd")))
    assert restored.record == {"at": 2}
    assert not restored.damaged
    assert not (tmp_path / "damaged").exists()


UNREADABLE_FILES = ["record/metadata", "state/_METADATA", "state/manifest.ocdbt"]


@after_failed_reads
@pytest.mark.parametrize("name", UNREADABLE_FILES)
def test_a_file_that_cannot_be_read_is_an_error_that_moves_nothing(
    name: str, no_pauses: None, two_checkpoints: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_checkpoints, folder)
    path = folder / "2" / name
    path.unlink()
    # Linux answers a read at its beginning with EIO, and the opening of a circle with ELOOP.
    path.symlink_to(path if path.suffix == ".ocdbt" else "/proc/self/mem")
    with pytest.raises(OSError, match="checkpoint of step 2 cannot be read, after 3 attempts"):
        restore(folder, abstract(state_of("sgd")))
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]
    assert not (tmp_path / "damaged").exists()


def test_a_folder_without_checkpoints_cannot_be_restored(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        restore(tmp_path, abstract(state_of("sgd")))
