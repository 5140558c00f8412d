"""One optimizer step and the evaluation of a LLaMA, as pure jitted functions."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32, PyTree

import apollo_optax
from examples.llama import model
from examples.llama.bad_steps import Outcome, skip_bad_steps
from examples.llama.config import LlamaConfig

__all__ = [
    "Rounding",
    "TrainState",
    "Training",
    "in_float32",
    "init_state",
    "loss_of",
    "make_loss",
    "make_train_step",
    "mean_loss",
    "standard_training",
    "unchanged",
]

Tokens = Int32[Array, "batch sequence_and_next"]
Rounding = Literal["stochastic", "nearest"]
LossFunction = Callable[[model.Params, Any], Float[Array, ""]]
LogitsFunction = Callable[[PyTree, Int32[Array, "batch sequence"]], Float[Array, "..."]]


class TrainState(NamedTuple):
    """What a step reads and writes.

    Attributes:
      step: Optimizer steps done, int32 scalar.
      params: The parameters, in the form that `Training` keeps them in.
      opt_state: The optimizer's state; a `SkipState` where bad steps are skipped.
    """

    step: Int32[Array, ""]
    params: PyTree
    opt_state: optax.OptState


class Training(NamedTuple):
    """A way to train: with a gradient of the whole model, or layer by layer.

    Attributes:
      keep: Turns float parameters, one layer's or all others', into the format they are trained
        in; what `model.init_params` takes as `convert`.
      init_state: Makes the state before the first step of the parameters that result.
      step: The jitted step, `(state, int32 (batch, sequence + 1)) -> (state, Outcome)`. It takes
        over the memory of the state it is given.
      loss: `(state.params, tokens) -> float32 scalar`, to evaluate with.
      logits: `(state.params, int32 (batch, sequence)) -> float32 (batch, sequence, vocab)`.
      float_params: Turns `state.params` into what `model.forward` takes.
    """

    keep: Callable[[model.Params], model.Params]
    init_state: Callable[[model.Params], TrainState]
    step: jax.stages.Wrapped
    loss: LossFunction
    logits: LogitsFunction
    float_params: Callable[[PyTree], model.Params]


def standard_training(
    config: LlamaConfig,
    tx: optax.GradientTransformation,
    *,
    dtype: DTypeLike,
    remat: bool = False,
    micro_batches: int = 1,
    seed: int = 0,
    float32_moments: bool = True,
    rounding: Rounding = "stochastic",
    spike_limit: float | None = None,
) -> Training:
    """Returns training with a gradient of the whole model; see `make_loss`, `make_train_step`.

    With `float32_moments` the optimizer is run `in_float32`, with a `spike_limit` bad steps are
    skipped as by `skip_bad_steps`.
    """
    tx = in_float32(tx) if float32_moments else tx
    tx = tx if spike_limit is None else skip_bad_steps(tx, spike_limit)
    loss = make_loss(config, dtype=dtype, remat=remat)
    step = make_train_step(loss, tx, micro_batches=micro_batches, seed=seed, rounding=rounding)
    init = functools.partial(init_state, tx)
    logits = functools.partial(model.forward, config, dtype=dtype)
    return Training(unchanged, init, step, loss, logits, unchanged)


def unchanged(params: model.Params) -> model.Params:
    """Returns what it is given; the same function each time, for jit's sake."""
    return params


def in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Shows `tx` weights and gradients in float32, whatever they are kept in.

    Optax's moments have the weights' dtype. In bfloat16 a second moment cannot follow: what a step
    adds to it is less than half of its last bit.
    """
    inner = optax.with_extra_args_support(tx)

    def to_float32(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def init(params: PyTree) -> optax.OptState:
        return inner.init(to_float32(params))

    def update(
        updates: PyTree, state: optax.OptState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, optax.OptState]:
        params = None if params is None else to_float32(params)
        return inner.update(to_float32(updates), state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)


def init_state(tx: optax.GradientTransformation, params: model.Params) -> TrainState:
    """Returns the state before the first step."""
    return TrainState(jnp.zeros([], jnp.int32), params, jax.jit(tx.init)(params))


def make_loss(config: LlamaConfig, *, dtype: DTypeLike, remat: bool) -> LossFunction:
    """Returns the function of parameters and tokens that is the mean loss of a token, in nats.

    Args:
      config: The model's shape.
      dtype: Dtype of the matrix products.
      remat: Whether the backward pass recomputes the blocks' activations.

    Returns:
      As `loss_of` does.
    """
    return loss_of(functools.partial(model.forward, config, dtype=dtype, remat=remat))


def loss_of(logits: LogitsFunction) -> LossFunction:
    """Returns the function of parameters and tokens that is the mean loss of a token, in nats.

    Args:
      logits: A function of parameters and tokens.

    Returns:
      `(params, int32 (batch, sequence + 1)) -> float32 scalar`. A token `~id`, below zero, is
      read as `id` and is no target.
    """

    def loss(params: PyTree, tokens: Tokens) -> Float[Array, ""]:
        ids = model.token_ids(tokens)
        is_target = tokens[:, 1:] >= 0
        losses = model.cross_entropy(logits(params, ids[:, :-1]), ids[:, 1:])
        return jnp.sum(jnp.where(is_target, losses, 0.0)) / jnp.sum(is_target)

    return loss


def make_train_step(
    loss: LossFunction,
    tx: optax.GradientTransformation,
    *,
    micro_batches: int = 1,
    seed: int = 0,
    rounding: Rounding = "stochastic",
) -> jax.stages.Wrapped:
    """Returns the jitted step. It takes over the memory of the state it is given.

    Args:
      loss: Mean loss of a batch.
      tx: The optimizer.
      micro_batches: Into how many parts the batch is divided, whose gradients are summed one after
        another in float32; divides the batch.
      seed: Seed of the stochastic rounding of bfloat16 weights.
      rounding: Of bfloat16 weights; "nearest" loses small updates, and is there to compare with.

    Returns:
      `(state, int32 (batch, sequence + 1)) -> (state, Outcome)`.
    """
    update = optax.with_extra_args_support(tx).update

    def train_step(state: TrainState, tokens: Tokens) -> tuple[TrainState, Outcome]:
        value, grads = _value_and_grad(loss, state.params, tokens, micro_batches)
        updates, opt_state = update(grads, state.opt_state, state.params, value=value)
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        if rounding == "stochastic":
            params = apollo_optax.apply_updates_stochastic(state.params, updates, key)
        else:
            params = optax.apply_updates(state.params, updates)
        outcome = Outcome(value, optax.tree.get(opt_state, "cause"))
        return TrainState(state.step + 1, params, opt_state), outcome

    return jax.jit(train_step, donate_argnums=0)


def _value_and_grad(
    loss: LossFunction, params: model.Params, tokens: Tokens, micro_batches: int
) -> tuple[Float[Array, ""], PyTree]:
    """Mean loss of the batch's targets and its gradients; of several micro-batches in float32."""
    value_and_grad = jax.value_and_grad(loss)
    if micro_batches == 1:
        return value_and_grad(params, tokens)

    # A mean of means would give the targets of a micro-batch with few of them more weight.
    targets = jnp.sum(tokens[:, 1:] >= 0)

    def accumulate(total: PyTree, micro_batch: Tokens) -> tuple[PyTree, None]:
        share = jnp.sum(micro_batch[:, 1:] >= 0) / targets
        part = value_and_grad(params, micro_batch)
        return jax.tree.map(lambda x, y: x + share * y, total, part), None

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    parts = tokens.reshape(micro_batches, -1, tokens.shape[-1])
    total, _ = jax.lax.scan(accumulate, (jnp.zeros([], jnp.float32), zeros), parts)
    return total


def mean_loss(
    loss: LossFunction,
    params: model.Params,
    batches: Iterable[Tokens | np.ndarray],
    targets: Sequence[int] | None = None,
) -> float:
    """Returns the mean of a jitted loss over batches, in nats.

    Args:
      loss: Mean loss of a batch.
      params: The parameters.
      batches: Of tokens.
      targets: How many targets each has; None for the same number.
    """
    losses = [loss(params, tokens) for tokens in batches]
    return float(np.average(np.asarray(jnp.stack(losses)), weights=targets))
