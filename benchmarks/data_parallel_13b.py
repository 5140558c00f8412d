"""Which optimizers train LLaMA-13B with plain data parallelism on 8 A100s of 80 GB?

    JAX_PLATFORMS=cpu python -m benchmarks.data_parallel_13b

Compiles the step with bfloat16 weights, 1 x 256 tokens a GPU and recomputed activations, and adds a
row for each optimizer to `results/data_parallel_13b.json`; minutes. Prints the README's table.
"""

import dataclasses
from collections.abc import Sequence

from benchmarks.plans import GIB, plan_missing, row_of
from benchmarks.rows import RESULTS, Row, read_rows
from examples.llama.plan import PlanConfig

OUTPUT = RESULTS / "data_parallel_13b.json"
COMMAND = "JAX_PLATFORMS=cpu python -m benchmarks.data_parallel_13b"
STEP = PlanConfig(
    model="13b", device="a100-80gb:8", mesh="data=8", batch=1, sequence=256, remat=True, rank=256
)
SETTINGS = {
    "SGD": dataclasses.replace(STEP, optimizer="sgd"),
    "APOLLO-Mini, all matrices": dataclasses.replace(
        STEP, optimizer="apollo_mini", project_embeddings=True
    ),
    "APOLLO-Mini": dataclasses.replace(STEP, optimizer="apollo_mini"),
    "APOLLO, r = 256": dataclasses.replace(STEP, optimizer="apollo"),
    "AdamW, bfloat16 moments": dataclasses.replace(STEP, optimizer="adamw", moments="bf16"),
    "AdamW, float32 moments": dataclasses.replace(STEP, optimizer="adamw"),
}


def table(rows: Sequence[Row]) -> str:
    """The README's table of `rows`, in Markdown."""
    lines = ["| optimizer | peak | over SGD | |", "| --- | ---: | ---: | --- |"]
    sgd = row_of(rows, SETTINGS["SGD"])["peak_bytes"]
    for name, setting in SETTINGS.items():
        row = row_of(rows, setting)
        fits = "fits" if row["fits"] else "does not fit"
        peak = row["peak_bytes"]
        lines.append(f"| {name} | {peak / GIB:.2f} GiB | {peak / sgd - 1:+.1%} | {fits} |")
    return "\n".join(lines)


def main() -> None:
    """Plans what has no row yet, and prints the table."""
    plan_missing(OUTPUT, COMMAND, SETTINGS.values())
    print(table(read_rows(OUTPUT)))


if __name__ == "__main__":
    main()
