"""What does the optimizer add to the collectives of LLaMA-7B's step on TPU pods?

    JAX_PLATFORMS=cpu python -m benchmarks.pod_collectives

Compiles the step with fully sharded data parallelism, alone, with tensor parallelism, and over two
slices, at 1 x 2048 tokens a device (a group of devices with tensor parallelism), and adds a row for
each mesh and optimizer to `results/pod_collectives.json`; an hour on two cores. Prints the README's
table.
"""

import itertools
from collections.abc import Sequence

from benchmarks.plans import GIB, plan_missing, row_of
from benchmarks.rows import RESULTS, Row, read_rows
from examples.llama.optimizers import OptimizerName
from examples.llama.plan import PlanConfig

OUTPUT = RESULTS / "pod_collectives.json"
COMMAND = "JAX_PLATFORMS=cpu python -m benchmarks.pod_collectives"
OPTIMIZERS: dict[OptimizerName, str] = {
    "sgd": "SGD",
    "apollo_mini": "APOLLO-Mini",
    "apollo": "APOLLO, r = 256",
}
MESHES = {
    "tpu-v5e:16x16": ("fsdp=256", "fsdp=64,tensor=4"),
    "tpu-v5p:8x8x8": ("data=2,fsdp=256", "fsdp=128,tensor=4"),
    "2*tpu-v5e:16x16": ("data=2,fsdp=256",),
}


def setting(device: str, mesh: str, optimizer: OptimizerName) -> PlanConfig:
    """The step of one row."""
    return PlanConfig(
        model="7b",
        device=device,
        optimizer=optimizer,
        mesh=mesh,
        batch=1,
        sequence=2048,
        remat=True,
        rank=256,
    )


def table(rows: Sequence[Row]) -> str:
    """Peaks, and collective bytes over SGD's, in Markdown."""
    heads = [
        "slice",
        "mesh",
        *(f"peak, {name}" for name in OPTIMIZERS.values()),
        "collectives, SGD",
        *(f"{name} adds" for name in [*OPTIMIZERS.values()][1:]),
    ]
    lines = [
        "| " + " | ".join(heads) + " |",
        "| --- | --- |" + " ---: |" * (len(heads) - 2),
    ]
    for device, meshes in MESHES.items():
        for mesh in meshes:
            found = [row_of(rows, setting(device, mesh, optimizer)) for optimizer in OPTIMIZERS]
            if not all(row["fits"] for row in found):
                raise ValueError(f"{device} {mesh} does not fit; the table has no word for it")
            peaks = [f"{row['peak_bytes'] / GIB:.2f} GiB" for row in found]
            sgd, *others = (row["collective_bytes"] for row in found)
            added = [f"{other / sgd - 1:+.2%}" for other in others]
            cells = [f"`{device}`", mesh, *peaks, f"{sgd / GIB:.1f} GiB", *added]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Plans what has no row yet, and prints the table."""
    settings = [
        setting(device, mesh, optimizer)
        for device, meshes in MESHES.items()
        for mesh, optimizer in itertools.product(meshes, OPTIMIZERS)
    ]
    plan_missing(OUTPUT, COMMAND, settings)
    print(table(read_rows(OUTPUT)))


if __name__ == "__main__":
    main()
