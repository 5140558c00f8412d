"""How much memory of a device a run needs at least, by its shapes, and how to need less."""

import math
from typing import NamedTuple

import jax
from jaxtyping import PyTree

from apollo_optax import planning
from examples.llama.config import parameter_count
from examples.llama.mesh import devices_dividing_batch
from examples.llama.options import RunSettings
from examples.llama.run import Run, abstract_state

__all__ = [
    "Needed",
    "advice",
    "bytes_on_a_device",
    "device_bytes",
    "needed_bytes",
    "require_memory",
]

_GIB = 2**30
_BYTES = {"f32": 4, "bf16": 2}


class Needed(NamedTuple):
    """Bytes on each device that a step cannot do without.

    Attributes:
      weights: As they are trained.
      optimizer_state: What the optimizer keeps of a step for the next.
      gradients: Of all weights that are trained, or of one layer with `--update layerwise`.
      activations: The inputs of all layers and, unless layer by layer, the logits.
    """

    weights: int
    optimizer_state: int
    gradients: int
    activations: int

    def __str__(self) -> str:
        """Says the sum and its parts."""
        parts = (f"{name.replace('_', ' ')} {_gib(size)}" for name, size in self._asdict().items())
        return f"at least {_gib(sum(self))} ({', '.join(parts)})"


def _gib(size: float) -> str:
    return f"{size / _GIB:.3g} GiB"


def needed_bytes(run: Run) -> Needed:
    """Returns the least that a run needs on a device; nothing is allocated or compiled."""
    settings, shape = run.settings, run.settings.model
    state = abstract_state(run)
    sizes = run.mesh.shape if run.mesh is not None else {}
    weights = bytes_on_a_device(state.params)
    layerwise = settings.update == "layerwise"
    tokens = settings.tokens_per_step // settings.micro_batches / devices_dividing_batch(sizes)
    activations = shape.num_layers * tokens * shape.hidden_size * _BYTES[settings.compute]
    if layerwise:
        block = (parameter_count(shape) / shape.num_layers) * _BYTES[settings.compute]
        gradients = block / math.prod(sizes.values())
    else:
        # Those of several micro-batches are summed in float32.
        wide = 4 / _BYTES[settings.weights] if settings.micro_batches > 1 else 1
        gradients = weights * wide
        if settings.lora:
            gradients = bytes_on_a_device(state.params["lora"])
        activations += tokens * shape.vocab_size / sizes.get("tensor", 1) * 4
    return Needed(weights, bytes_on_a_device(state.opt_state), int(gradients), int(activations))


def bytes_on_a_device(tree: PyTree) -> int:
    """Returns the bytes of arrays, or of ShapeDtypeStructs, on each of the devices they lie on."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def device_bytes(run: Run) -> int:
    """Returns the memory that a device of the run may use; those of a CPU share the machine's."""
    capacity_bytes = planning.parse_target("local").capacity_bytes
    if run.mesh is None and jax.default_backend() == "cpu":
        return capacity_bytes * jax.local_device_count()
    return capacity_bytes


def require_memory(run: Run) -> None:
    """Raises ValueError if the least that a run needs is more than there is."""
    needed, there = needed_bytes(run), device_bytes(run)
    if sum(needed) > there:
        raise ValueError(
            f"a device needs {needed} to train this and has {_gib(there)}; {advice(run.settings)}"
        )


def advice(settings: RunSettings) -> str:
    """Returns the flags that make a run need less memory and that it does not have yet.

    >>> from examples.llama.config import MODELS
    >>> from examples.llama.optimizers import OptimizerSettings
    >>> settings = RunSettings(
    ...     model=MODELS["nano"], load=None, weights="bf16", compute="bf16", remat=True,
    ...     optimizer=OptimizerSettings("apollo_mini", learning_rate=0.04, total_steps=400),
    ...     batch=32, sequence=128, micro_batches=32, update="standard", spike_limit=3.0, seed=0,
    ...     data="stdlib",
    ... )
    >>> advice(settings)
    'to need less: --update layerwise, a smaller --sequence or a smaller --model, more devices by
    --mesh'
    """
    standard = settings.update == "standard"
    all_trained = not settings.lora
    flags = {
        f"--micro-batches {settings.batch}": standard and settings.micro_batches < settings.batch,
        "a smaller --batch": not standard and settings.batch > 1,
        "--remat": standard and not settings.remat,
        "--update layerwise": standard
        and all_trained
        and settings.optimizer.name not in ("galore", "adafactor"),
        "--weights bf16": settings.weights == "f32",
        "--weights int8": not standard and settings.weights == "bf16",
        "--optimizer apollo_mini": all_trained
        and settings.optimizer.name not in ("apollo_mini", "sgd"),
    }
    useful = [flag for flag, is_useful in flags.items() if is_useful]
    smaller = "a smaller --sequence or a smaller --model, more devices by --mesh"
    return f"to need less: {', '.join([*useful, smaller])}"
