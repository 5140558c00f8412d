"""LLaMA as the three functions of a layer-wise step, whose parameters are blocks and the rest."""

import functools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from apollo_optax import layerwise, quantization
from examples.llama import mesh, model
from examples.llama.bad_steps import Outcome, judged, max_loss, new_state
from examples.llama.config import LlamaConfig
from examples.llama.train import Rounding, Tokens, Training, TrainState, in_float32, unchanged

__all__ = [
    "join_params",
    "layered_model",
    "layered_training",
    "mean_token_loss",
    "split_params",
    "weight_format",
]


_ATTENTION_BYTES = 2**27
_LOGIT_BYTES = 2**26


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
    tokens_at_once: int | None = None,
    heads_at_once: int | None = None,
) -> layerwise.LayerwiseModel:
    """Returns LLaMA as the three functions of `apollo_optax.layerwise`.

    Args:
      config: The model's shape.
      dtype: Dtype of the matrix products.
      tokens_at_once: Tokens of a device whose logits exist at one time, at least one a sequence.
        None for as many as take 64 MiB in float32, at most 512.
      heads_at_once: Heads whose attention weights exist at one time; None for as many as take
        128 MiB a sequence.

    Returns:
      Functions of batches of tokens, int32 `(batch, sequence + 1)`.
    """

    def embed(rest: model.Params, tokens: Int[Array, "batch sequence_and_next"]) -> model.Hidden:
        return model.embed(config, rest, model.token_ids(tokens[:, :-1]), dtype)

    def loss(
        rest: model.Params, x: model.Hidden, tokens: Int[Array, "batch sequence_and_next"]
    ) -> Float[Array, ""]:
        at_once = tokens_at_once or min(512, _LOGIT_BYTES // (4 * config.vocab_size))
        return mean_token_loss(config, rest, x, tokens[:, 1:], at_once)

    def block(block_params: model.Params, x: model.Hidden) -> model.Hidden:
        heads = heads_at_once or _heads_within(_ATTENTION_BYTES, config, x.shape[1])
        return model.block(config, block_params, x, heads_at_once=heads)

    return layerwise.LayerwiseModel(embed, block, loss)


def _heads_within(attention_bytes: int, config: LlamaConfig, sequence: int) -> int:
    """The largest group of heads whose float32 attention weights take no more, at least one."""
    groups = [
        groups
        for groups in range(1, config.num_kv_heads + 1)
        if config.num_kv_heads % groups == 0
        and config.num_heads // groups * sequence**2 * 4 <= attention_bytes
    ]
    return config.num_heads // min(groups, default=config.num_kv_heads)


def weight_format(
    weights: Literal["f32", "bf16", "int8"],
    *,
    dtype: DTypeLike,
    rounding: Rounding = "stochastic",
) -> layerwise.WeightFormat:
    """Returns how a layer-wise step reads and writes weights that are kept as `weights`.

    float32 is added to; bfloat16 and int8 are rounded, stochastically unless for comparison. int8
    is read as `dtype`.
    """
    if weights == "f32":
        return layerwise.EXACT
    write = functools.partial(quantization.apply_updates, rounding=rounding)
    if weights == "bf16":
        return layerwise.EXACT._replace(write=write)
    read = functools.partial(quantization.dequantize, dtype=dtype)
    return layerwise.WeightFormat(read, write)


def layered_training(
    config: LlamaConfig,
    tx: optax.GradientTransformation,
    *,
    weights: Literal["f32", "bf16", "int8"],
    dtype: DTypeLike,
    seed: int = 0,
    rounding: Rounding = "stochastic",
    float32_moments: bool = False,
    spike_limit: float | None = None,
) -> Training:
    """Returns training layer by layer: no gradient of the whole model exists.

    Args:
      config: The model's shape.
      tx: An optimizer that `layerwise.init` accepts.
      weights: How the weights are kept; int8 in groups of 128.
      dtype: Dtype of the matrix products.
      seed: Seed of the stochastic rounding.
      rounding: Of bfloat16 and int8 weights; "nearest" loses small updates, and is there to compare
        with.
      float32_moments: Whether the optimizer is run `in_float32`, which costs a float32 gradient of
        a layer. APOLLO's moments are float32 without it.
      spike_limit: Skips bad steps as `skip_bad_steps` does. But if gradients are not finite, the
        layers before them in the backward pass are updated already; `Outcome.moved` counts them.

    Returns:
      Training whose parameters are those of `split_params`, the matrices quantized if int8.
    """
    layered = layered_model(config, dtype=dtype)
    tx = in_float32(tx) if float32_moments else tx
    written = weight_format(weights, dtype=dtype, rounding=rounding)
    plain_step = layerwise.make_step(layered, tx, weights=written)
    guarded_step = layerwise.make_guarded_step(layered, tx, weights=written)

    def init_state(params: model.Params) -> TrainState:
        parts = split_params(params)
        opt_state = layerwise.init(tx, parts, weights=written)
        opt_state = opt_state if spike_limit is None else new_state(opt_state)
        return TrainState(jnp.zeros([], jnp.int32), parts, opt_state)

    def train_step(state: TrainState, tokens: Tokens) -> tuple[TrainState, Outcome]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        if spike_limit is None:
            params, opt_state, loss = plain_step(state.params, state.opt_state, tokens, key)
            return TrainState(state.step + 1, params, opt_state), Outcome(loss)
        before = state.opt_state
        params, inner_state, loss, report = guarded_step(
            state.params, before.inner_state, tokens, key, max_loss(before, spike_limit)
        )
        after = judged(before, loss, report.largest, spike_limit=spike_limit)
        outcome = Outcome(loss, after.cause, report.moved, report.parts)
        after = after._replace(inner_state=inner_state)
        return TrainState(state.step + 1, params, after), outcome

    def float_params(params: PyTree) -> model.Params:
        return join_params(quantization.dequantize(params))

    def logits(
        params: PyTree, tokens: Int[Array, "batch sequence"]
    ) -> Float[Array, "batch sequence vocab"]:
        headed = layered._replace(
            embed=lambda rest, tokens: model.embed(config, rest, tokens, dtype),
            loss=lambda rest, x, _: model.logits(config, rest, x),
        )
        return layerwise.make_loss(headed, weights=written)(params, tokens)

    return Training(
        quantization.quantize if weights == "int8" else unchanged,
        init_state,
        jax.jit(train_step, donate_argnums=0),
        layerwise.make_loss(layered, weights=written),
        logits,
        float_params,
    )


def mean_token_loss(
    config: LlamaConfig,
    rest: model.Params,
    x: model.Hidden,
    targets: Int[Array, "batch sequence"],
    tokens_at_once: int,
) -> Float[Array, ""]:
    """Returns the mean loss of a target, in nats; those below zero are none.

    Logits exist for `tokens_at_once` at a time on a device, or for one of each sequence.
    """
    batch, length = targets.shape
    chunk = _tokens_of_a_sequence(batch, length, tokens_at_once)
    number = jnp.sum(targets >= 0)

    def summed_loss(rest: model.Params, x: Array, targets: Array) -> Float[Array, ""]:
        losses = model.cross_entropy(model.logits(config, rest, x), model.token_ids(targets))
        return jnp.sum(jnp.where(targets >= 0, losses, 0.0))

    if chunk == length:
        return summed_loss(rest, x, targets) / number
    chunk_loss = jax.checkpoint(summed_loss, prevent_cse=False)

    def add(total: Array, chunk: Sequence[Array]) -> tuple[Array, None]:
        return total + chunk_loss(rest, *chunk), None

    # Along the sequence, since the batch may be divided among devices.
    chunks = [jnp.moveaxis(a.reshape(batch, -1, chunk, *a.shape[2:]), 1, 0) for a in (x, targets)]
    total, _ = jax.lax.scan(add, jnp.zeros([], jnp.float32), tuple(chunks))
    return total / number


def _tokens_of_a_sequence(batch: int, length: int, tokens_at_once: int) -> int:
    """The largest part of a sequence whose share of a device's batch is within the limit."""
    sequences = max(1, batch // mesh.devices_dividing_batch(jax.sharding.get_abstract_mesh().shape))
    return max(
        part
        for part in range(1, length + 1)
        if length % part == 0 and (part == 1 or sequences * part <= tokens_at_once)
    )
