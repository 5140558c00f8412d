"""Trains a small transformer on Python's standard library with APOLLO-Mini.

    pip install -e '.[examples]'
    python -m examples.minimal

takes about a minute on two CPU cores. The model predicts the next byte. Ctrl-C stops a run, and the
same command continues from the last checkpoint. A larger `--steps` continues a run that has ended.
"""

import argparse
import itertools
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jaxtyping import Array, Float, UInt8

from apollo_optax import apollo_mini, transformer_dimension_numbers

# The model: 0.5 million weights.
VOCABULARY = 256  # a token is a byte
WIDTH, LAYERS, HEADS = 128, 2, 4

# The training.
SEQUENCE, BATCH = 128, 8
LEARNING_RATE, SCALE, WARMUP_STEPS = 0.04, 8**0.5, 100
REPORT_EVERY, SAVE_EVERY = 20, 100


# Text. Every twentieth file is held out.


def read_library() -> tuple[UInt8[np.ndarray, " bytes"], UInt8[np.ndarray, " bytes"]]:
    """Returns the bytes of the standard library to train on, and the bytes that are held out."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("[!_]*.py"))
    held_out = files[::20]
    training = [path for path in files if path not in held_out]

    def bytes_of(paths: list[Path]) -> UInt8[np.ndarray, " bytes"]:
        return np.frombuffer(b"".join(path.read_bytes() for path in paths), np.uint8)

    return bytes_of(training), bytes_of(held_out)


def batches(
    text: UInt8[np.ndarray, " bytes"], seed: int, start: int = 0
) -> Iterator[UInt8[Array, "batch sequence_and_next"]]:
    """Yields random pieces of the text, from batch number `start` on.

    A batch depends only on the seed and the batch number, so a resumed run reads the same batches.
    """
    for number in itertools.count(start):
        places = np.random.default_rng((seed, number)).integers(len(text) - SEQUENCE, size=BATCH)
        yield jnp.asarray(text[places[:, None] + np.arange(SEQUENCE + 1)])


# The model. `transformer_dimension_numbers` goes by names: the kernels of `query`, `key`, `value`,
# `out`, `up` and `down` are matrices. `embed`, `head` and the norms are left to Adam.


class Block(nnx.Module):
    """Attention to the previous bytes, and a perceptron."""

    def __init__(self, rngs: nnx.Rngs):
        self.attention_norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads=HEADS, in_features=WIDTH, use_bias=False, decode=False, rngs=rngs
        )
        self.mlp_norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, use_bias=False, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch sequence width"], mask: Float[Array, "batch 1 query key"]
    ) -> Float[Array, "batch sequence width"]:
        """Adds the results of attention and perceptron to `x`."""
        x = x + self.attention(self.attention_norm(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class Transformer(nnx.Module):
    """A decoder that predicts the next byte at every position of a sequence."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.position_embed = nnx.Embed(SEQUENCE, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCABULARY, use_bias=False, rngs=rngs)

    def __call__(
        self, tokens: UInt8[Array, "batch sequence"]
    ) -> Float[Array, "batch sequence vocabulary"]:
        """Returns the logits of the byte that follows each token."""
        x = self.embed(tokens) + self.position_embed(jnp.arange(tokens.shape[1]))[None]
        mask = nnx.make_causal_mask(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


# The training step.


def loss_of(model: Transformer, batch: UInt8[Array, "batch sequence_and_next"]) -> Float[Array, ""]:
    """Returns the mean cross-entropy of the next byte, in nats."""
    logits, targets = model(batch[:, :-1]), batch[:, 1:].astype(jnp.int32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


@nnx.jit
def train_step(
    model: Transformer, optimizer: nnx.Optimizer, batch: UInt8[Array, "batch sequence_and_next"]
) -> Float[Array, ""]:
    """Updates the model and the optimizer in place, and returns the loss before the update."""
    loss, grads = nnx.value_and_grad(loss_of)(model, batch)
    optimizer.update(model, grads)
    return loss


evaluate = nnx.jit(loss_of)


def count(tree: object) -> int:
    """Returns the count of numbers in the arrays of a tree."""
    return sum(x.size for x in jax.tree.leaves(tree))


def train(steps: int, folder: Path) -> float:
    """Trains for `steps` updates in all, from the last checkpoint in the folder if there is one.

    Returns:
      The validation loss at the end.
    """
    text, held_out = read_library()
    validation = jnp.concatenate(list(itertools.islice(batches(held_out, seed=1), 8)))

    model = Transformer(nnx.Rngs(0))
    tx = apollo_mini(
        optax.linear_schedule(0, LEARNING_RATE, WARMUP_STEPS),
        scale=SCALE,
        weight_dimension_numbers=transformer_dimension_numbers,
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    weights, kept = count(nnx.state(model)), count(nnx.state(optimizer))
    print(f"{weights:,} weights; the optimizer keeps {kept:,} numbers, Adam keeps {2 * weights:,}")

    with ocp.CheckpointManager(folder.absolute()) as checkpoints:
        start = checkpoints.latest_step() or 0
        if start:
            like = ocp.args.StandardRestore(nnx.state((model, optimizer)))
            nnx.update((model, optimizer), checkpoints.restore(start, args=like))
            print(f"continues from step {start} of the run in {folder}")

        began = time.perf_counter()
        numbers = range(start + 1, steps + 1)
        for step, batch in zip(numbers, batches(text, seed=0, start=start), strict=False):
            loss = train_step(model, optimizer, batch)
            if step % REPORT_EVERY == 0:
                held_out_loss = evaluate(model, validation)
                rate = (step - start) * BATCH * SEQUENCE / (time.perf_counter() - began)
                print(
                    f"step {step}: loss {loss:.3f}, validation {held_out_loss:.3f}, "
                    f"{rate:,.0f} tokens/s"
                )
            if step % SAVE_EVERY == 0 or step == steps:
                state = nnx.state((model, optimizer))
                checkpoints.save(step, args=ocp.args.StandardSave(state))
    return float(evaluate(model, validation))


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line and trains."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help="number of updates of the whole run")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/minimal"), help="folder of the checkpoints"
    )
    train(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    main()
