"""Says what a training step of a LLaMA needs on chips that you do not have."""

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from jax.sharding import Mesh

from apollo_optax import planning
from examples.llama.command_line import MODEL_NAME, check_ranges, default, parse
from examples.llama.config import MODELS, LlamaConfig, parameter_count
from examples.llama.huggingface import StoredModel, describe_shape
from examples.llama.memory import bytes_on_a_device
from examples.llama.mesh import (
    devices_dividing_batch,
    parse_mesh,
)
from examples.llama.optimizers import (
    FLOAT32_MOMENTS,
    LEFT_OPEN,
    OptimizerName,
    VocabularyName,
)
from examples.llama.options import (
    ModelName,
    ModelOptions,
    PretrainConfig,
    RunSettings,
    TrainingOptions,
    Weights,
    check_step_options,
    resolve,
)
from examples.llama.run import Run, abstract_state, abstract_tokens, placed_step

__all__ = [
    "PlanConfig",
    "argument_bytes",
    "asked",
    "main",
    "plan_report",
    "plan_step",
    "weight_bytes",
]

_PROGRAM = "python -m examples.llama.plan"
_EXAMPLES = (
    "--model 7b --device a100-80gb --weights int8 --update layerwise --sequence 2048",
    "--model 13b --device tpu-v5e:4x4 --optimizer apollo --mesh fsdp=16 --remat --largest-batch",
)
_BYTES_A_WEIGHT = {"f32": 4.0, "bf16": 2.0, "int8": 1 + 4 / 128}


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """Compiles a training step for a chip that you do not have, and says what the step needs.

    Attributes:
      model: The size of the LLaMA.
      device: The chips, such as a100-80gb:8, rtx-4060-8gb, tpu-v5e:1x1, tpu-v5e:16x16 or local.
      optimizer: The optimizer, one of this package or of Optax. sgd has no momentum.
      weights: The dtype of the weights. int8 needs --update layerwise.
      moments: f32 as pretrain has them, or bf16 as Optax makes them for bf16 weights. The moments
        of apollo, apollo_mini and swan are always f32.
      update: layerwise computes and uses the gradient of one layer at a time.
      mesh: The axes of the device mesh and their sizes. data and fsdp divide the batch. fsdp also
        divides the weights, which are gathered one layer at a time. tensor divides heads,
        feed-forward and vocabulary. Without this flag, all devices are on the axis data.
      batch: The number of sequences per device, or per group of devices with tensor.
      sequence: The number of tokens in a sequence.
      remat: Recompute activations in the backward pass. layerwise always does.
      rank: The number of rows of the projection, for apollo and galore.
      vocabulary: The update rule of the embedding and the head, for apollo, apollo_mini and swan.
      project_embeddings: Project the embedding and the head like the other matrices. The paper
        trains both with Adam.
      lora: The rank of LoRA, for adamw. 0 means no LoRA.
      largest_batch: Also find the largest batch per device that fits. Of the batches that are
        tried, name the one with the highest bound on tokens per second, too.
      json: Print one JSON object.
      load: A model of LLaMA's blocks instead of --model: a config.json, a folder that has one, a
        .gguf file, or hf:NAME. The weights are not read.
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
    rank: Annotated[int | None, default("INT", "as pretrain")] = None
    vocabulary: Annotated[
        VocabularyName | None, default("{adam,factored,factored_momentum}", "as pretrain")
    ] = None
    project_embeddings: bool = False
    lora: int = 0
    largest_batch: bool = False
    json: bool = False
    load: Annotated[Path | None, tyro.conf.arg(metavar="CHECKPOINT")] = None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      argv: Its arguments; those of the process if None.

    Returns:
      The exit code: 0 whether or not the step fits, 2 for wrong input.
    """
    config = parse(PlanConfig, _PROGRAM, argv, _EXAMPLES)
    try:
        pretraining = _pretraining(config, config.batch)
        check_step_options(pretraining, default_model=PlanConfig.model)
        if config.moments != "f32" and config.optimizer in FLOAT32_MOMENTS:
            raise ValueError(
                f"--moments {config.moments} does nothing for {config.optimizer}, whose moments "
                "are always f32; leave --moments out"
            )
        report = plan_report(config)
    except (ValueError, ImportError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(json.dumps(report) if config.json else _readable(config, report))
    return 0


def plan_report(config: PlanConfig) -> dict[str, Any]:
    """Returns what `--json` prints: what was asked, the plan, its bounds, the bytes of the weights.

    Raises as `plan_step` does.
    """
    plan = plan_step(config)
    report = asked(config) | plan.as_dict()
    report["weight_bytes"] = weight_bytes(config)
    report["collective_bytes"] = plan.collective_bytes
    report["step_seconds_at_least"] = plan.step_seconds_at_least
    report["step_seconds_without_overlap"] = plan.step_seconds_without_overlap
    report["limited_by"] = plan.limited_by
    report["tokens_per_second_at_most"] = _tokens_per_second(config, config.batch, plan)
    if config.largest_batch:
        found = _largest_batch(config)
        report["largest_batch"] = found.batch
        bounds = {
            batch: bound
            for batch, tried in found.plans.items()
            if tried.fits and (bound := _tokens_per_second(config, batch, tried))
        }
        report["best_bound_batch"] = max(bounds, key=bounds.__getitem__, default=None)
        report["best_bound_tokens_per_second"] = max(bounds.values(), default=None)
    return report


def asked(config: PlanConfig) -> dict[str, Any]:
    """Returns the question of a plan, as JSON can hold it."""
    question = dataclasses.asdict(config)
    del question["json"], question["largest_batch"]
    question["vocabulary"] = _settings(config, batch=1).optimizer.vocabulary
    if config.load is not None:
        question |= {"model": None, "load": str(config.load)}
    return question


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
    return round(parameter_count(_shape(config)) * _BYTES_A_WEIGHT[config.weights])


def _shape(config: PlanConfig) -> LlamaConfig:
    return MODELS[config.model] if config.load is None else describe_shape(config.load)[0]


def argument_bytes(config: PlanConfig) -> int:
    """Returns the bytes of a device's weights, optimizer state and batch; nothing is compiled."""
    run = _run(config, _mesh(config), config.batch)
    return bytes_on_a_device((abstract_state(run), abstract_tokens(run)))


def _tokens_per_second(config: PlanConfig, batch: int, plan: planning.Plan) -> float | None:
    """The bound for all devices, with `batch` sequences a device."""
    sequences = batch * devices_dividing_batch(_mesh(config).shape)
    return plan.tokens_per_second_at_most(sequences * config.sequence)


def _largest_batch(config: PlanConfig) -> planning.LargestBatch:
    mesh = _mesh(config)

    def build(batch: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _step(config, mesh, batch)

    return planning.largest_batch(config.device, build, mesh=mesh)


def _mesh(config: PlanConfig) -> Mesh:
    """The mesh of `--mesh`; all devices divide the batch if it is left out."""
    target = planning.parse_target(config.device)
    if config.lora and target.device_count > 1:
        raise ValueError(
            f"--lora {config.lora} trains on one device; {config.device} has {target.device_count}"
        )
    sizes = parse_mesh(config.mesh or f"data={target.device_count}")
    if target.slices > 1 and sizes["data"] == 1:
        # The first axis crosses between slices.
        sizes = {name: sizes[name] for name in ("fsdp", "data", "tensor")}
    return planning.mesh_for(target, sizes)


def _step(config: PlanConfig, mesh: Mesh, batch: int) -> tuple[Callable[..., Any], tuple[Any, Any]]:
    """The step and its arguments' shapes, for `batch` sequences a device."""
    run = _run(config, mesh, batch)
    return placed_step(run), (abstract_state(run), abstract_tokens(run))


def _run(config: PlanConfig, mesh: Mesh, batch: int) -> Run:
    """What `pretrain` would train, but for the guard of its steps."""
    settings = _settings(config, batch * devices_dividing_batch(mesh.shape))
    return Run(settings, Path(), False, mesh, float32_moments=config.moments == "f32")


def _settings(config: PlanConfig, batch: int) -> RunSettings:
    """The settings of `pretrain`, its defaults included."""
    stored = StoredModel(_shape(config), "bfloat16")
    pretraining = _pretraining(config, batch)
    settings = resolve(pretraining, config.optimizer, stored, data="", text_digest="")
    return dataclasses.replace(settings, load=None, spike_limit=None)


def _pretraining(config: PlanConfig, batch: int) -> PretrainConfig:
    """The command line of `pretrain`."""
    optimizer: dict[str, Any] = {"name": config.optimizer, "rank": config.rank}
    optimizer |= {"vocabulary": config.vocabulary, "project_embeddings": config.project_embeddings}
    if config.optimizer == "sgd":
        optimizer["momentum"] = 0.0
    return PretrainConfig(
        model=ModelOptions(config.model, load=config.load),
        optimizer=dataclasses.replace(LEFT_OPEN, **optimizer),
        training=TrainingOptions(
            weights=config.weights,
            compute="f32" if config.weights == "f32" else "bf16",
            remat=config.remat,
            batch=batch,
            sequence=config.sequence,
            micro_batches=1,
            update=config.update,
            lora=config.lora,
        ),
    )


def _name(config: PlanConfig) -> str:
    if config.load is None:
        return f"LLaMA-{config.model}"
    _, others = describe_shape(config.load)
    count = f"{config.load}, {parameter_count(_shape(config)):,} parameters"
    return count if others is None else f"{count}, planned as a LLaMA although it has {others}"


def _readable(config: PlanConfig, report: dict[str, Any]) -> str:
    def gib(name: str) -> str:
        value = report[name]
        return "unknown" if value is None else f"{value / 2**30:8.2f} GiB"

    lines = [
        f"{_name(config)}, {config.optimizer}, {config.weights} weights, {config.update} "
        f"update, {config.batch} x {config.sequence} tokens per device on {config.device}",
        "",
        f"weights      {gib('weight_bytes')}",
        f"arguments    {gib('argument_bytes')}   weights, optimizer state, batch",
        f"temporaries  {gib('temporary_bytes')}   gradients, activations",
        f"peak         {gib('peak_bytes')}",
        f"capacity     {gib('capacity_bytes')}   {'fits' if report['fits'] else 'DOES NOT FIT'}",
    ]
    if report["collective_bytes"]:
        lines.append(f"collectives  {gib('collective_bytes')}   per step")
    if report["limited_by"]:
        lines.append(
            f"bound        {report['tokens_per_second_at_most']:,.0f} tokens/s at most, limited by "
            f"{report['limited_by']}; a step takes {report['step_seconds_at_least']:.3g} s or more"
        )
    if "largest_batch" in report:
        lines.append(f"largest batch that fits: {report['largest_batch']} sequences per device")
        if batch := report["best_bound_batch"]:
            best = f"{report['best_bound_tokens_per_second']:,.0f} tokens/s at most"
            lines.append(f"best bound of the batches tried: {best}, with {batch} sequences")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
