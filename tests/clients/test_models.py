"""Leaves of models from other packages are placed as by hand: pytest -m clients.

Needs the [clients] extra, and for Google's `gemma` Python 3.12.
"""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tests.placed import placed

# Warnings of other packages are theirs.
pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("default")]
VOCABULARY, ELEMENTWISE, UNKNOWN = "vocabulary", "elementwise", "unknown"
TOKENS = jax.ShapeDtypeStruct((1, 8), "int32")
MASK = jax.ShapeDtypeStruct((1, 8, 8), "bool")


@pytest.fixture(autouse=True)
def as_users_run():
    with jax.numpy_rank_promotion("allow"):
        yield


def test_haiku_transformer_with_a_stack_of_layers():
    hk = importlib.import_module("haiku")

    def model(tokens):
        x = hk.Embed(50, 16)(tokens)

        def layer(x):
            y = hk.LayerNorm(-1, True, True)(x)
            init = hk.initializers.VarianceScaling()
            x = x + hk.MultiHeadAttention(2, 8, w_init=init, model_size=16)(y, y, y)
            return x + hk.Linear(16, name="down")(jax.nn.gelu(hk.Linear(32, name="up")(x)))

        return hk.Linear(50, name="head")(hk.experimental.layer_stack(3, name="stack")(layer)(x))

    transformed = hk.without_apply_rng(hk.transform(model))
    params = jax.eval_shape(lambda: transformed.init(jax.random.key(0), jnp.zeros((2, 8), int)))
    kernels = [f"multi_head_attention/{n}" for n in ("query", "key", "value", "linear")]
    kernels += ["up", "down"]
    layer = "stack"
    assert placed(transformed.apply, params, TOKENS) == {
        "embed/embeddings": VOCABULARY,
        **{f"{layer}/{name}/w": (1, 2) for name in kernels},
        **{f"{layer}/{name}/b": ELEMENTWISE for name in kernels},
        **{f"{layer}/layer_norm/{name}": ELEMENTWISE for name in ("scale", "offset")},
        "head/w": VOCABULARY,
    }


def test_haiku_resnet():
    hk = importlib.import_module("haiku")
    network = hk.transform_with_state(lambda x: hk.nets.ResNet18(10)(x, True))
    params, state = jax.eval_shape(
        lambda: network.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    )

    def forward(params, state, images):
        return network.apply(params, state, None, images)

    images = jax.ShapeDtypeStruct((1, 32, 32, 3), "float32")
    for name, said in placed(forward, params, state, images).items():
        expected = ((0, 1, 2), 3) if "conv" in name else ELEMENTWISE
        assert said == (VOCABULARY if "logits" in name else expected), name


ATTENTION = {
    "attn/q_einsum/w": (1, (0, 2)),
    "attn/kv_einsum/w": (2, (1, 3)),
    "attn/attn_vec_einsum/w": ((0, 1), 2),
}


@pytest.mark.parametrize("name", ["Gemma2_2B", "Gemma3_270M", "Gemma3_1B", "Gemma4_26B_A4B"])
def test_gemma(name):
    gm = importlib.import_module("gemma.gm")
    model = getattr(gm.nn, name)()
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8), int)))

    def forward(params, tokens):
        return model.apply(params, tokens)

    expected = {f"params/layer_*/{leaf}": axes for leaf, axes in ATTENTION.items()}
    mlps = ["mlp"]
    if name == "Gemma4_26B_A4B":
        mlps = ["mlp*"]
        expected |= {
            "params/layer_*/attn/k_einsum/w": (1, (0, 2)),
            "params/layer_*/mlp/gating_einsum/w": (3, 2),
            "params/layer_*/mlp/linear/w": (1, 2),
            "params/layer_*/mlp/router_logits/w": (0, 1),
        }
    gating = (1, 2) if name == "Gemma2_2B" else (2, 1)
    for mlp in mlps:
        expected[f"params/layer_*/{mlp}/gating_einsum"] = gating
        expected[f"params/layer_*/{mlp}/linear"] = (0, 1)
    assert placed(forward, params, TOKENS) == expected | {
        "params/embedder/input_embedding": VOCABULARY
    }


def tunix_model(family: str, name: str, config: str, **overrides: Any) -> tuple[Any, ...]:
    nnx = importlib.import_module("flax.nnx")
    module = importlib.import_module(f"tunix.models.{family}.model")
    settings = getattr(module.ModelConfig, config)()
    for key, value in overrides.items():
        setattr(settings, key, value)
    model = nnx.eval_shape(lambda: getattr(module, name)(settings, rngs=nnx.Rngs(0)))
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def forward(params, rest, tokens, positions, mask):
        return nnx.merge(graph, params, rest)(tokens, positions, None, mask)

    return forward, params, rest, TOKENS, TOKENS, MASK


TUNIX_ATTENTION = {
    **{f"layers/*/attn/{n}_proj/w": (0, (1, 2)) for n in "qkv"},
    "layers/*/attn/o_proj/w": ((0, 1), 2),
    "embedder/input_embedding": VOCABULARY,
}
TUNIX_MLP = {f"layers/*/mlp/{n}_proj/kernel": (0, 1) for n in ("gate", "up", "down")}
TUNIX_HEAD = {"lm_head/w": VOCABULARY}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (("llama3", "Llama3", "llama3p2_1b"), TUNIX_ATTENTION | TUNIX_MLP),
        (("llama3", "Llama3", "llama3p1_8b"), TUNIX_ATTENTION | TUNIX_MLP | TUNIX_HEAD),
        (("qwen3", "Qwen3", "qwen3_0p6b"), TUNIX_ATTENTION | TUNIX_MLP),
    ],
    ids=lambda value: value[2] if isinstance(value, tuple) else "",
)
def test_tunix(model, expected):
    assert placed(*tunix_model(*model)) == expected


def test_tunix_mixture_of_experts():
    # JAX traces every expert of every layer apart: 48 layers take over a minute.
    said = placed(*tunix_model("qwen3", "Qwen3", "qwen3_30b_a3b", num_layers=2))
    assert said == TUNIX_ATTENTION | TUNIX_HEAD | {
        **{f"layers/*/mlp/{n}_proj": (1, 2) for n in ("gate", "up", "down")},
        "layers/*/mlp/router/kernel": (0, 1),
    }
