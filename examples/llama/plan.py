"""Says what a training step of a LLaMA needs on chips that are not here: `--help` lists them."""

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from apollo_optax import planning
from apollo_optax.sharding import shardings_of
from examples.llama import model
from examples.llama.command_line import MODEL_NAME, check_ranges, parse
from examples.llama.config import MODELS, PRESETS, parameter_count
from examples.llama.layered import layered_training
from examples.llama.mesh import (
    batch_sharding,
    devices_dividing_batch,
    param_shardings,
    parse_mesh,
)
from examples.llama.optimizers import (
    DEFAULT_LEARNING_RATES,
    FLOAT32_MOMENTS,
    OptimizerName,
    OptimizerSettings,
    make_optimizer,
)
from examples.llama.options import ModelName, Weights
from examples.llama.train import Training, standard_training

__all__ = ["PlanConfig", "argument_bytes", "main", "plan_report", "plan_step", "weight_bytes"]

_PROGRAM = "python -m examples.llama.plan"
_EXAMPLES = (
    "--model 7b --device a100-80gb --weights int8 --update layerwise --sequence 2048",
    "--model 13b --device tpu-v5e:4x4 --optimizer apollo --mesh fsdp=16 --remat --largest-batch",
)
_WEIGHTS: dict[str, DTypeLike] = {"f32": jnp.float32, "bf16": jnp.bfloat16, "int8": jnp.float32}
_BYTES_A_WEIGHT = {"f32": 4.0, "bf16": 2.0, "int8": 1 + 4 / 128}
_STEPS = 1000


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """Compiles a training step for a chip, without the chip, and says what it needs of it.

    Attributes:
      model: Size of the LLaMA.
      device: The chips, such as a100-80gb:8, rtx-4060-8gb, tpu-v5e:1x1, tpu-v5e:16x16 or local.
      optimizer: APOLLO's, or one of Optax's; sgd without momentum.
      weights: Dtype of the weights; int8 goes with --update layerwise.
      moments: f32 as pretrain has them, or bf16 as Optax makes them of bf16 weights. Those of
        apollo and apollo_mini are f32 in any case.
      update: layerwise makes and uses up the gradient of one layer at a time.
      mesh: Axes of the device mesh and their sizes. data and fsdp divide the batch, fsdp the
        weights too, gathered a layer at a time; tensor divides heads, feed-forward and vocabulary.
        All devices are data if left out.
      batch: Sequences a device; with tensor, a group of devices.
      sequence: Tokens a sequence.
      remat: Recompute activations in the backward pass; layerwise always does.
      rank: Rows of the projection; for apollo and galore.
      project_embeddings: Treat embedding and head as the other matrices, instead of training them
        with Adam.
      largest_batch: Find the largest batch a device that fits, too.
      json: Print one JSON object.
    """

    model: Annotated[ModelName, MODEL_NAME] = "7b"
    device: str = "a100-80gb"
    optimizer: OptimizerName = "apollo_mini"
    weights: Weights = "bf16"
    moments: Literal["f32", "bf16"] = "f32"
    update: Literal["standard", "layerwise"] = "standard"
    mesh: Annotated[str | None, tyro.conf.arg(metavar="data=N,fsdp=N,tensor=N")] = None
    batch: int = 1
    sequence: int = 256
    remat: bool = False
    rank: int | None = None
    project_embeddings: bool = False
    largest_batch: bool = False
    json: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      argv: Its arguments; those of the process if None.

    Returns:
      The exit code: 0 whether or not the step fits, 2 for wrong input.
    """
    config = parse(PlanConfig, _PROGRAM, argv, _EXAMPLES)
    try:
        report = plan_report(config)
    except (ValueError, ImportError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(json.dumps(report) if config.json else _readable(config, report))
    return 0


def plan_report(config: PlanConfig) -> dict[str, Any]:
    """Returns what `--json` prints: what was asked, the plan, and the bytes of the weights alone.

    Raises as `plan_step` does.
    """
    plan = plan_step(config)
    asked = dataclasses.asdict(config)
    del asked["json"], asked["largest_batch"]
    report = asked | plan.as_dict()
    report["weight_bytes"] = weight_bytes(config)
    report["collective_bytes"] = plan.collective_bytes
    if config.largest_batch:
        report["largest_batch"] = _largest_batch(config)
    return report


def plan_step(config: PlanConfig) -> planning.Plan:
    """Compiles the step.

    Args:
      config: What to plan.

    Returns:
      What it needs on a device.

    Raises:
      ValueError: If the device is unknown, the mesh does not match it, or the settings do not go
        together.
      ImportError: If the compiler of the device is not installed.
    """
    check_ranges(config)
    mesh = _mesh(config)
    step, args = _step(config, mesh, config.batch)
    return planning.compile_for(config.device, step, *args, mesh=mesh)


def weight_bytes(config: PlanConfig) -> int:
    """Returns the bytes of the whole model's weights."""
    return round(parameter_count(MODELS[config.model]) * _BYTES_A_WEIGHT[config.weights])


def argument_bytes(config: PlanConfig) -> int:
    """Returns the bytes of a device's weights, optimizer state and batch; nothing is compiled."""
    _, args = _step(config, _mesh(config), config.batch)
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(args)
    )


def _largest_batch(config: PlanConfig) -> int:
    mesh = _mesh(config)

    def build(batch: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _step(config, mesh, batch)

    return planning.largest_batch(config.device, build, mesh=mesh).batch


def _mesh(config: PlanConfig) -> Mesh:
    """The mesh of `--mesh`; all devices divide the batch if it is left out."""
    target = planning.parse_target(config.device)
    sizes = parse_mesh(config.mesh or f"data={target.device_count}")
    if target.slices > 1 and sizes["data"] == 1:
        # The first axis crosses between slices.
        sizes = {name: sizes[name] for name in ("fsdp", "data", "tensor")}
    return planning.mesh_for(target, sizes)


def _step(config: PlanConfig, mesh: Mesh, batch: int) -> tuple[Callable[..., Any], tuple[Any, Any]]:
    """The step and its arguments' shapes, for `batch` sequences a device."""
    shape = MODELS[config.model]
    training = _training(config)
    params = jax.eval_shape(
        lambda: model.init_params(
            shape, 0, param_dtype=_WEIGHTS[config.weights], convert=training.keep
        )
    )
    shardings = shardings_of(training.init_state, params, param_shardings(mesh, params))
    state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(training.init_state, params),
        shardings,
    )
    tokens = jax.ShapeDtypeStruct(
        (batch * devices_dividing_batch(mesh.shape), config.sequence + 1),
        jnp.int32,
        sharding=batch_sharding(mesh),
    )
    step = jax.jit(
        training.step,
        donate_argnums=0,
        out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
    )
    return step, (state, tokens)


def _training(config: PlanConfig) -> Training:
    shape = MODELS[config.model]
    preset = PRESETS.get(config.model)
    tx = make_optimizer(
        OptimizerSettings(
            config.optimizer,
            DEFAULT_LEARNING_RATES[config.optimizer],
            _STEPS,
            rank=config.rank or (preset.rank if preset else max(1, shape.hidden_size // 4)),
            project_embeddings=config.project_embeddings,
        )
    )
    dtype = jnp.float32 if config.weights == "f32" else jnp.bfloat16
    if config.update == "layerwise":
        return layered_training(
            shape,
            tx,
            weights=config.weights,
            dtype=dtype,
            float32_moments=config.moments == "f32" and config.optimizer not in FLOAT32_MOMENTS,
        )
    if config.weights == "int8":
        raise ValueError("int8 weights are trained layer by layer; add --update layerwise")
    return standard_training(
        shape, tx, dtype=dtype, remat=config.remat, float32_moments=config.moments == "f32"
    )


def _readable(config: PlanConfig, report: dict[str, Any]) -> str:
    def gib(name: str) -> str:
        value = report[name]
        return "not told" if value is None else f"{value / 2**30:8.2f} GiB"

    lines = [
        f"LLaMA-{config.model}, {config.optimizer}, {config.weights} weights, {config.update} "
        f"update, {config.batch} x {config.sequence} tokens a device on {config.device}",
        "",
        f"weights      {gib('weight_bytes')}",
        f"arguments    {gib('argument_bytes')}   weights, optimizer state, batch",
        f"temporaries  {gib('temporary_bytes')}   gradients, activations",
        f"peak         {gib('peak_bytes')}",
        f"capacity     {gib('capacity_bytes')}   {'fits' if report['fits'] else 'DOES NOT FIT'}",
    ]
    if report["collective_bytes"]:
        lines.append(f"collectives  {gib('collective_bytes')}   a step")
    if "largest_batch" in report:
        lines.append(f"largest batch that fits: {report['largest_batch']} sequences a device")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
