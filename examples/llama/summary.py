"""What a run is about to do, in a few lines: device, model, batch, optimizer and its state."""

import functools

import jax
from jax.sharding import Mesh

from apollo_optax import Description, describe
from examples.llama import model
from examples.llama.config import parameter_count
from examples.llama.lora import init_lora
from examples.llama.optimizers import OPTIONS_OF, make_optimizer
from examples.llama.options import RunSettings

__all__ = ["optimizer_line", "settings_lines", "state_line", "state_table"]

_NO_ACCELERATOR = (
    "no accelerator found; to install JAX for one, pip install -U 'jax[cuda13]' (NVIDIA) or "
    "'jax[tpu]'"
)


def settings_lines(settings: RunSettings, mesh: Mesh | None) -> list[str]:
    """Returns a line each for what compared runs share: device, weights, batch and steps."""
    source = "new" if settings.load is None else f"from {settings.load}"
    parts = f" in {settings.micro_batches} micro-batches" if settings.micro_batches > 1 else ""
    tokens = settings.steps * settings.tokens_per_step
    return [
        f"device   {_devices(mesh)}",
        f"model    {parameter_count(settings.model):,} parameters, {source}; {settings.weights} "
        f"weights, products in {settings.compute}",
        f"text     {settings.data}",
        f"batch    {settings.batch} sequences of {settings.sequence} tokens{parts}, "
        f"{settings.update} update{', remat' if settings.remat else ''}",
        f"steps    {settings.steps:,}, {tokens:,} tokens",
    ]


def optimizer_line(settings: RunSettings) -> str:
    """Returns the optimizer and the settings that it uses.

    >>> from examples.llama.config import MODELS
    >>> from examples.llama.optimizers import OptimizerSettings
    >>> settings = RunSettings(
    ...     model=MODELS["nano"], load=None, weights="f32", compute="f32", remat=False,
    ...     optimizer=OptimizerSettings("galore", learning_rate=0.04, total_steps=400, rank=32),
    ...     batch=32, sequence=128, micro_batches=1, update="standard", spike_limit=3.0, seed=0,
    ...     data="stdlib",
    ... )
    >>> print(optimizer_line(settings))
    galore: learning rate 0.04, warm-up 10%, rank 32, alpha 1, update_proj_gap 200
    """
    optimizer = settings.optimizer
    parts = [
        f"learning rate {optimizer.learning_rate:g}",
        f"warm-up {optimizer.warmup_fraction:.0%}",
    ]
    if optimizer.weight_decay:
        parts.append(f"weight decay {optimizer.weight_decay:g}")
    if optimizer.clip:
        parts.append(f"clip {optimizer.clip:g}")
    for name, users in OPTIONS_OF.items():
        value = getattr(optimizer, name)
        if optimizer.name in users and value is not False and value is not None:
            shown = f"{value:.4g}" if isinstance(value, float) else value
            parts.append(name if value is True else f"{name} {shown}")
    if settings.lora:
        parts.append(f"LoRA of rank {settings.lora}")
    return f"{optimizer.name}: {', '.join(parts)}"


def state_table(settings: RunSettings) -> Description:
    """Returns what the optimizer keeps for each parameter; nothing is allocated."""
    if settings.lora:
        lora = jax.eval_shape(lambda: init_lora(settings.model, settings.lora, 0))
        return describe(lora, make_optimizer(settings.optimizer))
    params = jax.eval_shape(lambda: model.init_params(settings.model, 0))
    forward = functools.partial(model.forward, settings.model)
    tokens = jax.ShapeDtypeStruct((1, settings.sequence), "int32")
    return describe(params, make_optimizer(settings.optimizer), forward, tokens)


def state_line(settings: RunSettings) -> str:
    """Returns the sum of the table."""
    state_bytes = state_table(settings).state_bytes
    over_adamw = state_bytes / (8 * parameter_count(settings.model))
    return f"state    {state_bytes:,} bytes, {over_adamw:.4f} of AdamW's for all parameters"


def _devices(mesh: Mesh | None) -> str:
    devices = jax.devices()
    if mesh is None:
        named = f"{devices[0].device_kind}, 1 of {len(devices)}"
    else:
        axes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items() if size > 1)
        named = f"{len(devices)} x {devices[0].device_kind}" + (f", {axes}" if axes else "")
    return f"{named}; {_NO_ACCELERATOR}" if devices[0].platform == "cpu" else named
