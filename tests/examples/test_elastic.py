"""A run goes on from its checkpoints on other devices than those that wrote them."""

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path

import jax
import pytest
import rich.console
import tyro

from examples.llama.config import MODELS
from examples.llama.mesh import make_mesh, parse_mesh
from examples.llama.options import PretrainConfig
from examples.llama.pretrain import prepare, train_all
from tests.examples.tiny_pretrain import TINY, losses, squares

KINDS = {
    "f32": ["--optimizer", "apollo", "--rank", "4", "--update-proj-gap", "2"],
    "bf16": ["--optimizer", "apollo", "--rank", "4", "--weights", "bf16", "--compute", "f32"],
    "f32-layerwise": ["--optimizer", "apollo_mini", "--update", "layerwise"],
    "int8-layerwise": [
        *("--optimizer", "apollo_mini", "--update", "layerwise", "--project-embeddings"),
        *("--weights", "int8", "--compute", "f32"),
    ],
}
# Eight devices, one, and all of them again; FSDP, tensor-parallel and both.
FEW_MESHES = ("fsdp=8", None, "data=2,fsdp=2,tensor=2")
MESHES = ("fsdp=8", "tensor=2,fsdp=2", None, "tensor=2", "data=2,fsdp=2,tensor=2")


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "nano", TINY)


def train(flags: list[str], mesh: str | None, *, until: int) -> None:
    """Trains on a mesh of the first devices and stops after a step, saved."""
    config = tyro.cli(tyro.conf.OmitArgPrefixes[PretrainConfig], args=flags)
    sizes = parse_mesh(mesh or "data=1")
    number = sizes["data"] * sizes["fsdp"] * sizes["tensor"]
    placed = None if mesh is None else make_mesh(sizes, jax.devices()[:number])
    plan = prepare(config)
    plan = plan._replace(runs=[dataclasses.replace(run, mesh=placed) for run in plan.runs])
    output = io.StringIO()

    class Stop(list):
        def __bool__(self) -> bool:
            return f"step {until - 1}/" in output.getvalue()

    with jax.set_mesh(placed) if placed else jax.default_device(jax.devices()[0]):
        train_all(plan, config, rich.console.Console(file=output, soft_wrap=True), Stop())


@pytest.mark.parametrize(
    ("kind", "meshes"),
    [
        pytest.param("f32", FEW_MESHES, marks=pytest.mark.slow),
        *(pytest.param(kind, MESHES, marks=pytest.mark.release) for kind in KINDS),
    ],
)
def test_a_run_that_moves_from_mesh_to_mesh_is_the_run_that_stayed(
    kind: str, meshes: Sequence[str | None], tmp_path: Path
) -> None:
    corpus = tmp_path / "text.txt"
    corpus.write_text(squares())
    steps = 2 * len(meshes)
    flags = [
        *("--data", str(corpus), "--sequence", "16", "--batch", "8", "--micro-batches", "1"),
        *("--steps", str(steps), "--log-every", "1", "--sample-length", "0"),
        *("--evaluation-batches", "1", "--evaluate-every", "100", *KINDS[kind]),
    ]
    stayed, moved = tmp_path / "stayed", tmp_path / "moved"
    train([*flags, "--output", str(stayed)], None, until=steps)
    for number, mesh in enumerate(meshes):
        resume = ["--resume"] if number else []
        train([*flags, "--output", str(moved), *resume], mesh, until=2 * number + 2)
        saved = max(int(path.name) for path in (moved / "checkpoints").iterdir())
        assert saved == 2 * number + 2
    assert len(losses(stayed)) == steps + 1
    assert losses(moved) == pytest.approx(losses(stayed), rel=1e-5)
