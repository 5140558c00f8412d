"""What does a projection cost by our generator, and by `jax.random`?

    python -m benchmarks.generator

Draws the projections of 28 matrices at once, as the update does, by both generators in turn. Writes
`results/generator.json`: medians of the milliseconds of a draw, and the seconds to compile it. A
minute.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from apollo_optax import gaussian, rademacher
from benchmarks.rows import RESULTS, Row, write_rows

OUTPUT = RESULTS / "generator.json"
COMMAND = "python -m benchmarks.generator"
MATRICES, DIM, RANKS, ROUNDS = 28, 512, (1, 128), 31


def _jax_gaussian(key: jax.Array, refresh: jax.Array, rank: int, dim: int) -> jax.Array:
    return jax.random.normal(jax.random.fold_in(key, refresh), (rank, dim)) * rank**-0.5


def _jax_rademacher(key: jax.Array, refresh: jax.Array, rank: int, dim: int) -> jax.Array:
    """Of single bits: `jax.random.rademacher` draws a word for each."""
    words = jax.random.bits(jax.random.fold_in(key, refresh), (-(-rank // 32), dim), jnp.uint32)
    bits = (words[:, None, :] >> jnp.arange(32, dtype=jnp.uint32)[None, :, None]) & 1
    return jnp.where(bits.reshape(-1, dim)[:rank] == 1, rank**-0.5, -(rank**-0.5))


DRAWS: dict[tuple[str, str], Callable[..., jax.Array]] = {
    ("gaussian", "apollo_optax"): gaussian,
    ("gaussian", "jax.random"): _jax_gaussian,
    ("rademacher", "apollo_optax"): rademacher,
    ("rademacher", "jax.random"): _jax_rademacher,
}


def measure(rank: int) -> list[Row]:
    """A row for each projection and generator, timed in turn."""
    keys, refresh = jax.random.split(jax.random.key(0), MATRICES), jnp.int32(3)
    compiled: dict[tuple[str, str], Any] = {}
    rows: dict[tuple[str, str], Row] = {}
    for name, draw in DRAWS.items():

        def program(keys: jax.Array, refresh: jax.Array, draw: Any = draw) -> jax.Array:
            return jax.vmap(lambda key: draw(key, refresh, rank, DIM))(keys)

        start = time.perf_counter()
        compiled[name] = jax.jit(program).lower(keys, refresh).compile()
        rows[name] = {
            **dict(zip(("projection", "generator"), name, strict=True)),
            **{"rank": rank, "dim": DIM, "matrices": MATRICES},
            "compile_seconds": round(time.perf_counter() - start, 2),
        }
    seconds: dict[tuple[str, str], list[float]] = {name: [] for name in DRAWS}
    for _ in range(ROUNDS):
        for name, program in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(program(keys, refresh))
            seconds[name].append(time.perf_counter() - start)
    for name, row in rows.items():
        row["milliseconds"] = round(1000 * statistics.median(seconds[name]), 3)
    return list(rows.values())


def main() -> None:
    """Measures both generators at every rank."""
    rows = [row for rank in RANKS for row in measure(rank)]
    write_rows(OUTPUT, COMMAND, rows)
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
