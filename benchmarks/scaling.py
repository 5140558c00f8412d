"""How do step time, state and compile time of the update grow with matrices, layers and rank?

    python -m benchmarks.scaling
    JAX_PLATFORMS=cpu python -m benchmarks.scaling --target tpu-v5e

Compiles and times the update of a transformer of width 256 on this machine: 4, 32 and 128 layers,
each layer's matrices leaves of their own or stacked, with AdamW, APOLLO-Mini and APOLLO, and APOLLO
at ranks from 1 to 256. Writes `results/scaling.json`; some minutes.

With a target, compiles the update of layers of LLaMA-7B apart for that chip, and writes
`results/compile_time.json`; a few minutes, with the [planning] extra.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import apollo_optax
from apollo_optax import ApolloDimensionNumbers
from apollo_optax.planning._plan import compile_update
from benchmarks.rows import RESULTS, Row, read_rows, write_rows
from examples.llama.config import MODELS

OUTPUT = RESULTS / "scaling.json"
COMMAND = "python -m benchmarks.scaling"
TARGET_OUTPUT = RESULTS / "compile_time.json"
TARGET_COMMAND = "JAX_PLATFORMS=cpu python -m benchmarks.scaling --target tpu-v5e"
WIDTH, INTERMEDIATE = 256, 688
LAYERS, RANKS = (4, 32, 128), (1, 4, 16, 64, 256)
RANK, _RANKS_LAYERS, _ROUNDS = 64, 8, 9
_LEARNING_RATE = 1e-3


def _optimizer(name: str, rank: int) -> optax.GradientTransformation:
    if name == "AdamW":
        return optax.adamw(_LEARNING_RATE)
    dimensions = ApolloDimensionNumbers(-2, -1)
    if name == "APOLLO-Mini":
        return apollo_optax.apollo_mini(_LEARNING_RATE, weight_dimension_numbers=dimensions)
    return apollo_optax.apollo(_LEARNING_RATE, rank, weight_dimension_numbers=dimensions)


def _params(
    layers: int, *, stacked: bool, width: int = WIDTH, intermediate: int = INTERMEDIATE
) -> dict[str, Any]:
    shapes = dict.fromkeys("qkvo", (width, width))
    shapes |= {"gate": (width, intermediate), "up": (width, intermediate)}
    shapes["down"] = (intermediate, width)
    if stacked:
        return {name: jnp.full((layers, *shape), 0.01) for name, shape in shapes.items()}
    return {
        f"layer_{layer:03}": {name: jnp.full(shape, 0.01) for name, shape in shapes.items()}
        for layer in range(layers)
    }


def measure(name: str, layers: int, rank: int, *, stacked: bool) -> Row:
    """One row: seconds to trace and lower, and to compile; median seconds of a step; state.

    `instructions` counts those of the compiled program: what most of XLA's time goes by.
    """
    optimizer, params = _optimizer(name, rank), _params(layers, stacked=stacked)
    state, grads = optimizer.init(params), jax.tree.map(jnp.copy, params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    began = time.perf_counter()
    lowered = update.lower(params, state, grads)
    lower_seconds = time.perf_counter() - began
    step = lowered.compile()
    compile_seconds = time.perf_counter() - began
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    seconds = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        params, state = jax.block_until_ready(step(params, state, grads))
        seconds.append(time.perf_counter() - began)
    return {
        "optimizer": name,
        "layers": layers,
        "stacked": stacked,
        "rank": rank,
        "matrices": 7 * layers,
        "lower_seconds": round(lower_seconds, 2),
        "compile_seconds": round(compile_seconds, 2),
        "instructions": (step.as_text() or "").count(" = "),
        "step_seconds": round(statistics.median(seconds[1:]), 5),
        "state_bytes": state_bytes,
    }


def table(rows: Sequence[Row]) -> str:
    """Compile and step times over the number of layers, in Markdown."""
    lines = [
        "| optimizer | layers | matrices | compile, leaves apart | of it tracing | instructions "
        "| compile, stacked | step, leaves apart | step, stacked | state |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    found = {(r["optimizer"], r["layers"], r["rank"], r["stacked"]): r for r in rows}
    for name in ("AdamW", "APOLLO-Mini", "APOLLO"):
        for layers in LAYERS:
            apart, stacked = (found[name, layers, RANK, stacked] for stacked in (False, True))
            label = f"{name}, r = {RANK}" if name == "APOLLO" else name
            cells = [label, str(layers), str(apart["matrices"])]
            cells += [f"{apart[field]:.1f} s" for field in ("compile_seconds", "lower_seconds")]
            cells += [f"{apart['instructions']:,}", f"{stacked['compile_seconds']:.1f} s"]
            cells += [f"{1e3 * row['step_seconds']:.1f} ms" for row in (apart, stacked)]
            cells.append(f"{stacked['state_bytes'] / 1e6:.2f} MB")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def rank_table(rows: Sequence[Row]) -> str:
    """APOLLO's compile time, step time and state over the rank, in Markdown."""
    lines = ["| rank | compile | step | state |", "| ---: | ---: | ---: | ---: |"]
    lines += [
        f"| {row['rank']} | {row['compile_seconds']:.1f} s | {1e3 * row['step_seconds']:.1f} ms | "
        f"{row['state_bytes'] / 1e6:.2f} MB |"
        for row in rows
        if row["layers"] == _RANKS_LAYERS
    ]
    return "\n".join(lines)


def _same_entries(key: jax.Array, refresh: jax.Array, rank: int, dim: int) -> jax.Array:
    """A projection that costs nothing: what is left is the price of all but the draw."""
    del refresh
    return jnp.full((rank, dim), 1e-9) * jax.random.key_data(key)[0].astype(jnp.float32)


TARGET_OPTIMIZERS = {
    "AdamW": optax.adamw(_LEARNING_RATE),
    "APOLLO-Mini": apollo_optax.apollo_mini(_LEARNING_RATE),
    "APOLLO, r = 256": apollo_optax.apollo(_LEARNING_RATE),
    "APOLLO, r = 256, Rademacher": apollo_optax.apollo(
        _LEARNING_RATE, projection=apollo_optax.rademacher
    ),
    "APOLLO, r = 256, nothing drawn": apollo_optax.apollo(_LEARNING_RATE, projection=_same_entries),
}
TARGET_LAYERS = (1, 2, 4)


def measure_target(name: str, layers: int, target: str) -> Row:
    """One row: seconds to trace, lower and compile for a chip, and instructions."""
    width, intermediate = MODELS["7b"].hidden_size, MODELS["7b"].intermediate_size
    params = jax.eval_shape(
        lambda: _params(layers, stacked=False, width=width, intermediate=intermediate)
    )
    began = time.perf_counter()
    compiled = compile_update(TARGET_OPTIMIZERS[name], params, target)
    return {
        "optimizer": name,
        "layers": layers,
        "matrices": 7 * layers,
        "target": target,
        "compile_seconds": round(time.perf_counter() - began, 1),
        "instructions": (compiled.as_text() or "").count(" = "),
    }


def target_table(rows: Sequence[Row]) -> str:
    """Compile times for a chip over the number of matrices, in Markdown."""
    matrices = [7 * layers for layers in TARGET_LAYERS]
    lines = [
        "| optimizer | " + " | ".join(f"{n} matrices" for n in matrices) + " |",
        "| --- | " + " | ".join("---:" for _ in matrices) + " |",
    ]
    found = {(row["optimizer"], row["matrices"]): row["compile_seconds"] for row in rows}
    for name in TARGET_OPTIMIZERS:
        cells = [f"{found[name, n]:.1f} s" for n in matrices]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measures, writes and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", help="a chip to compile for instead, such as tpu-v5e")
    if target := parser.parse_args().target:
        measure_target("AdamW", 1, target)  # the compiler's own start
        rows = [
            measure_target(name, layers, target)
            for layers in TARGET_LAYERS
            for name in TARGET_OPTIMIZERS
        ]
        write_rows(TARGET_OUTPUT, TARGET_COMMAND, rows)
        print(target_table(rows))
        return
    rows = [
        measure(name, layers, RANK, stacked=stacked)
        for layers in LAYERS
        for name in ("AdamW", "APOLLO-Mini", "APOLLO")
        for stacked in (False, True)
    ]
    rows += [measure("APOLLO", _RANKS_LAYERS, rank, stacked=True) for rank in RANKS]
    write_rows(OUTPUT, COMMAND, rows)
    print(table(read_rows(OUTPUT)))
    print(rank_table(read_rows(OUTPUT)))


if __name__ == "__main__":
    main()
