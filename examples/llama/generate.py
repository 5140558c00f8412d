"""Writes text with a LLaMA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, Integer, PyTree

from examples.llama.train import LogitsFunction

__all__ = ["generate"]


def generate(
    logits_of: LogitsFunction,
    params: PyTree,
    prompt: Integer[np.ndarray, " prompt"],
    *,
    length: int,
    window: int,
    temperature: float = 0.8,
    seed: int = 0,
) -> Integer[np.ndarray, " length"]:
    """Continues a prompt, token by token.

    Every token is drawn after a forward pass over the `window` tokens before it, in one compiled
    loop. Nothing is cached between tokens: meant for a short sample after training.

    Args:
      logits_of: `(params, int32 (1, window)) -> logits (1, window, vocab)`.
      params: The model's parameters.
      prompt: Ids to continue, at least one.
      length: Ids to write.
      window: Ids the model looks back at; the sequence length it was trained with.
      temperature: Divides the logits before the draw; 0 takes the likeliest id each time.
      seed: Seed of the draws.

    Returns:
      The new ids, int32.

    Raises:
      ValueError: If the prompt is empty or the temperature is negative.
    """
    if len(prompt) == 0:
        raise ValueError("the prompt is empty; give at least one token to continue")
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}; expected 0 or more")
    # Ids to the right of the last are never attended to, so their value is free.
    tokens = np.zeros(max(len(prompt) + length, window), np.int32)
    tokens[: len(prompt)] = prompt
    write = functools.partial(
        _write, logits_of, window=window, length=length, greedy=temperature == 0
    )
    written = jax.jit(write)(params, tokens, len(prompt), temperature or 1.0, jax.random.key(seed))
    return np.asarray(written)[len(prompt) : len(prompt) + length]


def _write(
    logits_of: LogitsFunction,
    params: PyTree,
    tokens: Int32[Array, " total"],
    start: Int32[Array, ""],
    temperature: Array,
    key: Array,
    *,
    window: int,
    length: int,
    greedy: bool,
) -> Int32[Array, " total"]:
    def write_one(position: Array, tokens: Array) -> Array:
        first = jnp.maximum(position - window, 0)
        seen = jax.lax.dynamic_slice(tokens, (first,), (window,))
        logits = logits_of(params, seen[None])[0, position - 1 - first]
        if greedy:
            token = jnp.argmax(logits)
        else:
            token = jax.random.categorical(jax.random.fold_in(key, position), logits / temperature)
        return tokens.at[position].set(token.astype(jnp.int32))

    return jax.lax.fori_loop(start, start + length, write_one, tokens)
