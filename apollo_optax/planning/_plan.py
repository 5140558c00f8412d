"""The needs of a step on a target, as the target's compiler states them."""

import contextlib
import dataclasses
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from apollo_optax.planning._collectives import Collective, read_traffic
from apollo_optax.planning._hbm import hbm_bytes
from apollo_optax.planning._hlo import Program, parse_program
from apollo_optax.planning._roofline import Bounds, bounds, operations
from apollo_optax.planning._targets import (
    GPUS,
    Target,
    devices_of,
    missing_compiler,
    parse_target,
    rates_of,
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The needs of a step on one device of a target. All bytes are those of one device.

    Attributes:
      target: The name of the target.
      device_count: The number of devices that the step was compiled for.
      fits: Whether the compiler took the program and `peak_bytes` is within `capacity_bytes`.
      peak_bytes: Arguments + outputs - aliases + temporaries. If a TPU's compiler refuses the
        program, this is the need in the compiler's message, which has two decimals, such
        as 20.50G, and leaves out arguments that are needed only at the beginning.
      capacity_bytes: The bytes that a program may use, as in `Target.capacity_bytes`.
      argument_bytes: The arguments: parameters, optimizer state and batch.
      output_bytes: The outputs, with those that take the place of a donated argument.
      alias_bytes: The outputs that take the place of a donated argument.
      temporary_bytes: The buffers that live within the step only: gradients and activations.
      collectives: The collectives, by kind.
      flops: The operations of matrix products and convolutions. Those in a loop count once per
        trip. The operations of a kernel are not known.
      hbm_bytes: The bytes that the program's instructions read from memory and write to it. Those
        in a loop count once per trip. On a GPU this is an estimate, since the savings of the cache
        are not known.
      compute_seconds: `flops` at the chip's peak for the dtype of each product.
      memory_seconds: The arguments that the step reads and the results that it writes, at the peak
        of the chip's memory. The bytes that a cache may hold are taken off. These bytes cross
        however well the rest is fused; `hbm_bytes` over that peak is an estimate, and no bound.
      collective_seconds: The bytes that the collectives send or receive, at the peak of a device's
        links, for the slowest kind of link.
      loops: The trips of each loop. None stands for a loop whose trips the program does not state.
      refusal: The compiler's message if it refused the program.

    The seconds are lower bounds for this program, at peaks that no program reaches. They say how
    fast a step cannot be, never how fast it is. The page Planning says what the bounds leave out.

    A field is None where its value is not known: `flops` and `hbm_bytes` if the program does not
    state the trips of a loop, the seconds on local devices, all that is read from the text of the
    program if the compiler gives none, and all but `argument_bytes` if the compiler refuses the
    program.
    """

    target: str
    device_count: int
    fits: bool
    peak_bytes: int
    capacity_bytes: int
    argument_bytes: int | None
    output_bytes: int | None
    alias_bytes: int | None
    temporary_bytes: int | None
    collectives: dict[str, Collective] | None
    flops: float | None
    hbm_bytes: float | None
    loops: tuple[int | None, ...] | None
    compute_seconds: float | None = None
    memory_seconds: float | None = None
    collective_seconds: float | None = None
    refusal: str | None = None

    @property
    def collective_bytes(self) -> int | None:
        """The bytes of all collectives."""
        if self.collectives is None:
            return None
        return sum(collective.bytes for collective in self.collectives.values())

    @property
    def step_seconds_at_least(self) -> float | None:
        """The largest of the three bounds. The other two may overlap with it. None if unknown."""
        seconds = self._seconds()
        return max(seconds.values()) if seconds else None

    @property
    def step_seconds_without_overlap(self) -> float | None:
        """The sum of the three bounds, for a step that overlaps nothing."""
        seconds = self._seconds()
        return sum(seconds.values()) if seconds else None

    @property
    def limited_by(self) -> str | None:
        """The name of the largest bound: `"compute"`, `"memory"` or `"links"`."""
        seconds = self._seconds()
        return max(seconds, key=seconds.__getitem__) if seconds else None

    def tokens_per_second_at_most(self, tokens: int) -> float | None:
        """The bound on throughput of all devices together, for a step of `tokens` tokens."""
        seconds = self.step_seconds_at_least
        return tokens / seconds if seconds else None

    def _seconds(self) -> dict[str, float]:
        seconds = {
            "compute": self.compute_seconds,
            "memory": self.memory_seconds,
            "links": self.collective_seconds,
        }
        return {name: value for name, value in seconds.items() if value is not None}

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON's types."""
        return dataclasses.asdict(self)

    def to_json(self, indent: int | None = None) -> str:
        """The fields as one JSON object."""
        return json.dumps(self.as_dict(), indent=indent)


def compile_for(
    target: str | Target,
    step: Callable[..., Any],
    *args: Any,
    donate_argnums: int | Sequence[int] | None = None,
    static_argnums: int | Sequence[int] | None = None,
    in_shardings: Any = None,
    out_shardings: Any = None,
    mesh: Mesh | None = None,
    compiler_options: Mapping[str, Any] | None = None,
) -> Plan:
    """Compiles a step for a target and returns what the step needs there.

    >>> step = lambda weights, gradient: weights - 0.1 * gradient
    >>> weights = jax.ShapeDtypeStruct((1024, 256), "float32")
    >>> plan = compile_for("cpu", step, weights, weights, donate_argnums=0)
    >>> plan.argument_bytes, plan.alias_bytes, plan.fits
    (2097152, 1048576, True)

    Args:
      target: The chips to compile for, such as `"tpu-v5e:16x16"`, as in `parse_target`.
      step: A function, jitted or not. A jitted function keeps its own options if none is given
        here.
      *args: The arguments of the step, `jax.ShapeDtypeStruct`s or arrays. Only the shapes of arrays
        are used. Shardings are over the mesh of `mesh_for(target, ...)`. An argument without a
        sharding is replicated.
      donate_argnums: As for `jax.jit`. Donate the arguments that the step replaces; otherwise they
        count twice.
      static_argnums: As for `jax.jit`.
      in_shardings: As for `jax.jit`, instead of shardings on the arguments.
      out_shardings: As for `jax.jit`.
      mesh: The mesh that is set while the step is traced, for steps that name axes only:
        `PartitionSpec`s, `AxisType.Explicit`.
      compiler_options: Options of XLA. They take precedence over those of the planner.

    Returns:
      The plan, also if the step does not fit.

    Raises:
      ImportError: If the target's compiler is not installed.
      ValueError: If the target is unknown, or shardings are over devices of another target.

    Warns:
      UserWarning: If no argument is donated although half of their bytes or more could be.
    """
    target = parse_target(target)
    options = {
        "donate_argnums": donate_argnums,
        "static_argnums": static_argnums,
        "in_shardings": in_shardings,
        "out_shardings": out_shardings,
    }
    given = {name: option for name, option in options.items() if option is not None}
    jitted = step if not given and hasattr(step, "trace") else jax.jit(step, **given)
    for sharding in jax.tree.leaves(in_shardings):
        if isinstance(sharding, jax.sharding.Sharding):
            _check_devices(sharding, target)
    args = _place(args, target, mesh, static_argnums, replicate=in_shardings is None)
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        lowered = _lower(target, jitted, args)
        _warn_if_nothing_is_donated(lowered)
        try:
            compiled = lowered.compile(_compiler_options(target, compiler_options))
        except jax.errors.JaxRuntimeError as error:
            return _refused(target, args, error)
    return _plan(target, compiled)


def compile_update(
    optimizer: optax.GradientTransformation, params: Any, target: str
) -> jax.stages.Compiled:
    """The update and its addition to the weights, in place, compiled for one device.

    Args:
      optimizer: Its gradients are like the parameters.
      params: Their shapes.
      target: As for `compile_for`, of one device.
    """

    def update(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    device = parse_target(target)
    state = jax.eval_shape(optimizer.init, params)
    args = _place((params, state, params), device, None, None, replicate=True)
    lowered = _lower(device, jax.jit(update, donate_argnums=(0, 1)), args)
    return lowered.compile(_compiler_options(device))


def _lower(target: Target, jitted: Any, args: tuple[Any, ...]) -> jax.stages.Lowered:
    platforms = target.platform and (target.platform,)
    return jitted.trace(*args).lower(lowering_platforms=platforms)


def _compiler_options(
    target: Target, compiler_options: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    # Nothing can be timed on a chip that is not there.
    absent = {"xla_gpu_autotune_level": 0} if target.chip in GPUS else {}
    return {**absent, **(compiler_options or {})} or None


def _plan(target: Target, compiled: jax.stages.Compiled) -> Plan:
    memory: Any = compiled.memory_analysis()
    text = compiled.as_text()
    program = parse_program(text) if text else None
    traffic = program and read_traffic(program)
    rates = rates_of(target)
    least: Bounds | None = None
    if program and rates:
        least = bounds(program, rates, target.device_count, target.slices)
    peak_bytes = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    return Plan(
        target=target.name,
        device_count=target.device_count,
        fits=peak_bytes <= target.capacity_bytes,
        peak_bytes=peak_bytes,
        capacity_bytes=target.capacity_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        collectives=traffic and traffic.collectives,
        flops=_if_told(operations, program),
        hbm_bytes=_if_told(hbm_bytes, program),
        loops=traffic and traffic.loops,
        **(least._asdict() if least else {}),
    )


def _if_told(count: Callable[[Program], float], program: Program | None) -> float | None:
    """A count over a program; None if a loop does not tell its trips."""
    try:
        return count(program) if program else None
    except ValueError:
        return None


def _refused(target: Target, args: tuple[Any, ...], error: jax.errors.JaxRuntimeError) -> Plan:
    """The plan of a program that the compiler refused for its size; raises what else it refused."""
    refusal = str(error)
    if "PTX compilation provider" in refusal:
        raise missing_compiler("GPUs", "nvidia-cuda-nvcc (for ptxas)") from error
    needed = needed_bytes(refusal)
    if needed is None:
        raise error
    argument_bytes = _argument_bytes(args)
    return Plan(
        target=target.name,
        device_count=target.device_count,
        fits=False,
        peak_bytes=max(needed, argument_bytes or 0),
        capacity_bytes=target.capacity_bytes,
        argument_bytes=argument_bytes,
        output_bytes=None,
        alias_bytes=None,
        temporary_bytes=None,
        collectives=None,
        flops=None,
        hbm_bytes=None,
        loops=None,
        refusal=refusal,
    )


def needed_bytes(refusal: str) -> int | None:
    """Reads what a program needs off a TPU compiler's refusal; None if it was not for its size.

    >>> needed_bytes("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for "
    ...              "HLO temporaries (20.50G) exceeds available HBM (15.75G).") / 2**30
    20.5
    """
    match = re.search(
        r"RESOURCE_EXHAUSTED.*(?:memory required for [\w ]+ \(|memory space hbm\. Used )"
        r"([\d.]+)([KMGT]?)",
        refusal,
        re.DOTALL,
    )
    return match and math.ceil(float(match[1]) * 1024 ** " KMGT".index(match[2] or " "))


def _place(
    args: tuple[Any, ...],
    target: Target,
    mesh: Mesh | None,
    static_argnums: int | Sequence[int] | None,
    *,
    replicate: bool,
) -> tuple[Any, ...]:
    """Makes the arrays in the arguments abstract, with shardings over the target's devices."""
    static = {
        number % len(args)
        for number in np.atleast_1d(() if static_argnums is None else static_argnums)
    }
    traced = [argument for number, argument in enumerate(args) if number not in static]
    mesh = mesh or _mesh_of(traced) or Mesh(np.asarray(devices_of(target)), ("devices",))
    replicated = NamedSharding(mesh, PartitionSpec())
    _check_devices(replicated, target)

    def place(leaf: Any) -> Any:
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            return leaf
        return jax.ShapeDtypeStruct(
            leaf.shape,
            leaf.dtype,
            sharding=_sharding(leaf, target, mesh) or (replicated if replicate else None),
            weak_type=getattr(leaf, "weak_type", False),
        )

    return tuple(
        argument if number in static else jax.tree.map(place, argument)
        for number, argument in enumerate(args)
    )


def _mesh_of(args: Any) -> Mesh | None:
    """The mesh of the first argument that is sharded over one, or the one that is set."""
    for leaf in jax.tree.leaves(args):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
            return sharding.mesh
    current = jax.sharding.get_mesh()
    return None if current.empty else current


def _sharding(leaf: Any, target: Target, mesh: Mesh) -> jax.sharding.Sharding | None:
    """The sharding a leaf comes with; None for one without, or an array on a single device."""
    sharding = getattr(leaf, "sharding", None)
    on_one_device = isinstance(leaf, jax.Array) and isinstance(sharding, SingleDeviceSharding)
    if sharding is None or on_one_device:
        return None
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, AbstractMesh):
        return NamedSharding(mesh, sharding.spec)  # as jax.eval_shape returns within a mesh
    _check_devices(sharding, target)
    return sharding


def _check_devices(sharding: jax.sharding.Sharding, target: Target) -> None:
    devices = devices_of(target)
    if sharding.device_set == set(devices):
        return
    given: list[Any] = list(sharding.device_set)
    kinds = sorted({device.device_kind for device in given})
    raise ValueError(
        f"a sharding is over {len(given)} devices ({', '.join(kinds)}) and target "
        f"{target.name!r} has {len(devices)} of its own ({devices[0].device_kind}); make the mesh "
        f"with planning.mesh_for({target.name!r}, ...)"
    )


def _argument_bytes(args: tuple[Any, ...]) -> int | None:
    """Bytes of the arguments on a device; None if their shardings are not on them."""
    total = 0
    for leaf in jax.tree.leaves(args):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            if leaf.sharding is None:
                return None
            total += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return total


def _warn_if_nothing_is_donated(lowered: jax.stages.Lowered) -> None:
    arguments = jax.tree.leaves(lowered.args_info)
    if any(argument.donated for argument in arguments):
        return
    kinds = Counter((argument.shape, argument.dtype) for argument in arguments)
    recurring = kinds & Counter((out.shape, out.dtype) for out in jax.tree.leaves(lowered.out_info))
    total_bytes, recurring_bytes = _total_bytes(kinds), _total_bytes(recurring)
    if recurring and 2 * recurring_bytes >= total_bytes:
        warnings.warn(
            f"no argument is donated, so what the step replaces counts twice: outputs have the "
            f"shapes and dtypes of {recurring_bytes:,} of the arguments' {total_bytes:,} bytes; "
            f"pass donate_argnums",
            stacklevel=3,
        )


def _total_bytes(kinds: Counter[tuple[tuple[int, ...], Any]]) -> int:
    return sum(count * math.prod(shape) * dtype.itemsize for (shape, dtype), count in kinds.items())
