"""How many sequences a GPU fit a step of LLaMA-7B on 8 A100s, by optimizer?

    JAX_PLATFORMS=cpu python -m benchmarks.largest_micro_batch

Searches the largest micro-batch of plain data parallelism with bfloat16 weights and recomputed
activations at 256, 1024 and 2048 tokens a sequence, and adds a row for each to
`results/largest_micro_batch.json`; an hour on two cores. Prints the README's table.
"""

import dataclasses
import itertools
from collections.abc import Sequence

from benchmarks.plans import plan_missing, row_of
from benchmarks.rows import RESULTS, Row, read_rows
from examples.llama.plan import PlanConfig

OUTPUT = RESULTS / "largest_micro_batch.json"
COMMAND = "JAX_PLATFORMS=cpu python -m benchmarks.largest_micro_batch"
SEQUENCES = (256, 1024, 2048)
STEP = PlanConfig(
    model="7b", device="a100-80gb:8", mesh="data=8", remat=True, rank=256, largest_batch=True
)
SETTINGS = {
    "AdamW": dataclasses.replace(STEP, optimizer="adamw"),
    "AdamW, bfloat16 moments": dataclasses.replace(STEP, optimizer="adamw", moments="bf16"),
    "APOLLO, r = 256": dataclasses.replace(STEP, optimizer="apollo"),
    "APOLLO-Mini": dataclasses.replace(STEP, optimizer="apollo_mini"),
    "AdamW, layer by layer": dataclasses.replace(STEP, optimizer="adamw", update="layerwise"),
    "APOLLO-Mini, layer by layer": dataclasses.replace(
        STEP, optimizer="apollo_mini", update="layerwise"
    ),
}


def table(rows: Sequence[Row]) -> str:
    """Sequences a GPU, in Markdown."""
    lines = [
        "| optimizer | " + " | ".join(f"{sequence} tokens" for sequence in SEQUENCES) + " |",
        "| --- |" + " ---: |" * len(SEQUENCES),
    ]
    for name, setting in SETTINGS.items():
        batches = (
            row_of(rows, dataclasses.replace(setting, sequence=sequence))["largest_batch"]
            for sequence in SEQUENCES
        )
        cells = (f"{batch:,}" if batch else "none fits" for batch in batches)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Plans what has no row yet, and prints the table."""
    settings = [
        dataclasses.replace(setting, sequence=sequence)
        for sequence, setting in itertools.product(SEQUENCES, SETTINGS.values())
    ]
    plan_missing(OUTPUT, COMMAND, settings)
    print(table(read_rows(OUTPUT)))


if __name__ == "__main__":
    main()
