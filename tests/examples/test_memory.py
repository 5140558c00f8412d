import dataclasses
from pathlib import Path
from typing import Any

import jax
import pytest

from examples.llama.config import MODELS
from examples.llama.huggingface import StoredModel
from examples.llama.memory import Needed, advice, device_bytes, needed_bytes
from examples.llama.mesh import make_mesh, parse_mesh
from examples.llama.options import ModelOptions, PretrainConfig, TrainingOptions, resolve
from examples.llama.plan import PlanConfig, plan_step
from examples.llama.run import Run


def run_of(name: Any, model: Any = "nano", mesh: Any = None, **options: Any) -> Run:
    training = TrainingOptions(**{"weights": "f32"} | options)
    config = PretrainConfig(model=ModelOptions(name=model), training=training)
    stored = StoredModel(MODELS[model], "float32")
    settings = resolve(config, name, stored, data="text", text_digest="")
    return Run(settings, Path("run"), resume=False, mesh=mesh)


@pytest.mark.parametrize(
    ("name", "update"),
    [
        ("adamw", "standard"),
        pytest.param("apollo_mini", "layerwise", marks=pytest.mark.slow),
    ],
)
def test_no_compiled_step_needs_less_than_the_least(name: Any, update: Any) -> None:
    sizes: dict[str, Any] = {"batch": 4, "sequence": 64, "micro_batches": 1, "update": update}
    needed = needed_bytes(run_of(name, **sizes))
    plan = plan_step(
        PlanConfig("nano", "cpu", name, weights="f32", update=update, batch=4, sequence=64)
    )
    assert plan.argument_bytes is not None
    assert plan.argument_bytes < sum(needed) < plan.peak_bytes


def test_a_mesh_divides_what_a_device_needs() -> None:
    alone = needed_bytes(run_of("adamw"))
    mesh = make_mesh(parse_mesh("fsdp=8"))
    divided = needed_bytes(run_of("adamw", mesh=mesh))
    assert divided.activations == alone.activations // 8
    assert divided.weights == pytest.approx(alone.weights / 8, rel=0.01)
    assert device_bytes(run_of("adamw")) == 8 * device_bytes(run_of("adamw", mesh=mesh))


def test_70b_needs_what_its_shapes_say() -> None:
    with jax.numpy_rank_promotion("allow"):
        needed = needed_bytes(run_of("apollo_mini", "70b", batch=1))
    assert needed.weights / 2**30 == pytest.approx(257, rel=0.02)
    assert needed.gradients == needed.weights


def test_what_is_needed_is_said_in_gib() -> None:
    said = str(Needed(3 * 2**30, 2**29, 2**30, 0))
    assert said.startswith("at least 4.5 GiB (weights 3 GiB, optimizer state 0.5 GiB, gradients")


def test_advice_names_no_flag_that_is_taken_already() -> None:
    settings = run_of("apollo_mini", weights="bf16", update="layerwise").settings
    assert "--update" not in advice(settings)
    assert "--weights int8" in advice(settings)
    smaller = dataclasses.replace(settings, weights="int8", batch=1)
    assert advice(smaller).startswith("to need less: a smaller --sequence")
