"""Leaves of models of Flax and Equinox are placed as by hand, all of them."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

from apollo_optax import apollo_mini, describe, infer_dimension_numbers
from examples.llama import model as llama
from examples.llama.config import LlamaConfig
from tests.placed import placed

VOCABULARY, ELEMENTWISE = "vocabulary", "elementwise"
TOKENS = jax.ShapeDtypeStruct((2, 8), "int32")
KEY = jax.eval_shape(lambda: jax.random.key(0))


@pytest.fixture(autouse=True)
def as_users_run():
    with jax.numpy_rank_promotion("allow"):
        yield


CONFIG = LlamaConfig(
    vocab_size=48,
    hidden_size=32,
    intermediate_size=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
)


def llama_said(layer: str, reduction: int, output: int) -> dict[str, Any]:
    kernels = [f"attention/{x}_proj" for x in "qkvo"] + [
        f"mlp/{x}_proj" for x in ("gate", "up", "down")
    ]
    said: dict[str, Any] = {f"{layer}/{name}/kernel": (reduction, output) for name in kernels}
    return said | {"embed/embedding": VOCABULARY, "lm_head/kernel": VOCABULARY}


STACKED_NORMS = {f"blocks/{name}_norm/scale": ELEMENTWISE for name in ("attention", "mlp")}


@pytest.mark.parametrize("remat", [False, True])
def test_the_llama_of_the_examples_with_stacked_layers(remat):
    params = jax.eval_shape(lambda: llama.init_params(CONFIG, 0))

    def loss(params, tokens):
        logits = llama.forward(CONFIG, params, tokens, remat=remat)
        return llama.cross_entropy(logits, tokens).mean()

    assert placed(loss, params, TOKENS) == llama_said("blocks", 1, 2) | STACKED_NORMS


def test_the_llama_of_the_examples_with_layers_apart():
    params = jax.eval_shape(lambda: llama.init_params(CONFIG, 0))
    layer = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), params["blocks"])
    params["blocks"] = [layer] * 3

    def forward(params, tokens):
        x = llama.embed(CONFIG, params, tokens, jnp.float32)
        for layer in params["blocks"]:
            x = llama.block(CONFIG, layer, x)
        return llama.logits(CONFIG, params, x)

    assert placed(forward, params, TOKENS) == llama_said("blocks/*", 0, 1)


def test_the_state_and_the_module_of_nnx():
    module = nnx.eval_shape(lambda: llama.Llama(CONFIG, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(module)
    expected = llama_said("blocks", 1, 2) | STACKED_NORMS
    assert placed(lambda state, t: nnx.merge(graph, state)(t), state, TOKENS) == expected
    assert placed(lambda module, t: module(t), module, TOKENS) == expected


class NnxBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.attention = nnx.MultiHeadAttention(2, 16, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.up, self.down = nnx.Linear(16, 32, rngs=rngs), nnx.Linear(32, 16, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


class NnxModel(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(out_axes=1)
        def blocks(rngs: nnx.Rngs) -> NnxBlock:
            return NnxBlock(rngs)

        self.patches = nnx.Conv(3, 16, (4, 4), strides=(4, 4), rngs=rngs)
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.blocks = blocks(rngs)
        self.lora = nnx.LoRA(16, 2, 16, rngs=rngs)
        self.head = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, images):
        x = self.dropout(self.norm(self.patches(images)))
        x = x.reshape(len(x), -1, 16)
        scan = nnx.scan(lambda block, x: block(x), in_axes=(1, nnx.Carry), out_axes=nnx.Carry)
        x = scan(self.blocks, x)
        return self.head((x + self.lora(x)).mean(1))


HEADS_ON_AXIS_ONE = {
    "attention/query/kernel": (0, (2, 3)),
    "attention/key/kernel": (0, (2, 3)),
    "attention/value/kernel": (0, (2, 3)),
    "attention/out/kernel": ((0, 2), 3),
    "attention/query/bias": ELEMENTWISE,
    "attention/key/bias": ELEMENTWISE,
    "attention/value/bias": ELEMENTWISE,
    "attention/out/bias": ELEMENTWISE,
}


def test_nnx_layers_scanned_on_axis_one_with_convolution_and_lora():
    graph, *states = nnx.split(NnxModel(nnx.Rngs(0)), nnx.Param, ...)
    images = jax.ShapeDtypeStruct((2, 8, 8, 3), "float32")

    def forward(params, rest, images):
        return nnx.merge(graph, params, rest)(images)

    assert placed(forward, *states, images) == {
        "patches/kernel": ((0, 1, 2), 3),
        **{f"blocks/{name}": said for name, said in HEADS_ON_AXIS_ONE.items()},
        "blocks/norm/scale": ELEMENTWISE,
        "blocks/norm/bias": ELEMENTWISE,
        "blocks/up/kernel": (0, 2),
        "blocks/up/bias": ELEMENTWISE,
        "blocks/down/kernel": (0, 2),
        "blocks/down/bias": ELEMENTWISE,
        "lora/lora_a": (0, 1),
        "lora/lora_b": (0, 1),
        "head/kernel": VOCABULARY,
    }


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        attention = nn.MultiHeadDotProductAttention(
            2, dropout_rate=0.1, deterministic=False, name="attention"
        )
        x = x + attention(nn.LayerNorm(name="norm")(x))
        hidden = nn.gelu(nn.Dense(32, name="up")(x))
        return x + nn.Dense(16, name="down")(hidden), None


class LinenModel(nn.Module):
    axis: int

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(50, 16, name="embed")
        positions = self.param("positions", nn.initializers.normal(), (1, 64, 16))
        blocks = nn.scan(
            nn.remat(LinenBlock, prevent_cse=False),
            variable_axes={"params": self.axis},
            split_rngs={"params": True, "dropout": True},
            length=3,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(name="blocks")
        x, _ = blocks(embed(tokens) + positions[:, : tokens.shape[1]], None)
        return embed.attend(nn.LayerNorm(name="norm")(x))


@pytest.mark.parametrize("axis", [0, 1])
def test_linen_layers_scanned_with_remat_dropout_and_tied_embeddings(axis):
    model = LinenModel(axis)
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    params = jax.eval_shape(lambda: model.init(rngs, jnp.zeros((2, 8), int))["params"])

    def forward(params, tokens, key):
        return model.apply({"params": params}, tokens, rngs={"dropout": key})

    other = 1 - axis
    assert placed(forward, params, TOKENS, KEY) == {
        "embed/embedding": VOCABULARY,
        "positions": ELEMENTWISE,
        **{f"blocks/attention/{n}/kernel": (other, (2, 3)) for n in ("query", "key", "value")},
        **{f"blocks/attention/{n}/bias": ELEMENTWISE for n in ("query", "key", "value", "out")},
        "blocks/attention/out/kernel": ((other if axis else 1, 2), 3),
        **{f"blocks/norm/{n}": ELEMENTWISE for n in ("scale", "bias")},
        **{f"blocks/{n}/kernel": (other, 2) for n in ("up", "down")},
        **{f"blocks/{n}/bias": ELEMENTWISE for n in ("up", "down")},
    }


class Boxed(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        x = nn.WeightNorm(nn.Dense(16, name="normed"))(x)
        x = nn.RNN(nn.LSTMCell(8, name="cell"))(nn.Dense(16, kernel_init=init, name="boxed")(x))
        return nn.Dense(3, name="head")(x)


def test_boxed_parameters_weight_norm_and_recurrence_of_linen():
    model = Boxed()
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((2, 5, 8)))["params"])

    def forward(params, x):
        return model.apply({"params": params}, x)

    x = jax.ShapeDtypeStruct((2, 5, 8), "float32")
    cell = {f"cell/{side}{gate}/kernel": (0, 1) for side in "ih" for gate in "ifgo"}
    assert placed(forward, params, x) == {
        "normed/kernel": (0, 1),
        "boxed/kernel": (0, 1),
        "head/kernel": VOCABULARY,
        **cell,
    }
    specs = infer_dimension_numbers(forward, params, x)
    state = apollo_mini(0.01, weight_dimension_numbers=specs).init
    (moment,) = jax.tree.leaves(jax.eval_shape(state, params)[0].mu["boxed"]["kernel"])
    assert moment.shape == (1, 16)


class EquinoxModel(eqx.Module):
    embed: eqx.nn.Embedding
    attention: eqx.nn.MultiheadAttention
    norm: eqx.nn.LayerNorm
    conv: eqx.nn.Conv1d
    cell: eqx.nn.GRUCell
    head: eqx.nn.Linear

    def __init__(self):
        keys = jax.random.split(jax.random.key(0), 5)
        self.embed = eqx.nn.Embedding(50, 16, key=keys[0])
        self.attention = eqx.nn.MultiheadAttention(2, 16, key=keys[1])
        self.norm = eqx.nn.LayerNorm((8, 16))
        self.conv = eqx.nn.Conv1d(16, 16, 3, padding=1, key=keys[2])
        self.cell = eqx.nn.GRUCell(16, 16, key=keys[3])
        self.head = eqx.nn.Linear(16, 50, key=keys[4])

    def __call__(self, tokens):
        x = self.norm(jax.vmap(self.embed)(tokens))
        x = self.conv((x + self.attention(x, x, x)).T).T
        h, _ = jax.lax.scan(lambda h, x: (self.cell(x, h), None), jnp.zeros(16), x)
        return self.head(h)


EQUINOX_SAID = {
    "embed/weight": VOCABULARY,
    **{f"attention/{n}_proj/weight": (1, 0) for n in ("query", "key", "value", "output")},
    "norm/weight": ELEMENTWISE,
    "norm/bias": ELEMENTWISE,
    "conv/weight": ((1, 2), 0),
    "conv/bias": ELEMENTWISE,
    "cell/weight_ih": (1, 0),
    "cell/weight_hh": (1, 0),
    "head/weight": VOCABULARY,
}


@pytest.mark.parametrize("batched", [False, True])
def test_equinox_for_one_example_and_for_a_batch(batched):
    def forward(model, tokens):
        return jax.vmap(model)(tokens) if batched else model(tokens)

    tokens = jax.ShapeDtypeStruct((5, 8) if batched else (8,), "int32")
    assert placed(forward, EquinoxModel(), tokens) == EQUINOX_SAID


def test_a_module_of_equinox_is_described_and_trained():
    model = EquinoxModel()
    tokens = jax.ShapeDtypeStruct((8,), "int32")
    specs = infer_dimension_numbers(lambda model, tokens: model(tokens), model, tokens)
    tx = apollo_mini(0.01, weight_dimension_numbers=specs)
    table = describe(model, tx, lambda model, tokens: model(tokens), tokens)
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    assert table.state_bytes == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert table.remarks == []
