"""LLaMA (Touvron et al., 2023) in Flax NNX.

Pre-normalised blocks of causal attention with rotary embeddings and of SwiGLU, an untied head. The
blocks are one module whose parameters are stacked over the layers, run by one scan.

`Llama` is the model. Training handles its parameters as a plain nested dict of arrays and calls
pure functions: `embed`, `block` and `logits` over `params["blocks"]`, one layer at a time, and all
the rest, and `forward`, which is made of the three.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from examples.llama.config import LlamaConfig
from examples.llama.mesh import constrain, gathered

__all__ = [
    "Attention",
    "Block",
    "Llama",
    "Mlp",
    "Params",
    "block",
    "cross_entropy",
    "embed",
    "forward",
    "init_params",
    "logits",
    "rotary_embedding",
    "scan_layers",
    "token_ids",
]

Params = dict[str, Any]
Hidden = Float[Array, "batch sequence hidden"]
ModuleT = TypeVar("ModuleT", bound=nnx.Module)


def _normal_init(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    # A bfloat16 draw has 128 distinct magnitudes and no tails, so the draw is float32's.
    return (0.02 * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def _rotary_frequencies(config: LlamaConfig) -> Float[Array, " half_head"]:
    """Returns the angle in radians by which each pair of channels turns from token to token."""
    exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequencies = config.rope_theta**-exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    turns_per_context = scaling.original_context * frequencies / (2 * jnp.pi)
    kept = (turns_per_context - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    kept = jnp.clip(kept, 0.0, 1.0)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def rotary_embedding(
    config: LlamaConfig, x: Float[Array, "batch sequence heads head_dim"]
) -> Float[Array, "batch sequence heads head_dim"]:
    """Turns every channel pair (i, i + head_dim / 2) by its frequency times the token's position.

    Computed in float32, returned in the dtype of `x`.
    """
    positions = jnp.arange(x.shape[1], dtype=jnp.float32)
    angles = jnp.outer(positions, _rotary_frequencies(config))[None, :, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


class Attention(nnx.Module):
    """Causal self-attention with rotary embeddings and grouped key and value heads.

    Args:
        config: the model's shape.
        param_dtype: dtype of the parameters.
        dtype: dtype of the matrix products.
        heads_at_once: heads whose attention weights exist at one time; None for all. Divides the
            heads into groups with as many key and value heads each.
        rngs: source of the initial parameters.
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        param_dtype: DTypeLike,
        dtype: DTypeLike,
        heads_at_once: int | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        linear = _linear(param_dtype, dtype, rngs)
        self.config = config
        self.groups, left = divmod(config.num_heads, heads_at_once or config.num_heads)
        if left or config.num_kv_heads % self.groups:
            raise ValueError(
                f"heads_at_once is {heads_at_once}; it must divide the {config.num_heads} heads "
                f"and leave whole groups of the {config.num_kv_heads} key and value heads"
            )
        self.q_proj = linear(config.hidden_size, config.hidden_size)
        self.k_proj = linear(config.hidden_size, config.kv_size)
        self.v_proj = linear(config.hidden_size, config.kv_size)
        self.o_proj = linear(config.hidden_size, config.hidden_size)

    def __call__(self, x: Hidden) -> Hidden:
        """Mixes every token with those before it."""
        heads = (*x.shape[:2], -1, self.config.head_dim)
        tokens = _tokens(x)
        query, key, value = (
            constrain(project(tokens).reshape(heads), "batch", None, "heads", None)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query = rotary_embedding(self.config, query)
        key = rotary_embedding(self.config, key)
        attended = constrain(_attend(query, key, value, self.groups), "batch", None, "heads", None)
        return self.o_proj(attended.reshape(tokens.shape)).reshape(x.shape)


def _attend(query: Array, key: Array, value: Array, groups: int) -> Array:
    """Causal attention, one group of heads after another; weights are computed again backwards."""
    attention = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    if groups == 1:
        return attention(query, key, value)

    def grouped(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(*x.shape[:2], groups, -1, x.shape[-1]), 2, 0)

    recomputed = jax.checkpoint(lambda qkv: attention(*qkv), prevent_cse=False)
    attended = jax.lax.map(recomputed, (grouped(query), grouped(key), grouped(value)))
    return jnp.moveaxis(attended, 0, 2).reshape(query.shape)


class Mlp(nnx.Module):
    """The SwiGLU feed-forward layer: down(silu(gate(x)) * up(x))."""

    def __init__(
        self, config: LlamaConfig, *, param_dtype: DTypeLike, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        linear = _linear(param_dtype, dtype, rngs)
        self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: Hidden) -> Hidden:
        """Transforms every token by itself."""
        tokens = _tokens(x)
        gated = jax.nn.silu(self.gate_proj(tokens)) * self.up_proj(tokens)
        gated = constrain(gated, "batch", "width")
        return self.down_proj(gated).reshape(x.shape)


class Block(nnx.Module):
    """One layer: attention and feed-forward, each normalised before and added to its input."""

    def __init__(
        self,
        config: LlamaConfig,
        *,
        param_dtype: DTypeLike,
        dtype: DTypeLike,
        heads_at_once: int | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.attention_norm = _norm(config, param_dtype, dtype, rngs)
        self.attention = Attention(
            config, param_dtype=param_dtype, dtype=dtype, heads_at_once=heads_at_once, rngs=rngs
        )
        self.mlp_norm = _norm(config, param_dtype, dtype, rngs)
        self.mlp = Mlp(config, param_dtype=param_dtype, dtype=dtype, rngs=rngs)

    def __call__(self, x: Hidden) -> Hidden:
        """Returns the residual stream after this layer."""
        x = constrain(x + self.attention(self.attention_norm(x)), "batch", None, None)
        return constrain(x + self.mlp(self.mlp_norm(x)), "batch", None, None)


class Llama(nnx.Module):
    """A LLaMA language model.

    `embed`, `norm` and `lm_head` are plain modules; `blocks` is one `Block` whose every parameter
    has a leading axis of layers. A tied model has no `lm_head`.

    Args:
        config: the model's shape.
        param_dtype: dtype of the parameters.
        dtype: dtype of the matrix products and of the residual stream. Norm statistics, rotary
            embeddings and logits are float32 whatever it is.
        remat: whether the backward pass recomputes each block from its input instead of keeping
            the block's activations.
        rngs: source of the initial parameters: normal with standard deviation 0.02, norms one.
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        param_dtype: DTypeLike = jnp.float32,
        dtype: DTypeLike = jnp.float32,
        remat: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap
        def stacked_block(rngs: nnx.Rngs) -> Block:
            return Block(config, param_dtype=param_dtype, dtype=dtype, rngs=rngs)

        self.embed = _embedding(config, param_dtype, dtype, rngs)
        self.blocks = stacked_block(rngs)
        self.norm = _norm(config, param_dtype, dtype, rngs)
        if not config.tied:
            self.lm_head = _head(config, param_dtype, dtype, rngs)
        self.config, self.remat = config, remat

    def __call__(
        self, tokens: Int[Array, "batch sequence"]
    ) -> Float[Array, "batch sequence vocab"]:
        """Returns the float32 logits of the token after each of `tokens`."""
        graphdef, stacked = nnx.split(self.blocks)

        def apply(layer: nnx.State, x: Hidden) -> Hidden:
            return nnx.merge(graphdef, layer)(x)

        return self.logits(scan_layers(apply, stacked, self.embed(tokens), remat=self.remat))

    def logits(self, x: Hidden) -> Float[Array, "batch sequence vocab"]:
        """Normalises the residual stream after the last layer and applies the head; float32."""
        head = _tied_head(self.embed.embedding[...]) if self.config.tied else self.lm_head
        return _apply_head(head, self.norm(x))


def init_params(
    config: LlamaConfig,
    seed: int | Int[Array, ""],
    *,
    param_dtype: DTypeLike = jnp.float32,
    convert: Callable[[Params], Params] = lambda params: params,
) -> Params:
    """Returns the initial parameters of `Llama` as a plain nested dict of arrays.

    The leaves of `params["blocks"]` are stacked over the layers; the other keys are `embed`, `norm`
    and, unless the head is tied to the embedding, `lm_head`. Pure, so it can be jitted, and
    `jax.eval_shape` gives the shapes of any model.

    Args:
      config: The model's shape.
      seed: Of the draw. With a known number instead of an argument of the jitted program, XLA draws
        all layers ahead of the loop.
      param_dtype: Dtype of the parameters.
      convert: Applied to one layer at a time and to the rest, such as a quantization. No more of
        the blocks than a layer exists before it.
    """
    rngs = nnx.Rngs(jax.random.key(seed))

    def pure(module: nnx.Module) -> Params:
        return nnx.to_pure_dict(nnx.state(module, nnx.Param))

    def layer(key: Array) -> Params:
        block = Block(config, param_dtype=param_dtype, dtype=param_dtype, rngs=nnx.Rngs(key))
        return convert(pure(block))

    # In the order in which `Llama` draws them, from the same keys.
    embed = pure(_embedding(config, param_dtype, param_dtype, rngs))
    blocks = jax.lax.map(layer, jax.random.split(rngs(), config.num_layers))
    norm = pure(_norm(config, param_dtype, param_dtype, rngs))
    rest = {"embed": embed, "norm": norm}
    if not config.tied:
        rest["lm_head"] = pure(_head(config, param_dtype, param_dtype, rngs))
    return {"blocks": blocks, **convert(rest)}


def embed(
    config: LlamaConfig, rest: Params, tokens: Int[Array, "batch sequence"], dtype: DTypeLike
) -> Hidden:
    """Looks the tokens up in `rest["embed"]`; `dtype` is the compute dtype from here on."""
    make = functools.partial(_embedding, config, jnp.float32, dtype)
    table = gathered({"embed": rest["embed"]})["embed"]
    return constrain(_bind(make, table)(tokens), "batch", None, None)


def block(
    config: LlamaConfig, block_params: Params, x: Hidden, *, heads_at_once: int | None = None
) -> Hidden:
    """Runs one layer, whose parameters have no axis of layers, in the dtype of `x`.

    `heads_at_once` bounds the attention weights that exist at one time, as in `Attention`.
    """

    def make(rngs: nnx.Rngs) -> Block:
        return Block(
            config,
            param_dtype=jnp.float32,
            dtype=x.dtype,
            heads_at_once=heads_at_once,
            rngs=rngs,
        )

    return _bind(make, gathered(block_params))(x)


def logits(config: LlamaConfig, rest: Params, x: Hidden) -> Float[Array, "batch sequence vocab"]:
    """Normalises with `rest["norm"]` and applies the head; float32."""
    name = "embed" if config.tied else "lm_head"
    rest = gathered({"norm": rest["norm"], name: rest[name]})
    norm = _bind(functools.partial(_norm, config, jnp.float32, x.dtype), rest["norm"])
    if config.tied:
        return _apply_head(_tied_head(rest["embed"]["embedding"]), norm(x))
    head = _bind(functools.partial(_head, config, jnp.float32, x.dtype), rest["lm_head"])
    return _apply_head(head, norm(x))


def forward(
    config: LlamaConfig,
    params: Params,
    tokens: Int[Array, "batch sequence"],
    *,
    dtype: DTypeLike = jnp.float32,
    remat: bool = False,
) -> Float[Array, "batch sequence vocab"]:
    """Returns what `Llama(config, dtype=dtype, remat=remat)` with these parameters does."""
    x = embed(config, params, tokens, dtype)
    x = scan_layers(functools.partial(block, config), params["blocks"], x, remat=remat)
    return logits(config, params, x)


def token_ids(tokens: Int[Array, "batch sequence"]) -> Int[Array, "batch sequence"]:
    """Returns the ids of tokens, of which those that are no targets are stored as `~id`."""
    return jnp.maximum(tokens, ~tokens)


def cross_entropy(
    logits: Float[Array, "batch sequence vocab"], targets: Int[Array, "batch sequence"]
) -> Float[Array, "batch sequence"]:
    """Returns the float32 loss of each token, in nats: minus the log-probability of its target."""
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)


def _tokens(x: Hidden) -> Float[Array, "tokens hidden"]:
    # On a CPU the gradient of a kernel is over twice as fast with one axis of tokens as with two.
    return x.reshape(-1, x.shape[-1])


def _tied_head(table: Float[Array, "vocab hidden"]) -> Callable[[Array], Array]:
    def head(x: Array) -> Array:
        return jnp.dot(x, table.astype(x.dtype).T, preferred_element_type=jnp.float32)

    return head


def _apply_head(head: Callable[[Array], Array], x: Hidden) -> Float[Array, "batch sequence vocab"]:
    logits = head(_tokens(x)).reshape(*x.shape[:2], -1)
    return constrain(logits, "batch", None, "vocabulary")


def _linear(
    param_dtype: DTypeLike, dtype: DTypeLike, rngs: nnx.Rngs, **kwargs: Any
) -> Callable[[int, int], nnx.Linear]:
    return functools.partial(
        nnx.Linear,
        use_bias=False,
        kernel_init=_normal_init,
        param_dtype=param_dtype,
        dtype=dtype,
        rngs=rngs,
        **kwargs,
    )


def _norm(
    config: LlamaConfig, param_dtype: DTypeLike, dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.RMSNorm:
    return nnx.RMSNorm(
        config.hidden_size,
        epsilon=config.rms_norm_eps,
        param_dtype=param_dtype,
        dtype=dtype,
        rngs=rngs,
    )


def _embedding(
    config: LlamaConfig, param_dtype: DTypeLike, dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.Embed:
    return nnx.Embed(
        config.vocab_size,
        config.hidden_size,
        embedding_init=_normal_init,
        param_dtype=param_dtype,
        dtype=dtype,
        rngs=rngs,
    )


def _head(
    config: LlamaConfig, param_dtype: DTypeLike, dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.Linear:
    linear = _linear(param_dtype, dtype, rngs, preferred_element_type=jnp.float32)
    return linear(config.hidden_size, config.vocab_size)


def _bind(make: Callable[[nnx.Rngs], ModuleT], params: Params) -> ModuleT:
    """Returns the module that `make` describes, holding `params`; nothing is drawn or allocated."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    names, expected = _leaf_names(params), _leaf_names(nnx.to_pure_dict(state))
    if names != expected:
        # nnx.merge takes the leaves in their order, whatever their names.
        raise ValueError(f"the parameters are {names}; the module has {expected}.")
    return nnx.merge(graphdef, params)


def _leaf_names(params: Params) -> list[str]:
    leaves = jax.tree.leaves_with_path(params)
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]


def scan_layers(
    apply: Callable[[Any, Hidden], Hidden], stacked: Any, x: Hidden, *, remat: bool
) -> Hidden:
    """Runs `apply` of each layer's parameters; they are stacked.

    With `remat`, the backward pass computes the layer again from its input.
    """
    if remat:
        # Inside a scan there is nothing to merge the recomputation with.
        apply = jax.checkpoint(apply, prevent_cse=False)
    return jax.lax.scan(lambda x, layer: (apply(layer, x), None), x, stacked)[0]
