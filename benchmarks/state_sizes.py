"""How many bytes of state does each optimizer keep for models that people train?

    python -m benchmarks.state_sizes

Of the shapes of four models, by `describe`: nothing is allocated. Writes
`results/state_sizes.json`; seconds.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import apollo_optax
from benchmarks.rows import RESULTS, Row, read_rows, write_rows

OUTPUT = RESULTS / "state_sizes.json"
COMMAND = "python -m benchmarks.state_sizes"


class Shape(NamedTuple):
    """The sizes of a model of LLaMA's kind, from its published configuration."""

    layers: int
    width: int
    inner: int
    query: int
    key_value: int
    vocabulary: int
    tied: bool


MODELS = {
    "Gemma 3 270M": Shape(18, 640, 2048, 1024, 256, 262_144, tied=True),
    "SmolLM2 135M": Shape(30, 576, 1536, 576, 192, 49_152, tied=True),
    "Llama 3.2 1B": Shape(16, 2048, 8192, 2048, 512, 128_256, tied=True),
    "LLaMA 7B": Shape(32, 4096, 11_008, 4096, 4096, 32_000, tied=False),
}
_SMALL: dict[str, Any] = {"vocabulary": "factored"}
_MOMENTUM: dict[str, Any] = {"vocabulary": "factored_momentum"}
# By the model's width.
OPTIMIZERS: dict[str, Callable[[int], optax.GradientTransformation]] = {
    "AdamW": lambda width: optax.adamw(1e-3),
    "APOLLO, r = 1/4": lambda width: apollo_optax.apollo(1e-3, width // 4),
    "APOLLO-Mini": lambda width: apollo_optax.apollo_mini(1e-3),
    "APOLLO, r = 1/4, vocabulary factored": lambda width: apollo_optax.apollo(
        1e-3, width // 4, **_SMALL
    ),
    "APOLLO-Mini, vocabulary factored": lambda width: apollo_optax.apollo_mini(1e-3, **_SMALL),
    "SWAN, vocabulary factored with momentum": lambda width: apollo_optax.swan(1e-3, **_MOMENTUM),
    "SWAN, vocabulary factored": lambda width: apollo_optax.swan(1e-3),
}


def shapes(model: Shape) -> dict[str, Any]:
    """The parameters in float32, layers stacked."""
    width, inner = model.width, model.inner

    def dense(*sides: int) -> dict[str, Any]:
        return {"kernel": jax.ShapeDtypeStruct((model.layers, *sides), jnp.float32)}

    def norm(*sides: int) -> dict[str, Any]:
        return {"scale": jax.ShapeDtypeStruct((*sides, width), jnp.float32)}

    attention = {
        "q_proj": dense(width, model.query),
        "k_proj": dense(width, model.key_value),
        "v_proj": dense(width, model.key_value),
        "o_proj": dense(model.query, width),
    }
    mlp = {
        "gate_proj": dense(width, inner),
        "up_proj": dense(width, inner),
        "down_proj": dense(inner, width),
    }
    blocks = {
        "attention": attention,
        "mlp": mlp,
        "attention_norm": norm(model.layers),
        "mlp_norm": norm(model.layers),
    }
    table = {"embedding": jax.ShapeDtypeStruct((model.vocabulary, width), jnp.float32)}
    params = {"embed": table, "blocks": blocks, "norm": norm()}
    if not model.tied:
        head = jax.ShapeDtypeStruct((width, model.vocabulary), jnp.float32)
        params["lm_head"] = {"kernel": head}
    return params


def measure() -> list[Row]:
    """A row for each model and optimizer."""
    return [
        {
            "model": name,
            "optimizer": optimizer,
            "state_bytes": (
                described := apollo_optax.describe(shapes(model), make(model.width))
            ).state_bytes,
            "over_adamw": round(described.over_adamw, 6),
        }
        for name, model in MODELS.items()
        for optimizer, make in OPTIMIZERS.items()
    ]


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 else f"{100 * share:.2g}%"


def table(rows: Sequence[Row]) -> str:
    """Megabytes of state, and over AdamW's, in Markdown."""
    found = {(row["model"], row["optimizer"]): row for row in rows}
    lines = ["| optimizer | " + " | ".join(MODELS) + " |", "| --- |" + " ---: |" * len(MODELS)]
    for optimizer in OPTIMIZERS:
        cells = [
            f"{row['state_bytes'] / 1e6:,.1f} MB, {_percent(row['over_adamw'])}"
            for row in (found[model, optimizer] for model in MODELS)
        ]
        lines.append(f"| {optimizer} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Writes and prints the table."""
    write_rows(OUTPUT, COMMAND, measure())
    print(table(read_rows(OUTPUT)))


if __name__ == "__main__":
    main()
