"""What does a matrix product of lower precision cost the factors of APOLLO?

    python -m benchmarks.projection_precision

On TPUs JAX's default rounds the entries of P and G to bfloat16 before R = P G and accumulates in
float32. This rounds them on any machine, and compares the first step's factors with those of exact
entries. Writes `results/projection_precision.json`; seconds.
"""

import jax
import jax.numpy as jnp

from apollo_optax import gaussian
from benchmarks.rows import RESULTS, Row, write_rows

OUTPUT = RESULTS / "projection_precision.json"
COMMAND = "python -m benchmarks.projection_precision"
DIM, CHANNELS, MATRICES = 512, 2048, 8
RANKS = (1, 16, 128)


def _factors(P: jax.Array, G: jax.Array, *, tensor: bool) -> jax.Array:
    R = P @ G
    R_tilde = R / (jnp.abs(R) + 1e-8)
    axes = None if tensor else 0
    norms = (jnp.sqrt(jnp.sum(jnp.square(x), axis=axes)) for x in (R_tilde, R))
    return next(norms) / (next(norms) + 1e-8)


def measure(rank: int, *, tensor: bool) -> Row:
    """A row: the median and the largest relative difference of a factor."""
    differences = []
    for seed in range(MATRICES):
        key, key_of_P = jax.random.split(jax.random.key(seed))
        G = 1e-3 * jax.random.normal(key, (DIM, CHANNELS))
        P = gaussian(key_of_P, 0, rank, DIM)
        exact = _factors(P, G, tensor=tensor)
        rounded = (x.astype(jnp.bfloat16).astype(jnp.float32) for x in (P, G))
        differences.append(jnp.ravel(jnp.abs(_factors(*rounded, tensor=tensor) / exact - 1)))
    of_all = jnp.concatenate(differences)
    return {
        "rank": rank,
        "granularity": "tensor" if tensor else "channel",
        "dim": DIM,
        "channels": CHANNELS,
        "matrices": MATRICES,
        "median_difference": float(jnp.median(of_all)),
        "largest_difference": float(jnp.max(of_all)),
    }


def main() -> None:
    """Measures, writes and prints the rows."""
    rows = [measure(1, tensor=True), *(measure(rank, tensor=False) for rank in RANKS)]
    write_rows(OUTPUT, COMMAND, rows)
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
