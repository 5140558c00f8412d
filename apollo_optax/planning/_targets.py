"""The chips and slices that a step can be compiled for: names, facts, devices and meshes.

The tables hold facts: the vendors' data sheets, the numbers that a CUDA program reads from the
driver, and the memory that the TPU compiler calls available. These facts count where they differ
from the number in a chip's name.

Rates are peaks. Of a link with two directions, they are the rate of one direction:

- TPUs: cloud.google.com/tpu/docs/v4, v5e, v5p, v6e and tpu7x. The page of v4 does not give the rate
  of a host's network. The table has the rate of the fastest other host.
- Operations of GPUs: the operations of a multiprocessor per clock cycle, as in NVIDIA's white
  papers on the architectures, at the highest clock. The product is 312 teraflops in bfloat16 for an
  A100, as in the data sheet, and 8% more than the 989 of an H100, which are at a lower clock.
- Links: NVLink or PCI Express as in the data sheets, and the InfiniBand of a DGX with one card for
  each GPU.
"""

import contextlib
import difflib
import functools
import importlib.util
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
from jax.experimental import mesh_utils, topologies
from jax.sharding import Mesh

GIB = 2**30
MIB = 2**20


class Tpu(NamedTuple):
    """A TPU generation.

    Attributes:
      topology: What the compiler calls it.
      axes: Axes of its torus.
      largest: Chips of its largest slice.
      devices_per_chip: JAX devices of a chip.
      usable_bytes: HBM of a device that programs may use, "available HBM" in the compiler's words.
      teraflops: Of a chip's products of 16 bits. Those of float32 are made of 16 bits too.
      teraops: Of its products of 8 bits.
      gigabytes_per_second: Of its HBM.
      link_gigabytes: Of one link to a neighbour, one direction, in a second.
      network_gigabytes: Of its share of the host's network, one direction, in a second.
      options: What `get_topology_desc` needs beside the name.
    """

    topology: str
    axes: int
    largest: int
    devices_per_chip: int
    usable_bytes: int
    teraflops: float
    teraops: float
    gigabytes_per_second: float
    link_gigabytes: float
    network_gigabytes: float
    options: Mapping[str, str] = {}


TPUS: dict[str, Tpu] = {
    # 32 GiB. Without "megacore" each of a chip's two cores would be a device.
    "tpu-v4": Tpu(
        *("v4", 3, 4096, 1, int(30.75 * GIB)),
        *(275, 275, 1228.8, 50, 12.5),
        {"chip_config_name": "megacore"},
    ),
    "tpu-v5e": Tpu("v5e", 2, 256, 1, int(15.75 * GIB), 197, 394, 819, 50, 3.125),  # 16 GiB
    "tpu-v5p": Tpu("v5p", 3, 8960, 1, int(95.74 * GIB), 459, 918, 2765, 100, 6.25),  # 95.74 GiB
    "tpu-v6e": Tpu("v6e", 2, 256, 1, int(31.25 * GIB), 918, 1836, 1640, 100, 12.5),  # 32 GiB
    # 192 GiB a chip of two devices.
    "tpu7x": Tpu("tpu7x", 3, 9216, 2, int(94.75 * GIB), 2307, 4614, 7380, 100, 12.5),
}
SLICES_2D = {(1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)}
SMALL_SLICES_3D = {(1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)}


class Architecture(NamedTuple):
    """What the GPUs of a generation have in common, a streaming multiprocessor each.

    `operations` are those of products in a clock, by the bits of an operand: tensor cores, with
    sums in float32 where operands have 16 bits and TF32 for float32. `reduces_in_switch` is whether
    the switch between a host's GPUs adds up.
    """

    capability: str
    fpus: int
    threads: int
    shared_bytes: int
    shared_bytes_of_a_block: int
    operations: Mapping[int, int]
    reduces_in_switch: bool = False


AMPERE = Architecture(
    *("major: 8", 64, 2048, 164 * 1024, 163 * 1024), {64: 128, 32: 1024, 16: 2048, 8: 4096}
)
ADA = Architecture(
    *("major: 8 minor: 9", 128, 1536, 100 * 1024, 99 * 1024), {64: 4, 32: 256, 16: 512, 8: 2048}
)
HOPPER = Architecture(
    *("major: 9 feature_extension: ACCELERATED_FEATURES", 128, 2048, 228 * 1024, 227 * 1024),
    {64: 256, 32: 2048, 16: 4096, 8: 8192},
    reduces_in_switch=True,
)
BLACKWELL = HOPPER._replace(
    capability="major: 10 feature_extension: ACCELERATED_FEATURES",
    operations={64: 128, 32: 4096, 16: 8192, 8: 16384},
)


class Gpu(NamedTuple):
    """A GPU model.

    `memory_bytes` is the total that a CUDA program reads from the driver. `link_gigabytes` and
    `network_gigabytes` leave it in a second for GPUs of its host and of others; a consumer's card
    has no network of its own.
    """

    description: str
    architecture: Architecture
    multiprocessors: int
    clock_ghz: float
    l2_mib: int
    gigabytes_per_second: float
    memory_bytes: int
    link_gigabytes: float
    network_gigabytes: float | None = None


GPUS: dict[str, Gpu] = {
    "a100-40gb": Gpu(
        *("NVIDIA A100-SXM4-40GB", AMPERE, 108, 1.41, 40, 1555.2, 42331013120, 300, 25)
    ),
    "a100-80gb": Gpu(
        *("NVIDIA A100-SXM4-80GB", AMPERE, 108, 1.41, 40, 2039.04, 85100068864, 300, 25)
    ),
    "h100-80gb": Gpu(
        *("NVIDIA H100 80GB HBM3", HOPPER, 132, 1.98, 50, 3352.32, 84942979072, 450, 50)
    ),
    "h200": Gpu("NVIDIA H200", HOPPER, 132, 1.98, 50, 4800.0, 151397597184, 450, 50),
    "b200": Gpu("NVIDIA B200", BLACKWELL, 148, 1.965, 126, 7672.32, 191514411008, 900, 50),
    "rtx-4090-24gb": Gpu("NVIDIA GeForce RTX 4090", ADA, 128, 2.52, 72, 1008.0, 24080 * MIB, 32),
    "rtx-4080-16gb": Gpu("NVIDIA GeForce RTX 4080", ADA, 76, 2.505, 64, 716.8, 16049 * MIB, 32),
    "rtx-4070-12gb": Gpu("NVIDIA GeForce RTX 4070", ADA, 46, 2.475, 36, 504.0, 12000 * MIB, 32),
    "rtx-4060-8gb": Gpu("NVIDIA GeForce RTX 4060", ADA, 24, 2.46, 24, 272.0, 7936 * MIB, 16),
}
GPUS_PER_HOST = 8

# JAX hands out this share of a card's memory at XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 (its own
# default is 0.75). The rest is for the CUDA context, NCCL and the kernels.
GPU_USABLE_FRACTION = 0.95

LOCAL = ("cpu", "local")


class Hop(NamedTuple):
    """A step on the way from one device to another.

    Attributes:
      devices: Devices that reach each other without it: 1 for the links of a GPU, 8 for the network
        of its host.
      bytes_per_second: What these devices send over it together; they receive as much.
      reduces: Whether what is on the other side adds up and copies, as some switches do.
    """

    devices: int
    bytes_per_second: float
    reduces: bool = False


class Rates(NamedTuple):
    """The peaks of one device.

    Attributes:
      operations: Of products, a second, by the bits of an operand.
      memory_bytes: A second, read and written.
      cache_bytes: What a cache may hold that the program does not tell of; a TPU's program tells.
      hops: The links.
    """

    operations: Mapping[int, float]
    memory_bytes: float
    cache_bytes: int = 0
    hops: tuple[Hop, ...] = ()


EXAMPLES = "'tpu-v5e:16x16', '2*tpu-v5e:16x16', 'a100-80gb:8', 'cpu:8' or 'local'"


@dataclass(frozen=True)
class Target:
    """Devices to compile for, made by `parse_target`.

    Attributes:
      name: The name as given, such as `"a100-80gb:8"`.
      chip: A key of the tables of TPUs or GPUs, `"cpu"` or `"local"`.
      shape: The number of chips along each axis of a TPU slice, or `(count,)`. `()` stands for
        every local device.
      slices: The number of TPU slices, which the data-center network joins.
    """

    name: str = field(compare=False)
    chip: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def platform(self) -> str | None:
        """The platform that JAX lowers for, `"tpu"` or `"cuda"`; None for local devices."""
        return "tpu" if self.chip in TPUS else "cuda" if self.chip in GPUS else None

    @property
    def device_count(self) -> int:
        """How many JAX devices the target has, two for each chip of tpu7x and one for others.

        >>> parse_target("2*tpu-v5e:16x16").device_count
        512
        """
        if not self.shape:
            return len(jax.devices())
        devices_per_chip = TPUS[self.chip].devices_per_chip if self.chip in TPUS else 1
        return self.slices * math.prod(self.shape) * devices_per_chip

    @property
    def capacity_bytes(self) -> int:
        """The memory of a device that a program may use, in bytes.

        For a TPU this is the memory that the compiler calls available, such as 15.75 of v5e's 16
        GiB. For a GPU it is 0.95 of the memory that a CUDA program sees; JAX hands out as much with
        XLA_PYTHON_CLIENT_MEM_FRACTION=0.95. For a local accelerator it is the limit of the
        allocator. Local CPU devices share the physical memory evenly.

        >>> parse_target("tpu-v5e:4x4").capacity_bytes / 2**30
        15.75
        """
        if self.chip in TPUS:
            return TPUS[self.chip].usable_bytes
        if self.chip in GPUS:
            return int(GPU_USABLE_FRACTION * GPUS[self.chip].memory_bytes)
        # Of several processes each sees the memory of its own devices only.
        own = [d for d in devices_of(self) if d.process_index == jax.process_index()]
        if own and (stats := own[0].memory_stats()):
            return stats["bytes_limit"]
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // self.device_count


def rates_of(target: Target) -> Rates | None:
    """The peaks of a target's devices; None for local ones, whose chip is not told.

    A chip of a TPU slice has a link to each neighbour: two an axis, one where the axis has two
    chips.
    """
    if target.chip in TPUS:
        tpu = TPUS[target.chip]
        share = 1e12 / tpu.devices_per_chip
        links = sum(min(2, size - 1) for size in target.shape)
        hops = [Hop(tpu.devices_per_chip, 1e9 * tpu.link_gigabytes * links)]
        if target.slices > 1:
            chips = math.prod(target.shape)
            hops.append(Hop(chips * tpu.devices_per_chip, 1e9 * tpu.network_gigabytes * chips))
        return Rates(
            operations={16: share * tpu.teraflops, 8: share * tpu.teraops},
            memory_bytes=1e9 * tpu.gigabytes_per_second / tpu.devices_per_chip,
            hops=tuple(hop for hop in hops if hop.bytes_per_second),
        )
    if target.chip in GPUS:
        gpu = GPUS[target.chip]
        architecture = gpu.architecture
        hops = [Hop(1, 1e9 * gpu.link_gigabytes, architecture.reduces_in_switch)]
        if gpu.network_gigabytes:
            host = 1e9 * gpu.network_gigabytes * GPUS_PER_HOST
            hops.append(Hop(GPUS_PER_HOST, host, reduces=True))
        clock = 1e9 * gpu.clock_ghz * gpu.multiprocessors
        return Rates(
            operations={bits: count * clock for bits, count in architecture.operations.items()},
            memory_bytes=1e9 * gpu.gigabytes_per_second,
            cache_bytes=gpu.l2_mib * MIB,
            hops=tuple(hops),
        )
    return None


def parse_target(target: str | Target) -> Target:
    """Reads the name of a target.

    - TPU slices by their shape: `tpu-v5e:16x16`, `tpu-v4:2x2x1`, `tpu-v5p:8x8x8`, `tpu-v6e:2x4`,
      `tpu7x:2x2x1`. Several slices: `2*tpu-v5e:16x16` (quote it in a shell). No shape: one chip.
    - GPUs by their number: `a100-80gb:8`, `h200`, `rtx-4090-24gb:2`. More than 8 are hosts of 8.
    - `cpu:8`: the first 8 CPU devices of this process; `cpu`: one; `local`: all of `jax.devices()`.

    Raises:
      ValueError: If the chip is unknown (the message names the nearest known ones), or no slice
        has the shape, or no host has the number of chips.

    >>> parse_target("tpu-v5p:8x8x8")
    Target(name='tpu-v5p:8x8x8', chip='tpu-v5p', shape=(8, 8, 8), slices=1)
    >>> parse_target("a100-80g:8")
    Traceback (most recent call last):
    ValueError: unknown chip 'a100-80g' in target 'a100-80g:8'; did you mean a100-80gb, ...?
    """
    if isinstance(target, Target):
        return target
    pattern = r"(?:(\d+)\*)?([a-z][\w-]*)(?::(\d+(?:x\d+)*))?"
    match = re.fullmatch(pattern, target.strip().lower())
    if not match:
        raise ValueError(f"target {target!r} is not of the form {EXAMPLES}")
    slices, chip, shape = match[1] or "1", match[2], match[3]
    known = (*TPUS, *GPUS, *LOCAL)
    if chip not in known:
        nearest = difflib.get_close_matches(chip, known, n=3, cutoff=0.4) or known
        raise ValueError(
            f"unknown chip {chip!r} in target {target!r}; did you mean {', '.join(nearest)}?"
        )
    sizes = tuple(int(size) for size in shape.split("x")) if shape else _one(chip)
    _check_shape(target, chip, sizes, int(slices))
    return Target(target, chip, sizes, int(slices))


def _one(chip: str) -> tuple[int, ...]:
    if chip == "local":
        return ()
    return (1,) * TPUS[chip].axes if chip in TPUS else (1,)


def _check_shape(target: str, chip: str, shape: tuple[int, ...], slices: int) -> None:
    if 0 in shape or slices == 0:
        raise ValueError(f"target {target!r} has no devices; counts start at 1")
    if chip in TPUS:
        _check_slice(target, TPUS[chip], shape)
        return
    if slices > 1:
        raise ValueError(f"target {target!r}: several slices are for TPUs; write '{chip}:COUNT'")
    if len(shape) > 1:
        raise ValueError(
            f"target {target!r}: {chip} is counted, as in '{chip}:8', and has no shape"
        )
    if chip in GPUS and shape[0] > GPUS_PER_HOST and shape[0] % GPUS_PER_HOST:
        raise ValueError(
            f"target {target!r}: more than {GPUS_PER_HOST} GPUs are hosts of {GPUS_PER_HOST}, "
            f"so give a multiple of {GPUS_PER_HOST}"
        )


def _check_slice(target: str, tpu: Tpu, shape: tuple[int, ...]) -> None:
    if tpu.axes == 2:
        valid = shape in SLICES_2D
        choices = ", ".join("x".join(map(str, sizes)) for sizes in sorted(SLICES_2D))
    else:
        fours = len(shape) == 3 and all(size % 4 == 0 for size in shape)
        valid = shape in SMALL_SLICES_3D or (fours and math.prod(shape) <= tpu.largest)
        small = ", ".join("x".join(map(str, sizes)) for sizes in sorted(SMALL_SLICES_3D))
        choices = f"{small}, and multiples of 4 on three axes up to {tpu.largest} chips"
    if not valid:
        raise ValueError(f"target {target!r} is no slice of {tpu.topology}; its shapes: {choices}")


@functools.lru_cache
def devices_of(target: Target) -> tuple[Any, ...]:
    """The target's devices, absent (good for compiling only) or local.

    The same objects each time, so that shardings made at different times go together.

    Raises:
      ImportError: if the compiler's package is missing.
      ValueError: if this process has fewer local devices than asked for.
    """
    if target.chip in TPUS:
        _require_tpu_compiler()
        with compiler_environment():
            return tuple(_tpu_topology(target).devices)
    if target.chip in GPUS:
        _require_gpu_compiler()
        with compiler_environment():
            return tuple(_gpu_topology(target).devices)
    return _local_devices(target)


def mesh_for(
    target: str | Target,
    axis_sizes: Mapping[str, int],
    *,
    axis_types: tuple[jax.sharding.AxisType, ...] | None = None,
) -> Mesh:
    """Returns a mesh over a target's devices, for the shardings of a step's arguments.

    The axes follow the links of a TPU slice, as with `jax.make_mesh`. With several slices, the
    first axis crosses between them.

    >>> mesh_for("cpu", {"data": 1, "model": 1}).axis_names
    ('data', 'model')

    Args:
      target: As for `compile_for`.
      axis_sizes: The axes of the mesh and their sizes. The product of the sizes is the number of
        devices of the target.
      axis_types: The axis types, as in `jax.sharding.Mesh`. None means automatic axes.

    Raises:
      ImportError: If the target's compiler is not installed.
      ValueError: If the product of the sizes is not the number of devices, or the first size is not
        a multiple of the number of slices.
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


def _tpu_topology(target: Target) -> topologies.TopologyDescription:
    tpu = TPUS[target.chip]
    single = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(target.shape) == 1 else {}
    return topologies.get_topology_desc(
        platform="tpu",
        topology_name=f"{tpu.topology}:{'x'.join(map(str, target.shape))}",
        num_slices=target.slices,
        **tpu.options,
        **single,
    )


def _gpu_topology(target: Target) -> topologies.TopologyDescription:
    (count,) = target.shape
    hosts = max(1, count // GPUS_PER_HOST)
    try:
        return topologies.get_topology_desc(
            platform="cuda",
            topology_name=target.chip,
            target_config=gpu_target_config(GPUS[target.chip]),
            topology=f"1x{hosts}x{count // hosts}",
        )
    except NotImplementedError as error:
        if "topology not implemented" not in str(error):
            raise  # the compiler's own refusal, of this GPU or in this version
        raise ImportError(
            "JAX has looked for a GPU, found none, and dropped its CUDA compiler; set "
            "JAX_PLATFORMS=cpu before Python starts"
        ) from error


def _local_devices(target: Target) -> tuple[Any, ...]:
    devices = jax.devices("cpu") if target.chip == "cpu" else jax.devices()
    (count,) = target.shape or (len(devices),)
    if count > len(devices):
        raise ValueError(
            f"target {target.name!r} asks for {count} devices and this process has {len(devices)}; "
            f"for CPUs, set JAX_NUM_CPU_DEVICES={count} before Python starts"
        )
    return tuple(devices[:count])


def gpu_target_config(gpu: Gpu) -> str:
    """XLA's description of a GPU, a text proto of `GpuTargetConfigProto`."""
    architecture = gpu.architecture
    return f"""
        gpu_device_info {{
          cuda_compute_capability {{ {architecture.capability} }}
          core_count: {gpu.multiprocessors}
          fpus_per_core: {architecture.fpus}
          threads_per_core_limit: {architecture.threads}
          shared_memory_per_core: {architecture.shared_bytes}
          shared_memory_per_block_optin: {architecture.shared_bytes_of_a_block}
          shared_memory_per_block: 49152
          registers_per_core_limit: 65536
          registers_per_block_limit: 65536
          threads_per_warp: 32
          threads_per_block_limit: 1024
          thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          clock_rate_ghz: {gpu.clock_ghz}
          l2_cache_size: {gpu.l2_mib * MIB}
          memory_bandwidth: {int(gpu.gigabytes_per_second * 1e9)}
          device_memory_size: {gpu.memory_bytes}
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 8 patch: 0 }}
        device_description_str: "{gpu.description}"
    """


def _require_tpu_compiler() -> None:
    if "TPU_LIBRARY_PATH" not in os.environ and not importlib.util.find_spec("libtpu"):
        raise missing_compiler("TPUs", "libtpu")


def _require_gpu_compiler() -> None:
    try:
        plugins = [importlib.util.find_spec(f"jax_plugins.xla_cuda{n}") for n in (13, 12)]
    except ModuleNotFoundError:
        plugins = []
    if not any(plugins):
        raise missing_compiler("GPUs", "jax-cuda13-plugin")


def missing_compiler(chips: str, package: str) -> ImportError:
    """The error for a compiler that is not installed."""
    return ImportError(
        f"planning for {chips} needs their compiler, {package}, in the version that goes with "
        f"jax {jax.__version__}; in the checkout: pip install -e '.[planning]'"
    )


@contextlib.contextmanager
def compiler_environment() -> Iterator[None]:
    """Lets the compilers start where their chips are not; then `os.environ` is as it was.

    Without a TPU, libtpu would ask a metadata server where it is, and refuse a second process that
    plans. Without a GPU, JAX would drop its CUDA plugin for want of cuDNN.
    """
    before = dict(os.environ)
    for name, value in {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }.items():
        os.environ.setdefault(name, value)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
