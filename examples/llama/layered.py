"""LLaMA as the three functions of a layer-wise step, whose parameters are blocks and the rest."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from apollo_optax import layerwise
from examples.llama import model
from examples.llama.config import LlamaConfig

__all__ = ["join_params", "layered_model", "mean_token_loss", "split_params"]


def split_params(params: model.Params) -> model.Params:
    """Returns the parameters of `model.init_params` as `{"blocks": stacked, "rest": ...}`."""
    return {"blocks": params["blocks"], "rest": {k: v for k, v in params.items() if k != "blocks"}}


def join_params(parts: model.Params) -> model.Params:
    """Undoes `split_params`.

    >>> join_params(split_params({"blocks": 1, "norm": 2})) == {"blocks": 1, "norm": 2}
    True
    """
    return {"blocks": parts["blocks"], **parts["rest"]}


def layered_model(
    config: LlamaConfig,
    *,
    dtype: DTypeLike,
    tokens_at_once: int = 512,
    heads_at_once: int | None = None,
) -> layerwise.LayerwiseModel:
    """Returns LLaMA as the three functions of `apollo_optax.layerwise`.

    Args:
      config: The model's shape.
      dtype: Dtype of the matrix products.
      tokens_at_once: Tokens whose logits exist at one time, where it divides a batch.
      heads_at_once: Heads whose attention weights exist at one time; None for all.

    Returns:
      Functions of batches of tokens, int32 `(batch, sequence + 1)`.
    """

    def embed(rest: model.Params, tokens: Int[Array, "batch sequence_and_next"]) -> model.Hidden:
        return model.embed(config, rest, tokens[:, :-1], dtype)

    def loss(
        rest: model.Params, x: model.Hidden, tokens: Int[Array, "batch sequence_and_next"]
    ) -> Float[Array, ""]:
        return mean_token_loss(config, rest, x, tokens[:, 1:], tokens_at_once)

    block = functools.partial(model.block, config, heads_at_once=heads_at_once)
    return layerwise.LayerwiseModel(embed, block, loss)


def mean_token_loss(
    config: LlamaConfig,
    rest: model.Params,
    x: model.Hidden,
    targets: Int[Array, "batch sequence"],
    tokens_at_once: int,
) -> Float[Array, ""]:
    """Returns the mean loss of a token, in nats; logits exist for `tokens_at_once` at a time."""
    if targets.size <= tokens_at_once or targets.size % tokens_at_once:
        return jnp.mean(model.cross_entropy(model.logits(config, rest, x), targets))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def chunk_loss(rest: model.Params, x: Array, targets: Array) -> Float[Array, ""]:
        logits = model.logits(config, rest, x[None])
        return jnp.sum(model.cross_entropy(logits, targets[None]))

    def add(total: Array, chunk: tuple[Array, Array]) -> tuple[Array, None]:
        return total + chunk_loss(rest, *chunk), None

    chunks = x.reshape(-1, tokens_at_once, x.shape[-1]), targets.reshape(-1, tokens_at_once)
    total, _ = jax.lax.scan(add, jnp.zeros([], jnp.float32), chunks)
    return total / targets.size
