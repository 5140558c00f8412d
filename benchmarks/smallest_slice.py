"""What is the smallest TPU v5e slice that trains LLaMA-13B and a 70B-shaped model, by optimizer?

    JAX_PLATFORMS=cpu python -m benchmarks.smallest_slice

Compiles the step with fully sharded data parallelism, bfloat16 weights and recomputed activations
at 1 x 2048 tokens a chip, on one slice after another until one fits, and adds a row for each to
`results/smallest_slice.json`; an hour on two cores. Slices on which the weights, gradients and
state alone would not fit are passed over. Prints the README's table.
"""

import dataclasses
import itertools
from collections.abc import Sequence

from apollo_optax.planning import parse_target
from benchmarks.plans import GIB, find_row, plan_missing
from benchmarks.rows import RESULTS, Row, read_rows
from examples.llama.options import ModelName
from examples.llama.plan import PlanConfig, argument_bytes, weight_bytes

OUTPUT = RESULTS / "smallest_slice.json"
COMMAND = "JAX_PLATFORMS=cpu python -m benchmarks.smallest_slice"
SLICES = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
MODELS: tuple[ModelName, ...] = ("13b", "70b")
STEP = PlanConfig(batch=1, sequence=2048, remat=True, rank=256)
STEPS = {
    "SGD": dataclasses.replace(STEP, optimizer="sgd"),
    "APOLLO-Mini": dataclasses.replace(STEP, optimizer="apollo_mini"),
    "APOLLO, r = 256": dataclasses.replace(STEP, optimizer="apollo"),
    "AdamW": dataclasses.replace(STEP, optimizer="adamw"),
    "APOLLO-Mini, layer by layer": dataclasses.replace(
        STEP, optimizer="apollo_mini", update="layerwise"
    ),
}


def settings(model: ModelName, step: PlanConfig) -> list[PlanConfig]:
    """The step on each slice, the smallest first."""
    return [
        dataclasses.replace(
            step,
            model=model,
            device=f"tpu-v5e:{shape}",
            mesh=f"fsdp={parse_target(f'tpu-v5e:{shape}').device_count}",
        )
        for shape in SLICES
    ]


def table(rows: Sequence[Row]) -> str:
    """The smallest slice for each, with its peak, in Markdown."""
    lines = [
        "| optimizer | " + " | ".join(f"LLaMA-{model}" for model in MODELS) + " |",
        "| --- |" + " --- |" * len(MODELS),
    ]
    for name, step in STEPS.items():
        cells = []
        for model in MODELS:
            found = (find_row(rows, setting) for setting in settings(model, step))
            row = next(row for row in found if row and row["fits"])
            chips, peak = row["device_count"], row["peak_bytes"]
            cells.append(f"{chips} chips (`{row['device']}`), {peak / GIB:.2f} GiB each")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Plans what has no row yet, and prints the table."""
    for model, step in itertools.product(MODELS, STEPS.values()):
        for setting in settings(model, step):
            target = parse_target(setting.device)
            gradient_bytes = weight_bytes(setting) if setting.update == "standard" else 0
            least = argument_bytes(setting) + gradient_bytes // target.device_count
            if least > target.capacity_bytes:
                continue
            plan_missing(OUTPUT, COMMAND, [setting])
            row = find_row(read_rows(OUTPUT), setting)
            if row and row["fits"]:
                break
    print(table(read_rows(OUTPUT)))


if __name__ == "__main__":
    main()
