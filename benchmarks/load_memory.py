"""How much of the host's memory does it take to load a checkpoint, and to export it again?

    python -m benchmarks.load_memory

Writes a bfloat16 checkpoint of 368 million parameters and lets `pretrain` read and export it, in a
process of its own for each dtype of the weights. The peaks are those of the resident size above
what the process had before. That of loading has the weights themselves in it, since the device is
the CPU. Writes `results/load_memory.json`; a minute. Linux.
"""

import argparse
import contextlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks.rows import RESULTS, Row, write_rows
from examples.llama.config import MODELS, parameter_count
from examples.llama.huggingface import describe_llama, save_llama
from examples.llama.layered import split_params
from examples.llama.machine import return_freed_memory
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


def peak_bytes(folder: Path, weights: str) -> tuple[int, int]:
    """Loads and exports in this process; returns by how much its resident size grew in each."""
    update = "layerwise" if weights == "int8" else "standard"
    config = PretrainConfig(
        model=ModelOptions(load=folder),
        training=TrainingOptions(weights=weights, update=update),  # type: ignore[arg-type]
    )
    settings = resolve(config, "apollo_mini", describe_llama(folder), data="none", text_digest="")
    run = Run(settings, folder, resume=False)
    jnp.zeros(1).block_until_ready()
    with _growth() as of_loading:
        params = jax.block_until_ready(initial_params(run))
    trained = split_params(params) if weights == "int8" else params
    with _growth() as of_exporting:
        floats = run.training.float_params
        save_llama(folder / "exported", settings.model, trained, floats=floats, like=folder)
    return of_loading[0], of_exporting[0]


@contextlib.contextmanager
def _growth() -> Iterator[list[int]]:
    grown: list[int] = []
    return_freed_memory()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _resident_bytes("VmRSS")
    yield grown
    grown.append(_resident_bytes("VmHWM") - before)


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    lines = [
        "| weights | peak while loading | of the checkpoint's size | bytes per parameter "
        "| more while exporting |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        loading = row["loading_bytes"]
        lines.append(
            f"| {row['weights']} | {loading / 2**30:.2f} GiB "
            f"| {loading / row['checkpoint_bytes']:.2f} "
            f"| {loading / row['parameters']:.2f} | {row['exporting_bytes'] / 2**30:.2f} GiB |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures every dtype and prints the table of the documentation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "WEIGHTS"), help=argparse.SUPPRESS)
    child = parser.parse_args().child
    if child:
        print(*peak_bytes(Path(child[0]), child[1]))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        save_llama(folder, MODEL, init_params(MODEL, 0, param_dtype=jnp.bfloat16))
        checkpoint_bytes = (Path(folder) / "model.safetensors").stat().st_size
        for weights in ("bf16", "int8", "f32"):
            command = [sys.executable, "-m", "benchmarks.load_memory", "--child", folder, weights]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            row = {"weights": weights, "parameters": parameter_count(MODEL)}
            loading, exporting = map(int, said.split())
            row |= {"checkpoint_bytes": checkpoint_bytes}
            row |= {"loading_bytes": loading, "exporting_bytes": exporting}
            rows.append(row)
    write_rows(OUTPUT, COMMAND, rows)
    print(table(rows))


if __name__ == "__main__":
    main()
