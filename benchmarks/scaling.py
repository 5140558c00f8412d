"""How do step time, state and compile time of the update grow with matrices, layers and rank?

    python -m benchmarks.scaling

Compiles and times the update of a transformer of width 256 on this machine: 4, 32 and 128 layers,
each layer's matrices leaves of their own or stacked, with AdamW, APOLLO-Mini and APOLLO, and APOLLO
at ranks from 1 to 256. Writes `results/scaling.json`; some minutes.
"""

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
from benchmarks.rows import RESULTS, Row, read_rows, write_rows

OUTPUT = RESULTS / "scaling.json"
COMMAND = "python -m benchmarks.scaling"
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


def _params(layers: int, *, stacked: bool) -> dict[str, Any]:
    shapes = dict.fromkeys("qkvo", (WIDTH, WIDTH))
    shapes |= {"gate": (WIDTH, INTERMEDIATE), "up": (WIDTH, INTERMEDIATE)}
    shapes["down"] = (INTERMEDIATE, WIDTH)
    if stacked:
        return {name: jnp.full((layers, *shape), 0.01) for name, shape in shapes.items()}
    return {
        f"layer_{layer:03}": {name: jnp.full(shape, 0.01) for name, shape in shapes.items()}
        for layer in range(layers)
    }


def measure(name: str, layers: int, rank: int, *, stacked: bool) -> Row:
    """One row: seconds to trace, lower and compile; median seconds of a step; bytes of state."""
    optimizer, params = _optimizer(name, rank), _params(layers, stacked=stacked)
    state, grads = optimizer.init(params), jax.tree.map(jnp.copy, params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    began = time.perf_counter()
    step = update.lower(params, state, grads).compile()
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
        "compile_seconds": round(compile_seconds, 2),
        "step_seconds": round(statistics.median(seconds[1:]), 5),
        "state_bytes": state_bytes,
    }


def table(rows: Sequence[Row]) -> str:
    """Compile and step times over the number of layers, in Markdown."""
    lines = [
        "| optimizer | layers | matrices | compile, leaves apart | stacked | step, leaves apart "
        "| stacked | state |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    found = {(r["optimizer"], r["layers"], r["rank"], r["stacked"]): r for r in rows}
    for name in ("AdamW", "APOLLO-Mini", "APOLLO"):
        for layers in LAYERS:
            apart, stacked = (found[name, layers, RANK, stacked] for stacked in (False, True))
            label = f"{name}, r = {RANK}" if name == "APOLLO" else name
            cells = [label, str(layers), str(apart["matrices"])]
            cells += [f"{row['compile_seconds']:.1f} s" for row in (apart, stacked)]
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


def main() -> None:
    """Measures, writes and prints the tables."""
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
