"""LoRA (Hu et al., 2021), by qwix: what users weigh against training all parameters.

The matrices of the blocks stay as they are. Each has two thin ones beside it, which are trained,
and whose product, times a factor, is added to it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import qwix
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from examples.llama import model, train
from examples.llama.bad_steps import Outcome, skip_bad_steps
from examples.llama.config import LlamaConfig

__all__ = ["init_lora", "lora_training", "merged"]

_ALPHA_OVER_RANK = 2.0


def _make_block(config: LlamaConfig, rank: int, dtype: DTypeLike, rngs: nnx.Rngs) -> model.Block:
    block = model.Block(config, param_dtype=jnp.float32, dtype=dtype, rngs=rngs)
    provider = qwix.LoraProvider(module_path=".*_proj", rank=rank, alpha=_ALPHA_OVER_RANK * rank)
    x = jnp.zeros((1, 1, config.hidden_size), dtype)
    return qwix.apply_lora_to_model(block, provider, x, rngs=rngs)


def init_lora(config: LlamaConfig, rank: int, seed: int) -> model.Params:
    """Returns the thin matrices before the first step, float32, as `{"blocks": stacked}`.

    The first of each pair is drawn, the second is zero, so that the model is what it was.
    """

    def layer(key: Array) -> model.Params:
        block = _make_block(config, rank, jnp.float32, nnx.Rngs(key))
        return nnx.to_pure_dict(nnx.state(block, nnx.LoRAParam))

    keys = jax.random.split(jax.random.key(seed), config.num_layers)
    return {"blocks": jax.jit(lambda keys: jax.lax.map(layer, keys))(keys)}


def merged(params: PyTree) -> model.Params:
    """Returns the parameters of a model without LoRA that computes the same.

    Args:
      params: Of `lora_training`.
    """

    def with_product(frozen: Any, lora: Any) -> Any:
        if "kernel_lora_a" not in lora:
            return frozen | {name: with_product(frozen[name], lora[name]) for name in lora}
        a, b = lora["kernel_lora_a"], lora["kernel_lora_b"]
        kernel = frozen["kernel"]
        added = _ALPHA_OVER_RANK * jnp.einsum("lir,lro->lio", a, b)
        return frozen | {"kernel": (kernel + added).astype(kernel.dtype)}

    frozen = params["frozen"]
    return frozen | {"blocks": with_product(frozen["blocks"], params["lora"]["blocks"])}


def lora_training(
    config: LlamaConfig,
    tx: optax.GradientTransformation,
    *,
    rank: int,
    dtype: DTypeLike,
    remat: bool = False,
    micro_batches: int = 1,
    seed: int = 0,
    spike_limit: float | None = None,
) -> train.Training:
    """Returns training of LoRA beside every linear layer of the blocks.

    Args:
      config: The model's shape.
      tx: The optimizer of the thin matrices.
      rank: Their number of columns, or of rows. The factor is 2, which is alpha over rank.
      dtype: Dtype of the matrix products.
      remat: As in `make_loss`.
      micro_batches: As in `make_train_step`.
      seed: Of the first draw.
      spike_limit: As in `standard_training`.

    Returns:
      Training whose parameters are `{"frozen": params, "lora": thin matrices}`.
    """
    tx = tx if spike_limit is None else skip_bad_steps(tx, spike_limit)
    block = nnx.eval_shape(lambda: _make_block(config, rank, dtype, nnx.Rngs(0)))
    graphdef = nnx.graphdef(block)

    def apply(layer: tuple[model.Params, model.Params], x: model.Hidden) -> model.Hidden:
        lora, frozen = layer
        return nnx.merge(graphdef, jax.tree.map(lambda w: w.astype(x.dtype), lora), frozen)(x)

    def forward(
        params: PyTree, tokens: Int[Array, "batch sequence"]
    ) -> Float[Array, "batch sequence vocab"]:
        frozen = params["frozen"]
        layers = (params["lora"]["blocks"], frozen["blocks"])
        x = model.embed(config, frozen, tokens, dtype)
        x = model.scan_layers(apply, layers, x, remat=remat)
        return model.logits(config, frozen, x)

    loss = train.loss_of(forward)

    def init_state(params: model.Params) -> train.TrainState:
        state = train.init_state(tx, init_lora(config, rank, seed))
        return state._replace(params={"frozen": params, "lora": state.params})

    def train_step(
        state: train.TrainState, tokens: train.Tokens
    ) -> tuple[train.TrainState, Outcome]:
        frozen = state.params["frozen"]
        step = train.make_train_step(
            lambda lora, tokens: loss({"frozen": frozen, "lora": lora}, tokens),
            tx,
            micro_batches=micro_batches,
        )
        state, outcome = step(state._replace(params=state.params["lora"]), tokens)
        return state._replace(params={"frozen": frozen, "lora": state.params}), outcome

    return train.Training(
        train.unchanged,
        init_state,
        jax.jit(train_step, donate_argnums=0),
        loss,
        forward,
        merged,
    )
