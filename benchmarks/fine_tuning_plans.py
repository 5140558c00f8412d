"""On which cards can LLaMA 3.2 1B and LLaMA 3.1 8B be fine-tuned, all parameters of them?

    JAX_PLATFORMS=cpu python -m benchmarks.fine_tuning_plans

Compiles the training step at 1 x 1024 tokens for an RTX 4090 and holds its peak against the memory
of cards with 8, 12, 16 and 24 GB. Writes `results/fine_tuning_plans.json`; a quarter of an hour on
two cores.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

from apollo_optax.planning import parse_target
from benchmarks.plans import GIB, plan_missing, row_of
from benchmarks.rows import RESULTS, Row, read_rows
from examples.llama.plan import PlanConfig

OUTPUT = RESULTS / "fine_tuning_plans.json"
COMMAND = "JAX_PLATFORMS=cpu python -m benchmarks.fine_tuning_plans"
_MODELS = Path("benchmarks/models")
MODELS = {
    "LLaMA 3.2 1B": _MODELS / "llama-3.2-1b.json",
    "LLaMA 3.1 8B": _MODELS / "llama-3.1-8b.json",
}
CARDS = ("rtx-4060-8gb", "rtx-4070-12gb", "rtx-4080-16gb", "rtx-4090-24gb")
STEP = PlanConfig(device="rtx-4090-24gb", sequence=1024, weights="bf16")
LAYERWISE = dataclasses.replace(STEP, update="layerwise")
STEPS = {
    "AdamW, bf16, recomputed activations": dataclasses.replace(STEP, optimizer="adamw", remat=True),
    "LoRA, r = 16, bf16, recomputed activations": dataclasses.replace(
        STEP, optimizer="adamw", lora=16, remat=True
    ),
    "AdamW, bf16, layer-wise": dataclasses.replace(LAYERWISE, optimizer="adamw"),
    "APOLLO-Mini, bf16, layer-wise": LAYERWISE,
    "APOLLO-Mini, factored vocabulary, bf16, layer-wise": dataclasses.replace(
        LAYERWISE, vocabulary="factored"
    ),
    "APOLLO-Mini, factored vocabulary, int8, layer-wise": dataclasses.replace(
        LAYERWISE, vocabulary="factored", weights="int8"
    ),
    "SWAN, factored vocabulary, int8, layer-wise": dataclasses.replace(
        LAYERWISE, optimizer="swan", vocabulary="factored", weights="int8"
    ),
}


def smallest_card(peak_bytes: int) -> str:
    """The memory of the smallest card that holds so much."""
    for card in CARDS:
        if peak_bytes <= parse_target(card).capacity_bytes:
            return card.rsplit("-", 1)[1].replace("gb", " GB")
    return "none"


def table(rows: Sequence[Row]) -> str:
    """The peak of each step and the smallest card for it, in Markdown."""
    lines = [
        "| step | " + " | ".join(f"{model} | card" for model in MODELS) + " |",
        "| --- |" + " ---: | ---: |" * len(MODELS),
    ]
    for name, step in STEPS.items():
        cells = []
        for load in MODELS.values():
            peak = row_of(rows, dataclasses.replace(step, load=load))["peak_bytes"]
            cells += [f"{peak / GIB:.2f} GiB", smallest_card(peak)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Plans what has no row yet, and prints the table."""
    plan_missing(
        OUTPUT,
        COMMAND,
        (
            dataclasses.replace(step, load=load)
            for load, step in itertools.product(MODELS.values(), STEPS.values())
        ),
    )
    print(table(read_rows(OUTPUT)))


if __name__ == "__main__":
    main()
