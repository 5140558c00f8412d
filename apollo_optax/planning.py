"""Compiles a training step for chips that are not here, and reads what it needs off the program.

XLA's compilers for TPUs and GPUs run on a machine that has neither. They lay out every buffer of a
step, so what a step needs is known before a chip is rented; nothing is run.

    plan = planning.compile_for("a100-80gb:8", step, params, state, batch, donate_argnums=(0, 1))
    plan.fits, plan.peak_bytes, plan.collectives

In a checkout, install with `pip install -e '.[planning]'`. Set `JAX_PLATFORMS=cpu` so that JAX does
not look for the chips. What the numbers leave out: memory of other processes on a chip, and the
fragmentation of an allocator that has served other programs before.
"""

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
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from apollo_optax._collectives import Traffic, read_traffic
from apollo_optax._targets import (
    GPUS,
    TPUS,
    Target,
    devices_of,
    missing_compiler,
    parse_target,
)

__all__ = [
    "GPUS",
    "TPUS",
    "Collective",
    "LargestBatch",
    "Plan",
    "Target",
    "compile_for",
    "largest_batch",
    "mesh_for",
    "parse_target",
]


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind in one step.

    Attributes:
      count: How often they run, those in loops once a trip.
      bytes: Bytes of a device's arrays in them, the larger of what it hands in and what it receives
        of each. What travels over the links is up to twice that, by the algorithm.
    """

    count: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step needs on a device of a target. All bytes are those of one device.

    Attributes:
      target: The target's name.
      device_count: Devices the step was compiled for.
      fits: Whether the compiler took the program and `peak_bytes` is within `capacity_bytes`.
      peak_bytes: Arguments + outputs - aliases + temporaries. Of a program that a TPU's compiler
        refuses, what it says the program needs, to two decimals of its unit; arguments that are
        dead early come on top.
      capacity_bytes: What a program may use; see `Target.capacity_bytes`.
      argument_bytes: Arguments: parameters, optimizer state, batch.
      output_bytes: Outputs, those in the place of a donated argument too.
      alias_bytes: Outputs in the place of a donated argument.
      temporary_bytes: What lives only within the step: gradients, activations.
      collectives: By kind.
      flops: Floating-point operations, the body of a loop counted once.
      hbm_bytes: Bytes read from and written to memory, the body of a loop counted once; those of a
        Pallas kernel as its `cost_estimate` has them.
      loops: Trips of each loop, None for a loop whose trips the program does not tell.
      refusal: The compiler's words if it refused the program.

    A field is None where the compiler does not report it: `flops` and `hbm_bytes` on GPUs,
    `collectives` and `loops` where it gives no text of the program, and all but `argument_bytes` of
    a program that it refuses.
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
    refusal: str | None = None

    @property
    def collective_bytes(self) -> int | None:
        """Bytes of all collectives."""
        if self.collectives is None:
            return None
        return sum(collective.bytes for collective in self.collectives.values())

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
    """Compiles a step for a target and says what it needs there.

    >>> step = lambda weights, gradient: weights - 0.1 * gradient
    >>> weights = jax.ShapeDtypeStruct((1024, 256), "float32")
    >>> plan = compile_for("cpu", step, weights, weights, donate_argnums=0)
    >>> plan.argument_bytes, plan.alias_bytes, plan.fits
    (2097152, 1048576, True)

    Args:
      target: Where it is to run, such as `"tpu-v5e:16x16"`; see `parse_target`.
      step: A function, jitted or not. A jitted one keeps its own options if none is given here.
      *args: Its arguments: `jax.ShapeDtypeStruct`s, or arrays, which are taken as such. Shardings
        are over the mesh of `mesh_for(target, ...)`; an argument without one is replicated.
      donate_argnums: As for `jax.jit`: donate what the step replaces, or it counts twice.
      static_argnums: As for `jax.jit`.
      in_shardings: As for `jax.jit`, instead of shardings on the arguments.
      out_shardings: As for `jax.jit`.
      mesh: The mesh that is set while the step is traced, for steps that name axes only:
        `PartitionSpec`s, `AxisType.Explicit`.
      compiler_options: XLA's, over what planning itself needs.

    Returns:
      A plan, also if the step does not fit.

    Raises:
      ImportError: if the target's compiler is not installed.
      ValueError: for an unknown target, or shardings over other devices than the target's.

    Warns:
      UserWarning: if nothing is donated though half of the arguments' bytes or more could be.
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
        platforms = target.platform and (target.platform,)
        lowered = jitted.trace(*args).lower(lowering_platforms=platforms)
        _warn_if_nothing_is_donated(lowered)
        try:
            compiled = lowered.compile(_compiler_options(target, compiler_options))
        except jax.errors.JaxRuntimeError as error:
            return _refused(target, args, error)
    return _plan(target, compiled)


def _compiler_options(
    target: Target, compiler_options: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    # Nothing can be timed on a chip that is not there.
    absent = {"xla_gpu_autotune_level": 0} if target.chip in GPUS else {}
    return {**absent, **(compiler_options or {})} or None


def _plan(target: Target, compiled: jax.stages.Compiled) -> Plan:
    memory: Any = compiled.memory_analysis()
    cost = compiled.cost_analysis() or {}
    text = compiled.as_text()
    traffic = read_traffic(text) if text else None
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
        collectives=traffic and _collectives(traffic),
        flops=cost.get("flops"),
        hbm_bytes=cost.get("bytes accessed"),
        loops=traffic and traffic.loops,
    )


def _collectives(traffic: Traffic) -> dict[str, Collective]:
    return {
        kind: Collective(traffic.counts[kind], traffic.payloads[kind])
        for kind in sorted(traffic.counts)
    }


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


@dataclasses.dataclass(frozen=True)
class LargestBatch:
    """What `largest_batch` found.

    Attributes:
      batch: The largest batch that fits; 0 if none does.
      plan: Its plan; None if none fits.
      next_plan: The plan of the smallest batch found not to fit; None if the limit still fits.
    """

    batch: int
    plan: Plan | None
    next_plan: Plan | None


def largest_batch(
    target: str | Target,
    build: Callable[[int], tuple[Callable[..., Any], Sequence[Any]]],
    *,
    multiple_of: int = 1,
    limit: int = 65536,
    **options: Any,
) -> LargestBatch:
    """Searches the largest batch that fits.

    Peaks grow nearly in line with the batch, so that a line through two finds it in about four
    compilations; bisection in between bounds their number for those that do not.

    Args:
      target: As for `compile_for`.
      build: Makes the step and its arguments for a batch: `batch -> (step, args)`.
      multiple_of: Batches tried are multiples of it, such as the devices that share a batch.
      limit: The largest batch to try.
      **options: As for `compile_for`: `donate_argnums`, `mesh`, ...

    Returns:
      The batch, its plan, and the plan of the next one that does not fit.

    Raises:
      ValueError: if `multiple_of` is not positive or the limit is below it.

    >>> def build(batch):
    ...     return lambda x: x.sum(), [jax.ShapeDtypeStruct((batch, 2**26), "float32")]
    >>> found = largest_batch("cpu", build)
    >>> found.plan.fits, found.next_plan.fits, found.batch > 0
    (True, False, True)
    """
    if multiple_of < 1 or limit < multiple_of:
        raise ValueError(
            f"multiple_of must be 1 or more and limit at least multiple_of, got {multiple_of=} "
            f"and {limit=}"
        )

    def plan_of(multiple: int) -> Plan:
        step, args = build(multiple * multiple_of)
        return compile_for(target, step, *args, **options)

    plans: dict[int, Plan] = {}
    most, candidate = limit // multiple_of, 1
    fits, refused = 0, most + 1
    while refused - fits > 1:
        plan = plans[candidate] = plan_of(candidate)
        fits, refused = (candidate, refused) if plan.fits else (fits, candidate)
        candidate = _next_candidate(plans, fits, refused, most)
    return LargestBatch(fits * multiple_of, plans.get(fits), plans.get(refused))


def _next_candidate(plans: Mapping[int, Plan], fits: int, refused: int, most: int) -> int:
    """Where a line through the two plans nearest to the capacity says that the last fits.

    Every other time the middle instead, for peaks that are no line.
    """
    if fits == 0:
        return 1
    if refused in plans and len(plans) % 2:
        return (fits + refused) // 2
    largest = min(16 * fits, most) if refused > most else refused - 1
    points = sorted(plans.items(), key=lambda at: abs(at[1].peak_bytes - at[1].capacity_bytes))
    if len(points) < 2:
        return min(2 * fits, most)
    (batch, plan), (other_batch, other) = points[:2]
    slope = (plan.peak_bytes - other.peak_bytes) / (batch - other_batch)
    if slope <= 0:
        return largest
    room = (plan.capacity_bytes - plan.peak_bytes) / slope
    return min(max(batch + math.floor(room), fits + 1), largest)


def mesh_for(
    target: str | Target,
    axis_sizes: Mapping[str, int],
    *,
    axis_types: tuple[jax.sharding.AxisType, ...] | None = None,
) -> Mesh:
    """A mesh over a target's devices, for the shardings of a step's arguments.

    The axes are laid out along the links of a TPU slice as `jax.make_mesh` does. Over several
    slices, the first axis is the one that crosses between them.

    >>> mesh_for("cpu", {"data": 1, "model": 1}).axis_names
    ('data', 'model')

    Args:
      target: As for `compile_for`.
      axis_sizes: The mesh's axes and their sizes, which multiply to the target's devices.
      axis_types: Those of `jax.sharding.Mesh`; automatic if None.

    Raises:
      ImportError: if the target's compiler is not installed.
      ValueError: if the sizes do not multiply to the number of devices, or the first is not a
        multiple of the slices.
    """
    target = parse_target(target)
    devices = devices_of(target)
    names, sizes = tuple(axis_sizes), tuple(axis_sizes.values())
    spelled = ", ".join(f"{name}={size}" for name, size in axis_sizes.items())
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"the mesh {spelled} has {math.prod(sizes)} devices and target {target.name!r} has "
            f"{len(devices)}"
        )
    if target.slices == 1:
        array = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(array, names, axis_types=axis_types)
    if sizes[0] % target.slices:
        raise ValueError(
            f"the first axis of the mesh {spelled} crosses between the {target.slices} slices of "
            f"{target.name!r}, so its size must be a multiple of {target.slices}"
        )
    array = mesh_utils.create_hybrid_device_mesh(
        (sizes[0] // target.slices, *sizes[1:]),
        (target.slices, *(1 for _ in sizes[1:])),
        devices,
        allow_split_physical_axes=True,
    )
    return Mesh(array, names, axis_types=axis_types)
