"""What does one small accelerator need to train all of LLaMA-7B with APOLLO-Mini, layer by layer?

    JAX_PLATFORMS=cpu python -m benchmarks.peak_memory

Compiles the step for an A100 and a TPU v5e, with int8 and bfloat16 weights, at 256 and 2048 tokens,
and adds a row for each to `results/peak_memory.json`; about half an hour on two cores.
"""

import itertools
from collections.abc import Sequence

from benchmarks.plans import GIB, plan_missing, row_of
from benchmarks.rows import RESULTS, Row, read_rows
from examples.llama.optimizers import VocabularyName
from examples.llama.options import Weights
from examples.llama.plan import PlanConfig

OUTPUT = RESULTS / "peak_memory.json"
COMMAND = "JAX_PLATFORMS=cpu python -m benchmarks.peak_memory"
DEVICES = {"a100-80gb": "A100", "tpu-v5e": "TPU v5e"}
WEIGHTS: tuple[Weights, ...] = ("int8", "bf16")
SEQUENCES = (256, 2048)
VOCABULARIES: tuple[VocabularyName, ...] = ("factored", "adam")


def setting(device: str, weights: Weights, sequence: int, vocabulary: VocabularyName) -> PlanConfig:
    """The step of one cell of the table."""
    return PlanConfig(
        model="7b",
        device=device,
        optimizer="apollo_mini",
        weights=weights,
        update="layerwise",
        sequence=sequence,
        vocabulary=vocabulary,
    )


def table(rows: Sequence[Row]) -> str:
    """Peaks with a factored vocabulary, and with Adam's after a slash, in Markdown."""
    lines = [
        "| weights | their bytes | sequence | " + " | ".join(DEVICES.values()) + " |",
        "| --- | ---: | --- | " + " | ".join("---:" for _ in DEVICES) + " |",
    ]
    for weights, sequence in itertools.product(WEIGHTS, SEQUENCES):
        cells = []
        for device in DEVICES:
            factored, adam = (
                row_of(rows, setting(device, weights, sequence, vocabulary))
                for vocabulary in VOCABULARIES
            )
            floor = f"{factored['weight_bytes'] / GIB:.2f} GiB"
            cells.append(f"{factored['peak_bytes'] / GIB:.2f} / {adam['peak_bytes'] / GIB:.2f} GiB")
        lines.append(f"| {weights} | {floor} | 1 x {sequence} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Plans what has no row yet, and prints the table."""
    settings = [
        setting(device, weights, sequence, vocabulary)
        for vocabulary, device, weights, sequence in itertools.product(
            VOCABULARIES, DEVICES, WEIGHTS, SEQUENCES
        )
    ]
    plan_missing(OUTPUT, COMMAND, settings)
    print(table(read_rows(OUTPUT)))


if __name__ == "__main__":
    main()
