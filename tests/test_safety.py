"""What is loaded is data: nothing in it is run, and nothing is written beside its place."""

import ast
import os
import pickle
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.llama.checkpoint import open_checkpoints, read_record, restore, save
from examples.llama.corpus import load_corpus
from examples.llama.huggingface import load_llama
from examples.llama.tokenizer import load_tokenizer
from examples.llama.train import TrainState

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    path for name in ("apollo_optax", "examples") for path in (ROOT / name).rglob("*.py")
)
RUNS_CODE = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "torch"}


def names_used(path: Path) -> set[str]:
    """Imported modules and called built-in functions of a source file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found.add(node.func.id)
        elif isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "trust_remote_code"):
            found.add(node.arg)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_loads_what_could_run(path: Path) -> None:
    forbidden = RUNS_CODE | {"eval", "exec", "__import__", "allow_pickle", "trust_remote_code"}
    assert not names_used(path) & forbidden


class Bomb:
    """Writes a file where it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def bomb(tmp_path: Path) -> tuple[Path, bytes]:
    went_off = tmp_path / "went off"
    content = pickle.dumps(Bomb(went_off))
    pickle.loads(content)
    assert went_off.is_dir()
    went_off.rmdir()
    return went_off, content


def state(step: int) -> TrainState:
    return TrainState(jnp.int32(step), {"w": jnp.arange(6.0)}, ())


def abstract() -> TrainState:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state(0))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_no_file_of_a_checkpoint_is_unpickled(bomb: tuple[Path, bytes], tmp_path: Path) -> None:
    went_off, content = bomb
    whole = tmp_path / "whole"
    with open_checkpoints(whole) as checkpoints:
        save(checkpoints, state(1), {})
        save(checkpoints, state(2), {})
    files = [p.relative_to(whole) for p in (whole / "2").rglob("*") if p.is_file()]
    assert len(files) > 5
    for number, file in enumerate(files):
        folder = tmp_path / f"{number}" / "checkpoints"
        shutil.copytree(whole, folder)
        (folder / file).write_bytes(content)
        np.testing.assert_array_equal(restore(folder, abstract()).state.params["w"], np.arange(6.0))
    assert not went_off.exists()


@pytest.mark.parametrize(
    ("load", "name"),
    [
        (load_llama, "model/pytorch_model.bin"),
        (load_llama, "model/model.safetensors"),
        (load_llama, "model/config.json"),
        (lambda path: load_tokenizer(str(path / "tokenizer.json"), ()), "model/tokenizer.json"),
        (lambda path: list(load_corpus(str(path / "text.jsonl")).train), "model/text.jsonl"),
        (lambda path: list(load_corpus(str(path / "t.parquet")).train), "model/t.parquet"),
    ],
    ids=["weights", "safetensors", "config", "tokenizer", "jsonl", "parquet"],
)
def test_no_model_tokenizer_or_text_is_unpickled(
    load: Any, name: str, bomb: tuple[Path, bytes], tmp_path: Path
) -> None:
    went_off, content = bomb
    path = tmp_path / name
    path.parent.mkdir()
    path.write_bytes(content)
    if path.name == "model.safetensors":
        (path.parent / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises((ValueError, OSError)):
        load(path.parent)
    assert not went_off.exists()


def test_the_index_of_a_model_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    config = {
        **{"model_type": "llama", "vocab_size": 8, "hidden_size": 4, "intermediate_size": 8},
        **{"num_hidden_layers": 1, "num_attention_heads": 2},
    }
    (folder / "config.json").write_text(re.sub("'", '"', str(config)))
    index = folder / "model.safetensors.index.json"
    for outside in ("../secret.safetensors", "/secret.safetensors", "a/../../secret"):
        index.write_text(f'{{"weight_map": {{"lm_head.weight": "{outside}"}}}}')
        with pytest.raises(ValueError, match="expected names of files beside it"):
            load_llama(folder)


def test_a_link_among_the_checkpoints_leads_to_nothing_being_deleted(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "run" / "checkpoints"
    with open_checkpoints(outside) as checkpoints:
        save(checkpoints, state(1), {"outside": True})
    before = {path: path.stat().st_mtime_ns for path in outside.rglob("*") if path.is_file()}
    folder.mkdir(parents=True)
    (folder / "1").symlink_to(outside / "1", target_is_directory=True)
    assert read_record(folder) == {"outside": True}
    with (
        open_checkpoints(folder, keep=1) as checkpoints,
        pytest.raises(OSError, match="symbolic link"),
    ):
        save(checkpoints, state(2), {})
    assert {p: p.stat().st_mtime_ns for p in outside.rglob("*") if p.is_file()} == before


def test_dependencies_have_floors_and_no_caps() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    for requirement in (r for group in groups for r in group):
        bare = requirement.split(";")[0].strip()
        assert not re.search(r"<|==|~=|!=", bare), bare
        ours_or_jax = bare.startswith("apollo-optax[") or bare.startswith("jax[")
        assert ">=" in bare or ours_or_jax, bare
    assert project["requires-python"] == ">=3.11"
