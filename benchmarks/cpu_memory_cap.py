"""How much memory does a training step really take, ordinary with AdamW and layer by layer?

    python -m benchmarks.cpu_memory_cap

Runs `pretrain` on this machine's CPU in processes of their own, a few steps of a model of 303
million parameters, and adds each process's largest resident size to
`results/cpu_memory_cap.json`; minutes. Prints the table of the documentation.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from benchmarks.rows import RESULTS, Row, add_row, read_rows

OUTPUT = RESULTS / "cpu_memory_cap.json"
COMMAND = "python -m benchmarks.cpu_memory_cap"
GIB = 2**30
COMMON = (
    "--model 350m --batch 1 --sequence 128 --steps 4 --evaluate-every 4 --evaluation-batches 1 "
    "--checkpoint-every 0 --sample-length 0"
)
RUNS = {
    "AdamW, float32, ordinary step": "--optimizer adamw --weights f32",
    "APOLLO-Mini, float32, ordinary step": "--optimizer apollo_mini --weights f32",
    "APOLLO-Mini, float32, layer by layer": (
        "--optimizer apollo_mini --weights f32 --update layerwise --project-embeddings"
    ),
    "APOLLO-Mini, bfloat16, layer by layer": (
        "--optimizer apollo_mini --weights bf16 --update layerwise --project-embeddings"
    ),
    "APOLLO-Mini, int8, layer by layer": (
        "--optimizer apollo_mini --weights int8 --update layerwise --project-embeddings"
    ),
}


def largest_resident_bytes(flags: str) -> int:
    """Trains with these flags in a process of its own; returns the peak of its resident size."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "examples.llama.pretrain", *COMMON.split(), *flags.split()]
        process = subprocess.Popen([*command, "--output", folder], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise RuntimeError(f"pretrain {flags} ended with status {status}")
    return usage.ru_maxrss * 1024


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    lines = ["| what is trained how | largest resident size |", "| --- | ---: |"]
    lines += [f"| {row['name']} | {row['resident_bytes'] / GIB:.2f} GiB |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    """Measures what has no row yet, and prints the table."""
    for name, flags in RUNS.items():
        if any(row["name"] == name for row in read_rows(OUTPUT)):
            continue
        row = {"name": name, "flags": f"{COMMON} {flags}"}
        add_row(OUTPUT, COMMAND, row | {"resident_bytes": largest_resident_bytes(flags)})
    print(table(read_rows(OUTPUT)))


if __name__ == "__main__":
    main()
