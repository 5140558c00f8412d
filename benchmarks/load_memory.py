"""How much of the host's memory does it take to load a checkpoint?

    python -m benchmarks.load_memory

Writes a bfloat16 checkpoint of 303 million parameters and lets `pretrain --load` read it, in a
process of its own for each dtype of the weights. The peak is that of the resident size above what
the process had before, and has the weights themselves in it, since the device is the CPU. Writes
`results/load_memory.json`; a minute. Linux.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks.rows import RESULTS, Row, write_rows
from examples.llama.config import MODELS, parameter_count
from examples.llama.huggingface import describe_llama, save_llama
from examples.llama.model import init_params
from examples.llama.options import ModelOptions, PretrainConfig, TrainingOptions, resolve
from examples.llama.run import Run, initial_params

OUTPUT = RESULTS / "load_memory.json"
COMMAND = "python -m benchmarks.load_memory"
MODEL = MODELS["350m"]
_STATUS = Path("/proc/self/status")


def _resident_bytes(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", _STATUS.read_text())
    if found is None:
        raise RuntimeError(f"{_STATUS} has no {field}; this benchmark needs Linux")
    return 1024 * int(found[1])


def peak_bytes_of_loading(folder: Path, weights: str) -> int:
    """Loads in this process; returns the peak of its resident size above that of before."""
    update = "layerwise" if weights == "int8" else "standard"
    config = PretrainConfig(
        model=ModelOptions(load=folder),
        training=TrainingOptions(weights=weights, update=update),  # type: ignore[arg-type]
    )
    settings = resolve(config, "apollo_mini", describe_llama(folder), data="none", text_digest="")
    jnp.zeros(1).block_until_ready()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _resident_bytes("VmRSS")
    params = initial_params(Run(settings, folder, resume=False))
    jax.block_until_ready(params)
    return _resident_bytes("VmHWM") - before


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    lines = [
        "| weights | peak while loading | of the checkpoint's size | bytes per parameter |",
        "| --- | ---: | ---: | ---: |",
    ]
    for row in rows:
        peak_bytes = row["peak_bytes"]
        lines.append(
            f"| {row['weights']} | {peak_bytes / 2**30:.2f} GiB "
            f"| {peak_bytes / row['checkpoint_bytes']:.2f} "
            f"| {peak_bytes / row['parameters']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures every dtype and prints the table of the documentation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "WEIGHTS"), help=argparse.SUPPRESS)
    child = parser.parse_args().child
    if child:
        print(peak_bytes_of_loading(Path(child[0]), child[1]))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        save_llama(folder, MODEL, init_params(MODEL, 0, param_dtype=jnp.bfloat16))
        checkpoint_bytes = (Path(folder) / "model.safetensors").stat().st_size
        for weights in ("bf16", "int8", "f32"):
            command = [sys.executable, "-m", "benchmarks.load_memory", "--child", folder, weights]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            row = {"weights": weights, "parameters": parameter_count(MODEL)}
            row |= {"checkpoint_bytes": checkpoint_bytes, "peak_bytes": int(said)}
            rows.append(row)
    write_rows(OUTPUT, COMMAND, rows)
    print(table(rows))


if __name__ == "__main__":
    main()
