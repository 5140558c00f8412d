"""Are the matrices of any model found? Models of several packages, placed three ways.

Truth is a list of rules for each model, written by hand from its source. Compared with it, leaf by
leaf, are what the traced model says, what the names say, and the default of
`weight_dimension_numbers`. All parameters are shapes; only Keras allocates its model.

    python -m benchmarks.any_model

measures the models that the results do not have. It needs the [clients] extra beside [examples],
and Python 3.12 for Google's gemma. EasyDeL and Levanter need other versions of JAX, and MaxText
packages that docs/maxtext.md lists: name their models, each in an environment of its own. A package
that cannot be imported is an error.
"""

import argparse
import importlib
import importlib.metadata
import math
import os
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from apollo_optax import (
    ApolloDimensionNumbers,
    dimension_numbers_from_rules,
    infer_dimension_numbers,
    transformer_dimension_numbers,
)
from apollo_optax._matrices import axes_of_each_leaf, low_rank_shape
from apollo_optax._names import default_dimension_numbers
from apollo_optax._paths import named_arrays, nest
from benchmarks.maxtext_recipe import require_maxtext
from benchmarks.rows import RESULTS, Row, add_row, read_rows

OUTPUT = RESULTS / "any_model.json"
COMMAND = "python -m benchmarks.any_model"
TOKENS = jax.ShapeDtypeStruct((1, 8), "int32")
Rules = list[tuple[str, Any]]


class Model(NamedTuple):
    """A forward function on shapes, and the hand-written truth of its leaves."""

    package: str
    forward: Callable[..., Any]
    params: Any
    inputs: tuple[Any, ...]
    rules: Rules


def _matrix(reduction: Any, output: Any) -> ApolloDimensionNumbers:
    return ApolloDimensionNumbers(reduction, output)


def _llama(apart: bool) -> Model:
    llama: Any = importlib.import_module("examples.llama.model")
    config = importlib.import_module("examples.llama.config").MODELS["1b"]
    params = jax.eval_shape(lambda: llama.init_params(config, 0))
    if apart:
        layer = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), params["blocks"])
        params = {**params, "blocks": [layer] * config.num_layers}

    def forward(params: Any, tokens: Any) -> Any:
        if not apart:
            return llama.forward(config, params, tokens)
        x = llama.embed(config, params, tokens, jnp.float32)
        for layer in params["blocks"]:
            x = llama.block(config, layer, x)
        return llama.logits(config, params, x)

    rules: Rules = [("embed|lm_head|norm", None), ("kernel", _matrix(-2, -1))]
    return Model("flax", forward, params, (TOKENS,), rules)


def _linen(axis: int) -> Model:
    nn: Any = importlib.import_module("flax.linen")

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: Any, _: Any) -> Any:
            x = x + nn.MultiHeadDotProductAttention(12, name="attention")(nn.LayerNorm()(x))
            y = nn.gelu(nn.Dense(3072, name="up")(nn.LayerNorm()(x)))
            return x + nn.Dense(768, name="down")(y), None

    class VisionTransformer(nn.Module):
        @nn.compact
        def __call__(self, images: Any) -> Any:
            x = nn.Conv(768, (16, 16), strides=(16, 16), name="patches")(images)
            x = x.reshape(len(x), -1, 768)
            first = self.param("first", nn.initializers.zeros, (1, 1, 768))
            x = jnp.concatenate([jnp.tile(first, (len(x), 1, 1)), x], axis=1)
            x = x + self.param("positions", nn.initializers.normal(), (1, x.shape[1], 768))
            blocks = nn.scan(
                nn.remat(Block),
                variable_axes={"params": axis},
                split_rngs={"params": True},
                length=12,
            )
            x, _ = blocks(name="blocks")(x, None)
            return nn.Dense(1000, name="head")(nn.LayerNorm()(x)[:, 0])

    model = VisionTransformer()
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), "float32")
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    inside = 1 - axis
    rules: Rules = [
        ("head|bias|Norm|first|positions", None),
        ("patches", _matrix((0, 1, 2), 3)),
        ("query|key|value", _matrix(inside, (2, 3))),
        ("out/kernel", _matrix((inside, 2), 3)),
        ("up|down", _matrix(inside, 2)),
    ]
    return Model("flax", lambda p, x: model.apply({"params": p}, x), params, (images,), rules)


def _nnx() -> Model:
    nnx: Any = importlib.import_module("flax.nnx")

    class DiffusionTransformer(nnx.Module):
        """Blocks modulated by the time, as in DiT."""

        def __init__(self, rngs: Any) -> None:
            self.patches = nnx.Conv(4, 384, (2, 2), strides=(2, 2), rngs=rngs)
            self.time = nnx.Linear(256, 384, rngs=rngs)
            self.norm = nnx.LayerNorm(384, use_scale=False, use_bias=False, rngs=rngs)
            self.attentions = nnx.List(
                [nnx.MultiHeadAttention(6, 384, decode=False, rngs=rngs) for _ in range(12)]
            )
            self.modulations = nnx.List([nnx.Linear(384, 6 * 384, rngs=rngs) for _ in range(12)])
            self.ups = nnx.List([nnx.Linear(384, 1536, rngs=rngs) for _ in range(12)])
            self.downs = nnx.List([nnx.Linear(1536, 384, rngs=rngs) for _ in range(12)])
            self.last = nnx.Linear(384, 2 * 2 * 8, rngs=rngs)

        def __call__(self, images: Any, time: Any) -> Any:
            angles = time[:, None] * jnp.exp(-jnp.arange(128) / 16)
            condition = nnx.silu(self.time(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)))
            x = self.patches(images).reshape(len(images), -1, 384)
            layers = zip(self.attentions, self.modulations, self.ups, self.downs, strict=True)
            for attention, modulation, up, down in layers:
                a, b, c, d, e, f = jnp.split(modulation(condition)[:, None], 6, axis=-1)
                x = x + c * attention(self.norm(x) * (1 + a) + b)
                x = x + f * down(nnx.gelu(up(self.norm(x) * (1 + d) + e)))
            return self.last(self.norm(x))

    graph, params, rest = nnx.split(
        nnx.eval_shape(lambda: DiffusionTransformer(nnx.Rngs(0))), nnx.Param, ...
    )

    def forward(params: Any, rest: Any, images: Any, time: Any) -> Any:
        return nnx.merge(graph, params, rest)(images, time)

    rules: Rules = [
        ("last|bias", None),
        ("patches", _matrix((0, 1, 2), 3)),
        ("query|key|value", _matrix(0, (1, 2))),
        ("out/kernel", _matrix((0, 1), 2)),
        ("kernel", _matrix(0, 1)),
    ]
    images = jax.ShapeDtypeStruct((1, 32, 32, 4), "float32")
    times = jax.ShapeDtypeStruct((1,), "float32")
    return Model("flax", forward, params, (rest, images, times), rules)


def _haiku_resnet() -> Model:
    hk: Any = importlib.import_module("haiku")
    network = hk.transform_with_state(lambda x: hk.nets.ResNet50(1000)(x, True))
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), "float32")
    params, state = jax.eval_shape(network.init, jax.random.key(0), images)
    rules: Rules = [("logits|batchnorm", None), ("conv", _matrix((0, 1, 2), 3))]

    def forward(params: Any, state: Any, images: Any) -> Any:
        return network.apply(params, state, None, images)

    return Model("dm-haiku", forward, params, (state, images), rules)


def _haiku_transformer() -> Model:
    hk: Any = importlib.import_module("haiku")

    def model(tokens: Any) -> Any:
        x = hk.Embed(32000, 512)(tokens)
        for _ in range(6):
            y = hk.LayerNorm(-1, True, True)(x)
            init = hk.initializers.VarianceScaling()
            x = x + hk.MultiHeadAttention(8, 64, w_init=init, model_size=512)(y, y, y)
            x = x + hk.Linear(512)(jax.nn.gelu(hk.Linear(2048)(hk.LayerNorm(-1, True, True)(x))))
        return hk.Linear(32000, name="head")(x)

    network = hk.without_apply_rng(hk.transform(model))
    params = jax.eval_shape(network.init, jax.random.key(0), TOKENS)
    rules: Rules = [("^embed|^head", None), ("/w$", _matrix(0, 1))]
    return Model("dm-haiku", network.apply, params, (TOKENS,), rules)


def _equinox() -> Model:
    eqx: Any = importlib.import_module("equinox")

    class Encoder(eqx.Module):
        embed: Any
        attention: list[Any]
        mlp: list[Any]
        head: Any

        def __init__(self, key: Any) -> None:
            keys = jax.random.split(key, 14)
            self.embed = eqx.nn.Embedding(32000, 512, key=keys[0])
            self.attention = [eqx.nn.MultiheadAttention(8, 512, key=k) for k in keys[1:7]]
            self.mlp = [eqx.nn.MLP(512, 512, 2048, 1, key=k) for k in keys[7:13]]
            self.head = eqx.nn.Linear(512, 32000, key=keys[13])

        def __call__(self, tokens: Any) -> Any:
            x = jax.vmap(self.embed)(tokens)
            for attention, mlp in zip(self.attention, self.mlp, strict=True):
                x = x + attention(x, x, x)
                x = x + jax.vmap(mlp)(x)
            return jax.vmap(self.head)(x)

    params, static = eqx.partition(
        eqx.filter_eval_shape(Encoder, jax.random.key(0)),
        lambda x: isinstance(x, jax.ShapeDtypeStruct),
    )
    rules: Rules = [("embed|head", None), ("weight", _matrix(1, 0))]

    def forward(params: Any, tokens: Any) -> Any:
        return jax.vmap(eqx.combine(params, static))(tokens)

    return Model("equinox", forward, params, (TOKENS,), rules)


def _gemma(name: str) -> Model:
    model = getattr(importlib.import_module("gemma.gm").nn, name)()
    params = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    rules: Rules = [
        ("embedder", None),
        ("q_einsum|k_einsum", _matrix(1, (0, 2))),
        ("kv_einsum", _matrix(2, (1, 3))),
        ("attn_vec", _matrix((0, 1), 2)),
        ("mlp/gating_einsum/w", _matrix(3, 2)),
        ("mlp/linear/w", _matrix(1, 2)),
        ("router", _matrix(0, 1)),
        ("gating_einsum", _matrix(1, 2) if name.startswith("Gemma2") else _matrix(2, 1)),
        ("linear", _matrix(0, 1)),
    ]
    forward = lambda p, tokens: model.apply({"params": p}, tokens)  # noqa: E731
    return Model("gemma", forward, params, (TOKENS,), rules)


def _tunix(family: str, name: str, config: str) -> Model:
    nnx: Any = importlib.import_module("flax.nnx")
    module: Any = importlib.import_module(f"tunix.models.{family}.model")
    settings = getattr(module.ModelConfig, config)()
    model = nnx.eval_shape(lambda: getattr(module, name)(settings, rngs=nnx.Rngs(0)))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def forward(params: Any, rest: Any, tokens: Any, mask: Any) -> Any:
        return nnx.merge(graph, params, rest)(tokens, tokens, None, mask)

    rules: Rules = [
        ("embedder|lm_head", None),
        ("[qkv]_proj", _matrix(0, (1, 2))),
        ("o_proj", _matrix((0, 1), 2)),
        ("q_einsum", _matrix(1, (0, 2))),
        ("kv_einsum", _matrix(2, (1, 3))),
        ("attn_vec", _matrix((0, 1), 2)),
        ("kernel", _matrix(0, 1)),
        ("mlp/(gate|up|down)_proj", _matrix(1, 2)),
    ]
    mask = jax.ShapeDtypeStruct((1, 8, 8), "bool")
    return Model("google-tunix", forward, params, (rest, TOKENS, mask), rules)


def _keras(make: Callable[[Any], Any], inputs: jax.ShapeDtypeStruct, rules: Rules) -> Model:
    os.environ["KERAS_BACKEND"] = "jax"
    model = make(importlib.import_module("keras"))
    params = {v.path: jax.ShapeDtypeStruct(v.shape, v.dtype) for v in model.trainable_variables}
    others = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in model.non_trainable_variables]

    def forward(params: Any, others: Any, x: Any) -> Any:
        trained = [params[v.path] for v in model.trainable_variables]
        return model.stateless_call(trained, others, x)[0]

    return Model("keras", forward, params, (others, inputs), rules)


def _keras_resnet() -> Model:
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), "float32")
    rules: Rules = [("predictions|/bias|gamma|beta", None), ("kernel", _matrix((0, 1, 2), 3))]
    return _keras(lambda keras: keras.applications.ResNet50(weights=None), images, rules)


def _keras_transformer() -> Model:
    def make(keras: Any) -> Any:
        layers = keras.layers
        tokens = keras.Input((8,), dtype="int32")
        x = layers.Embedding(32000, 512, name="embed")(tokens)
        for _ in range(6):
            y = layers.LayerNormalization()(x)
            x = x + layers.MultiHeadAttention(8, 64)(y, y)
            y = layers.Dense(2048, "gelu")(layers.LayerNormalization()(x))
            x = x + layers.Dense(512)(y)
        return keras.Model(tokens, layers.Dense(32000, name="head")(x))

    rules: Rules = [
        ("^embed|^head|bias|gamma|beta", None),
        ("attention_output", _matrix((0, 1), 2)),
        ("query|key|value", _matrix(0, (1, 2))),
        ("kernel", _matrix(0, 1)),
    ]
    return _keras(make, TOKENS, rules)


def _levanter() -> Model:
    eqx: Any = importlib.import_module("equinox")
    hax: Any = importlib.import_module("haliax")
    config = importlib.import_module("levanter.models.llama").LlamaConfig()
    model = eqx.filter_eval_shape(config.build, hax.Axis("vocab", 32000), key=jax.random.key(0))
    params, static = eqx.partition(model, lambda x: isinstance(x, jax.ShapeDtypeStruct))

    def forward(params: Any, tokens: Any) -> Any:
        named = hax.named(tokens, ("batch", "position"))
        mask = hax.nn.attention.causal_mask(named.axes[1], named.axes[1].alias("key_position"))
        return eqx.combine(params, static)(named, mask).array

    # Outputs first, as in PyTorch; layers before them.
    rules: Rules = [
        ("embeddings|lm_head|norm", None),
        ("q_proj", _matrix(4, (1, 2, 3))),
        ("[kv]_proj", _matrix(3, (1, 2))),
        ("o_proj", _matrix((2, 3), 1)),
        ("mlp", _matrix(2, 1)),
    ]
    return Model("levanter", forward, params, (TOKENS,), rules)


def _easydel() -> Model:
    ed: Any = importlib.import_module("easydel")
    nnx: Any = importlib.import_module("flax.nnx")
    config = ed.LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        attn_mechanism="vanilla",
    )
    model = ed.LlamaForCausalLM.lazy_init(config=config, rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def forward(params: Any, tokens: Any) -> Any:
        with model.mesh:
            return nnx.merge(graph, params, rest)(input_ids=tokens).logits

    rules: Rules = [("embed_tokens|lm_head|norm", None), ("kernel", _matrix(0, 1))]
    return Model("easydel", forward, params, (TOKENS,), rules)


MAXTEXT = (
    f"max_target_length={TOKENS.shape[1]} per_device_batch_size=1 attention=dot_product "
    "skip_jax_distributed_system=true log_config=false base_output_directory=unused"
)
# A product that a trace sees; MaxText's default is a kernel of Pallas.
RAGGED = "megablox=false"


def _maxtext(name: str, *settings: str, scanned: bool) -> Model:
    require_maxtext()
    nnx: Any = importlib.import_module("flax.nnx")
    creation: Any = importlib.import_module("maxtext.utils.model_creation_utils")
    maxtext: Any = importlib.import_module("maxtext")
    base = Path(maxtext.__file__).parent / "configs" / "base.yml"
    arguments = [f"model_name={name}", f"scan_layers={scanned}", *settings, *MAXTEXT.split()]
    config = creation.pyconfig.initialize(["", str(base), *arguments])
    model = nnx.eval_shape(lambda: creation.from_config(config, rngs=nnx.Rngs(0)))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def forward(params: Any, rest: Any, tokens: Any) -> Any:
        model = nnx.merge(graph, params, rest)
        return model(tokens, tokens, jnp.ones_like(tokens), enable_dropout=False)

    # Layers are behind the first axis.
    second, third = (2, 3) if scanned else (1, 2)
    rules: Rules = [
        ("embedding|logits_dense|scale", None),
        ("query|key|value|wq_b|wkv_b", _matrix(0, (second, third))),
        ("out/kernel", _matrix((0, second), third)),
        ("MoeBlock_0/w", _matrix(second, third)),
        ("kernel", _matrix(0, second)),
    ]
    return Model("maxtext", forward, params, (rest, TOKENS), rules)


MODELS: dict[str, Callable[[], Model]] = {
    "LLaMA 1B of the examples (NNX), layers stacked": lambda: _llama(False),
    "LLaMA 1B of the examples (NNX), layers apart": lambda: _llama(True),
    "ViT-B/16 (Linen), scanned on axis 0": lambda: _linen(0),
    "ViT-B/16 (Linen), scanned on axis 1": lambda: _linen(1),
    "DiT-S/2 (NNX)": _nnx,
    "ResNet-50 (Haiku)": _haiku_resnet,
    "Transformer (Haiku)": _haiku_transformer,
    "Transformer (Equinox)": _equinox,
    "Gemma 2 2B": lambda: _gemma("Gemma2_2B"),
    "Gemma 3 1B": lambda: _gemma("Gemma3_1B"),
    "Gemma 4 26B-A4B": lambda: _gemma("Gemma4_26B_A4B"),
    "Llama 3.2 1B (Tunix)": lambda: _tunix("llama3", "Llama3", "llama3p2_1b"),
    "Llama 3.1 8B (Tunix)": lambda: _tunix("llama3", "Llama3", "llama3p1_8b"),
    "Qwen 3 0.6B (Tunix)": lambda: _tunix("qwen3", "Qwen3", "qwen3_0p6b"),
    "Qwen 3 30B-A3B (Tunix)": lambda: _tunix("qwen3", "Qwen3", "qwen3_30b_a3b"),
    "Gemma 2 2B (Tunix)": lambda: _tunix("gemma", "Gemma", "gemma2_2b"),
    "ResNet-50 (Keras)": _keras_resnet,
    "Transformer (Keras)": _keras_transformer,
    "Llama 2 7B (Levanter)": _levanter,
    "Llama 3.1 8B (EasyDeL)": _easydel,
    "Llama 3.1 8B (MaxText), scanned": lambda: _maxtext("llama3.1-8b", scanned=True),
    "Llama 3.1 8B (MaxText), layers apart": lambda: _maxtext("llama3.1-8b", scanned=False),
    "Gemma 2 2B (MaxText), scanned": lambda: _maxtext("gemma2-2b", scanned=True),
    "Mixtral 8x7B (MaxText), scanned": lambda: _maxtext("mixtral-8x7b", RAGGED, scanned=True),
    "Mixtral 8x7B (MaxText), layers apart": lambda: _maxtext("mixtral-8x7b", RAGGED, scanned=False),
    "Mixtral 8x7B (MaxText), scanned, experts in a kernel of Pallas": lambda: _maxtext(
        "mixtral-8x7b", scanned=True
    ),
    "DeepSeek 3 671B (MaxText), scanned": lambda: _maxtext("deepseek3-671b", RAGGED, scanned=True),
    "DeepSeek 3 671B (MaxText), layers apart": lambda: _maxtext(
        "deepseek3-671b", RAGGED, scanned=False
    ),
}


WAYS = ("model", "names", "default")


def measure(name: str) -> Row:
    """Places the leaves of a model in three ways."""
    model = MODELS[name]()
    leaves = dict(named_arrays(model.params)[0])
    params = nest(leaves.items())

    def axes_of(specs: Any) -> dict[Any, Any]:
        return axes_of_each_leaf(specs, params)

    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        inferred = infer_dimension_numbers(model.forward, model.params, *model.inputs)
    seconds = time.perf_counter() - start
    truth = axes_of(dimension_numbers_from_rules(model.rules)(params))
    ways = {
        "model": axes_of(inferred),
        "names": axes_of(transformer_dimension_numbers(params)),
        "default": axes_of(default_dimension_numbers),
    }
    with_axes = [path for path, leaf in leaves.items() if leaf.ndim > 1]

    def numbers(axes: dict[Any, Any], rank: int) -> int:
        total = 0
        for path, leaf in leaves.items():
            if axes[path] is None:
                total += 2 * leaf.size
                continue
            matrices = math.prod(leaf.shape[axis] for axis in axes[path].batch)
            total += 2 * math.prod(low_rank_shape(leaf.shape, axes[path], rank)) + matrices
        return total

    adamw = 2 * sum(leaf.size for leaf in leaves.values())
    return {
        "model": name,
        "package": f"{model.package} {importlib.metadata.version(model.package)}",
        "parameters": adamw // 2,
        "leaves_with_axes": len(with_axes),
        **{
            f"placed_rightly_by_{way}": sum(axes[path] == truth[path] for path in with_axes)
            for way, axes in ways.items()
        },
        **{
            f"state_over_adamw_by_{way}": {
                "mini": numbers(axes, 1) / adamw,
                "r256": numbers(axes, 256) / adamw,
            }
            for way, axes in ways.items()
        },
        "warnings_by_model": sum("does not tell" in str(w.message) for w in caught),
        "trace_seconds": seconds,
    }


def table(rows: Sequence[Row]) -> str:
    """Leaves placed rightly, and the state of APOLLO-Mini, in Markdown."""
    lines = [
        "| model | leaves with two or more axes | right by the model | by names | by default | "
        "state of APOLLO-Mini over AdamW's: by the model | by names | by default | trace |",
        "| --- |" + " ---: |" * 8,
    ]
    for row in rows:
        placed = [str(row[f"placed_rightly_by_{way}"]) for way in WAYS]
        state = [f"{row[f'state_over_adamw_by_{way}']['mini']:.3f}" for way in WAYS]
        cells = [str(row["leaves_with_axes"]), *placed, *state, f"{row['trace_seconds']:.1f} s"]
        lines.append(f"| {row['model']}, {row['package']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measures the models named, or those without a row, and adds the rows that are missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "models", nargs="*", help=f"of {list(MODELS)}; by default all without a row"
    )
    arguments = parser.parse_args()
    measured = [row["model"] for row in read_rows(OUTPUT)]
    for name in arguments.models or [name for name in MODELS if name not in measured]:
        row = measure(name)
        placed = [row[f"placed_rightly_by_{way}"] for way in WAYS]
        print(f"{name}: {placed} of {row['leaves_with_axes']}, {row['trace_seconds']:.1f} s")
        if name not in measured:
            add_row(OUTPUT, COMMAND, row)


if __name__ == "__main__":
    main()
