"""What a traced model says of its parameters is what its author would say, for all leaves."""

import dataclasses
import functools
import math
import random
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec

from apollo_optax import ApolloDimensionNumbers, apollo_mini, infer_dimension_numbers
from apollo_optax.dimension_numbers._infer import placements

TOKENS = jax.ShapeDtypeStruct((2, 6), "int32")
VOCABULARY, ELEMENTWISE, UNKNOWN = "vocabulary", "elementwise", "unknown"
MODELS: dict[str, tuple[Callable[..., Any], Any, tuple[Any, ...], Any]] = {}


def shape(*sizes: int, dtype: str = "float32") -> Any:
    return jax.ShapeDtypeStruct(sizes, dtype)


def matrix(reduction: Any, output: Any) -> ApolloDimensionNumbers:
    return ApolloDimensionNumbers(reduction, output)


def model(params: Any, *inputs: Any, **expected: Any) -> Callable[..., Any]:
    """Registers a model; what is expected of a leaf is its kind or its matrix."""

    def register(forward: Callable[..., Any]) -> Callable[..., Any]:
        MODELS[forward.__name__] = (forward, params, inputs, expected)
        return forward

    return register


def said(forward: Callable[..., Any], params: Any, *inputs: Any) -> dict[str, Any]:
    with jax.numpy_rank_promotion("allow"):  # the models are written as users write theirs
        placed = placements(forward, params, *inputs)
    names = [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, _ in jax.tree.leaves_with_path(params)
    ]
    return {
        name: at.spec if at.kind == "matrix" else at.kind
        for name, at in zip(names, placed, strict=True)
    }


@model(
    {"a": shape(4, 8), "bias": shape(8), "b": shape(8, 3)},
    shape(2, 4),
    a=matrix(0, 1),
    bias=ELEMENTWISE,
    b=VOCABULARY,
)
def perceptron(params, x):
    return jnp.tanh(x @ params["a"] + params["bias"]) @ params["b"]


def attend(q, k, v):
    weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
    return jnp.einsum("bhts,bshd->bthd", weights, v)


def normalized(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True)) * scale


@model(
    {
        "table": shape(20, 8),
        "positions": shape(6, 8),
        "norm": shape(8),
        "q": shape(8, 2, 4),
        "kv": shape(2, 8, 2, 4),
        "bias": shape(2, 4),
        "out": shape(2, 4, 8),
        "gating": shape(2, 8, 16),
        "down": shape(16, 8),
    },
    TOKENS,
    table=VOCABULARY,
    positions=ELEMENTWISE,
    norm=ELEMENTWISE,
    q=matrix(0, (1, 2)),
    kv=matrix(1, (2, 3)),
    bias=ELEMENTWISE,
    out=matrix((0, 1), 2),
    gating=matrix(1, 2),
    down=matrix(0, 1),
)
def gemma(params, tokens):
    """Joint einsums with a leading axis that is taken apart, tied embeddings, biases of heads."""
    x = params["table"][tokens] * 8**0.5 + params["positions"][None, : tokens.shape[1]]
    y = normalized(x, params["norm"][None, None])
    q = jnp.einsum("btd,dhk->bthk", y, params["q"]) + params["bias"][None, None]
    k, v = jnp.einsum("btd,cdhk->cbthk", y, params["kv"])
    x = x + jnp.einsum("bthk,hkd->btd", attend(q, k, v), params["out"])
    gate, up = jnp.einsum("btd,ndf->nbtf", x, params["gating"])
    x = x + jax.nn.gelu(gate) * up @ params["down"]
    return jnp.einsum("btd,vd->btv", x, params["table"])


LAYER = {"norm": shape(3, 8), "up": shape(3, 8, 16), "down": shape(3, 16, 8)}


def block(x, w):
    return x + jax.nn.silu(normalized(x, w["norm"][None, None]) @ w["up"]) @ w["down"]


@model(
    {"table": shape(20, 8), **LAYER, "head": shape(8, 20)},
    TOKENS,
    table=VOCABULARY,
    norm=ELEMENTWISE,
    up=matrix(1, 2),
    down=matrix(1, 2),
    head=VOCABULARY,
)
def scanned_with_remat_and_a_loss(params, tokens):
    def layer(x, w):
        return jax.checkpoint(block)(x, w), x.mean()

    x = params["table"][tokens]
    x, means = jax.lax.scan(layer, x, {name: params[name] for name in LAYER})
    losses = optax.softmax_cross_entropy_with_integer_labels(x @ params["head"], tokens)
    return losses.mean() + 0.1 * means.sum(), {"hidden": means}


@model(
    {"norm": shape(8, 3), "up": shape(8, 3, 16), "down": shape(16, 3, 8), "head": shape(8, 5)},
    shape(2, 4, 8),
    norm=ELEMENTWISE,
    up=matrix(0, 2),
    down=matrix(0, 2),
    head=VOCABULARY,
)
def scanned_on_axis_one(params, x):
    moved = {name: jnp.moveaxis(params[name], 1, 0) for name in LAYER}
    x, _ = jax.lax.scan(lambda x, w: (block(x, w), None), x, moved)
    return x @ params["head"]


@model(LAYER, shape(2, 4, 8), norm=ELEMENTWISE, up=matrix(1, 2), down=matrix(1, 2))
def layers_in_a_loop_with_a_counter(params, x):
    return jax.lax.fori_loop(0, 3, lambda i, x: block(x, jax.tree.map(lambda w: w[i], params)), x)


@model(LAYER, shape(2, 4, 8), norm=ELEMENTWISE, up=matrix(1, 2), down=matrix(1, 2))
def layers_by_static_index(params, x):
    for i in range(3):
        x = block(x, jax.tree.map(lambda w, i=i: w[i], params))
    return x


@model(
    LAYER,
    shape(2, 4, 8),
    shape(dtype="int32"),
    norm=VOCABULARY,
    up=matrix(1, 2),
    down=matrix(1, 2),
)
def layer_chosen_by_an_input(params, x, index):
    return block(
        block(x, jax.tree.map(lambda w: w[index], params)), jax.tree.map(lambda w: w[0], params)
    )


@model(
    {"a": shape(8, 8), "b": shape(8, 8), "scale": shape(8), "head": shape(8, 2)},
    shape(2, 8),
    a=matrix(0, 1),
    b=matrix(0, 1),
    scale=ELEMENTWISE,
    head=VOCABULARY,
)
def branches_and_while(params, x):
    x = jax.lax.cond(x.sum() > 0, lambda x: x @ params["a"], lambda x: x * params["scale"][None], x)
    x = jax.lax.while_loop(lambda x: x.sum() < 1, lambda x: jnp.tanh(x @ params["b"]), x)
    return x @ params["head"]


lora = model(
    {"w": shape(8, 16), "a": shape(8, 2), "b": shape(2, 16), "head": shape(16, 2)},
    shape(2, 8),
    w=matrix(0, 1),
    a=matrix(0, 1),
    b=matrix(0, 1),
    head=VOCABULARY,
)


@lora
def lora_merged(params, x):
    return jax.nn.relu(x @ (params["w"] + params["a"] @ params["b"])) @ params["head"]


@lora
def lora_beside(params, x):
    x = jax.nn.relu(x @ params["w"] + x @ params["a"] @ params["b"] * 0.5)
    return x @ params["head"]


EXPERTS = {"gate": shape(8, 4), "wi": shape(4, 8, 16), "wo": shape(4, 16, 8), "head": shape(8, 5)}
EXPERTS_SAID = {
    "gate": matrix(0, 1),
    "wi": matrix(1, 2),
    "wo": matrix(1, 2),
    "head": VOCABULARY,
}


@model(EXPERTS, shape(6, 8), **EXPERTS_SAID)
def experts_all_computed(params, x):
    weights = jax.nn.softmax(x @ params["gate"])
    hidden = jax.nn.silu(jnp.einsum("bd,edf->ebf", x, params["wi"]))
    y = jnp.einsum("ebf,efd->ebd", hidden, params["wo"])
    return jnp.einsum("ebd,be->bd", y, weights) @ params["head"], weights.mean(0)


@model(EXPERTS, shape(6, 8), **EXPERTS_SAID)
def experts_ragged(params, x):
    chosen = jnp.argmax(x @ params["gate"], axis=-1)
    order = jnp.argsort(chosen)
    sizes = jnp.bincount(chosen, length=4)
    hidden = jax.nn.silu(jax.lax.ragged_dot(x[order], params["wi"], sizes))
    y = jax.lax.ragged_dot(hidden, params["wo"], sizes)[jnp.argsort(order)]
    return (x + y * jax.nn.softmax(x @ params["gate"]).max(-1, keepdims=True)) @ params["head"]


@model(
    {"gating": shape(4, 2, 16, 8), "wo": shape(4, 16, 8), "head": shape(8, 5)},
    shape(6, 8),
    shape(4, dtype="int32"),
    gating=matrix(3, 2),
    wo=matrix(1, 2),
    head=VOCABULARY,
)
def experts_ragged_with_joint_gates(params, x, sizes):
    gating = jnp.transpose(params["gating"], (0, 3, 1, 2)).reshape(4, 8, 32)
    gate, up = jnp.split(jax.lax.ragged_dot(x, gating, sizes), 2, axis=-1)
    x = x + jax.lax.ragged_dot(jax.nn.silu(gate) * up, params["wo"], sizes)
    return x @ params["head"]


@model(EXPERTS, shape(6, 8), **EXPERTS_SAID)
def experts_dispatched(params, x):
    weights = jax.nn.softmax(x @ params["gate"])
    dispatch = jax.nn.one_hot(jnp.argmax(weights, -1), 4)
    inside = jnp.einsum("be,bd->ebd", dispatch, x)
    y = jax.vmap(lambda x, wi, wo: jax.nn.silu(x @ wi) @ wo)(inside, params["wi"], params["wo"])
    return jnp.einsum("ebd,be->bd", y, weights) @ params["head"]


@model(EXPERTS, shape(6, 8), **EXPERTS_SAID)
def experts_gathered_for_each_token(params, x):
    weights, chosen = jax.lax.top_k(jax.nn.softmax(x @ params["gate"]), 2)
    hidden = jax.nn.silu(jnp.einsum("bd,bkdf->bkf", x, params["wi"][chosen]))
    y = jnp.einsum("bkf,bkfd->bkd", hidden, params["wo"][chosen])
    return jnp.einsum("bkd,bk->bd", y, weights) @ params["head"]


@model(
    {"table": shape(20, 8), "head": shape(8, 20)},
    TOKENS,
    table=VOCABULARY,
    head=VOCABULARY,
)
def looked_up_by_one_hot(params, tokens):
    return jax.nn.one_hot(tokens, 20) @ params["table"] @ params["head"]


@model(
    {"qkv": shape(8, 24), "out": shape(8, 8), "head": shape(8, 3)},
    shape(2, 6, 8),
    qkv=matrix(0, 1),
    out=matrix(0, 1),
    head=VOCABULARY,
)
def joint_kernel_split_behind_the_product(params, x):
    q, k, v = (y.reshape(2, 6, 2, 4) for y in jnp.split(x @ params["qkv"], 3, axis=-1))
    return attend(q, k, v).reshape(2, 6, 8) @ params["out"] @ params["head"]


@model(
    {
        "q": shape(8, 16),
        "k": shape(8, 8),
        "v": shape(8, 8),
        "out": shape(16, 8),
        "head": shape(8, 3),
    },
    shape(2, 6, 8),
    q=matrix(0, 1),
    k=matrix(0, 1),
    v=matrix(0, 1),
    out=matrix(0, 1),
    head=VOCABULARY,
)
def grouped_queries_with_kernels_split_into_heads(params, x):
    q = jnp.einsum("btd,dkgh->btkgh", x, params["q"].reshape(8, 2, 2, 4))
    k, v = (jnp.einsum("btd,dkh->btkh", x, params[n].reshape(8, 2, 4)) for n in "kv")
    weights = jax.nn.softmax(jnp.einsum("btkgh,bskh->bkgts", q, k))
    y = jnp.einsum("bkgts,bskh->btkgh", weights, v)
    x = x + jnp.einsum("btkgh,kghd->btd", y, params["out"].reshape(2, 2, 4, 8))
    return x @ params["head"], (k, v)


@model(
    {
        "q": shape(8, 2, 4),
        "kv": shape(2, 8, 2, 4),
        "out": shape(2, 4, 8),
        "head": shape(8, 3),
    },
    shape(2, 6, 8),
    q=matrix(0, (1, 2)),
    kv=matrix(1, (2, 3)),
    out=matrix((0, 1), 2),
    head=VOCABULARY,
)
def rotary_embedding_that_rolls_the_features_of_heads(params, x):
    def rotated(y):
        left = jnp.concatenate([y[..., 1:], y[..., :1]], axis=-1)
        odd = jnp.arange(4) % 2 == 1
        return y + jnp.where(odd, jnp.roll(y, 1, axis=-1), left)

    kv = jnp.einsum("btd,cdhk->cbthk", x, params["kv"])
    q = jnp.einsum("btd,dhk->bthk", x, params["q"])
    cache = jnp.concatenate([rotated(kv[:1]), kv[1:]])  # keys and values stay apart
    y = attend(rotated(q), cache[0], cache[1])
    return jnp.einsum("bthk,hkd->btd", y, params["out"]) @ params["head"], cache


@model(
    {
        "q": shape(8, 2, 6),
        "kv_a": shape(8, 5),
        "kv_b": shape(4, 2, 8),
        "out": shape(2, 4, 8),
        "head": shape(8, 3),
    },
    shape(2, 6, 8),
    q=matrix(0, (1, 2)),
    kv_a=matrix(0, 1),
    kv_b=matrix(0, (1, 2)),
    out=matrix((0, 1), 2),
    head=VOCABULARY,
)
def latent_attention(params, x):
    q = jnp.einsum("btd,dhk->bthk", x, params["q"])
    latent, k_shared = jnp.split(x @ params["kv_a"], [4], axis=-1)
    k, v = jnp.split(jnp.einsum("btc,chk->bthk", latent, params["kv_b"]), 2, axis=-1)
    shared = jnp.broadcast_to(k_shared[:, :, None], (2, 6, 2, 1))
    k = jnp.concatenate([k, shared, shared], axis=-1)
    return jnp.einsum("bthk,hkd->btd", attend(q, k, v), params["out"]) @ params["head"]


@model(
    {
        "patches": shape(4, 4, 3, 8),
        "depthwise": shape(3, 3, 1, 8),
        "grouped": shape(3, 3, 4, 8),
        "class": shape(1, 1, 8),
        "line": shape(3, 8, 8),
        "head": shape(8, 10),
    },
    shape(2, 16, 16, 3),
    patches=matrix((0, 1, 2), 3),
    depthwise=ELEMENTWISE,
    grouped=matrix((0, 1, 2), 3),
    line=matrix((0, 1), 2),
    head=VOCABULARY,
    **{"class": ELEMENTWISE},
)
def convolutions(params, images):
    def convolved(x, kernel, stride, groups=1):
        layout = ("NHWC", "HWIO", "NHWC") if x.ndim == 4 else ("NWC", "WIO", "NWC")
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride,) * (x.ndim - 2),
            "SAME",
            dimension_numbers=layout,
            feature_group_count=groups,
        )

    x = convolved(images, params["patches"], 4)
    x = x + convolved(jax.nn.relu(x), params["depthwise"], 1, 8)
    x = x + convolved(x, params["grouped"], 1, 2)
    x = jnp.concatenate([jnp.tile(params["class"], (2, 1, 1)), x.reshape(2, 16, 8)], axis=1)
    return convolved(jax.nn.relu(x), params["line"], 1)[:, 0] @ params["head"]


@model(
    {
        "w": shape(8, 16),
        "g": shape(16),
        "int": shape(16, 4, 4, dtype="int8"),
        "scale": shape(16, 4, 1),
    },
    shape(2, 8),
    w=matrix(0, 1),
    g=ELEMENTWISE,
    int=VOCABULARY,
    scale=ELEMENTWISE,
)
def weight_norm_and_quantized_head(params, x):
    w = params["w"] * (params["g"] / jnp.linalg.norm(params["w"], axis=0))[None]
    head = (params["int"].astype("float32") * params["scale"]).reshape(16, 16)
    return jnp.tanh(x @ w.astype("bfloat16").astype("float32")) @ head


@jax.custom_vjp
def through(x, w):
    return jnp.tanh(x @ w)


through.defvjp(lambda x, w: (through(x, w), (x, w)), lambda saved, g: saved)


@model(
    {"a": shape(8, 8), "b": shape(8, 8)},
    shape(2, 8),
    a=matrix(0, 1),
    b=VOCABULARY,
)
def custom_derivatives_and_jit(params, x):
    return jax.jit(lambda x, w: jax.nn.relu(x) @ w)(through(x, params["a"]), params["b"])


@model(
    {"w": shape(8, 16), "out": shape(16, 8), "head": shape(8, 3)},
    shape(2, 8),
    w=matrix(0, 1),
    out=matrix(0, 1),
    head=VOCABULARY,
)
def sharded(params, x):
    mesh = jax.make_mesh((2,), ("m",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(x, w, out):
        w = jax.lax.all_gather(w, "m", axis=0, tiled=True)
        return jax.lax.psum(x @ w @ out, "m")

    in_specs = (PartitionSpec(), PartitionSpec("m"), PartitionSpec())
    y = jax.shard_map(
        local, mesh=mesh, in_specs=in_specs, out_specs=PartitionSpec(), check_vma=False
    )(x, params["w"], params["out"])
    head = jax.lax.with_sharding_constraint(
        params["head"], jax.sharding.NamedSharding(mesh, PartitionSpec(None, None))
    )
    return y @ head


@model(
    {"ih": shape(4, 32), "hh": shape(8, 32), "h0": shape(1, 8), "head": shape(8, 2)},
    shape(5, 1, 4),
    ih=matrix(0, 1),
    hh=matrix(0, 1),
    h0=ELEMENTWISE,
    head=VOCABULARY,
)
def recurrent_with_a_learned_start(params, x):
    def cell(state, x):
        h, c = state
        i, f, g, o = jnp.split(x @ params["ih"] + h @ params["hh"], 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return (jax.nn.sigmoid(o) * jnp.tanh(c), c), None

    (h, _), _ = jax.lax.scan(cell, (params["h0"], jnp.zeros((1, 8))), x)
    return h @ params["head"]


@model(
    {"queries": shape(3, 8), "q": shape(8, 8), "kv": shape(8, 16), "mean": shape(8, 2)},
    shape(2, 6, 8),
    queries=ELEMENTWISE,
    q=matrix(0, 1),
    kv=matrix(0, 1),
    mean=VOCABULARY,
)
def learned_queries(params, x):
    q = jnp.broadcast_to(params["queries"], (2, 3, 8)) @ params["q"]
    k, v = jnp.split(x @ params["kv"], 2, axis=-1)
    y = jax.nn.softmax(q @ jnp.swapaxes(k, 1, 2)) @ v @ params["mean"]
    return y[..., 0], jnp.exp(y[..., 1])


@model(
    [{"up": shape(8, 16), "down": shape(16, 8)}] * 3,
    shape(2, 8),
    **{f"{i}.{name}": matrix(0, 1) for i in range(3) for name in ("up", "down")},
)
def encoder_without_a_head(params, x):
    for w in params:
        x = x + jax.nn.relu(x @ w["up"]) @ w["down"]
    return x


@model(
    {"w": shape(8, 4), "bias": shape(8)},
    shape(2, 8),
    w=matrix(0, 1),
    bias=ELEMENTWISE,
)
def tied_autoencoder(params, x):
    return jnp.tanh(x @ params["w"]) @ params["w"].T + params["bias"]


@model(
    {"w": shape(8, 16), "head": shape(16, 3)},
    shape(2, 8),
    jax.eval_shape(lambda: jax.random.key(0)),
    w=matrix(0, 1),
    head=VOCABULARY,
)
def dropped_weights(params, x, key):
    mask = jax.random.bernoulli(key, 0.5, (8, 16))
    return jax.nn.relu(x @ jnp.where(mask, params["w"] * 2, 0)) @ params["head"]


@model(
    {"table": shape(20, 8), "w": shape(8, 8), "head": shape(8, 20)},
    shape(dtype="int32"),
    table=VOCABULARY,
    w=matrix(0, 1),
    head=VOCABULARY,
)
def one_token_alone(params, token):
    return jax.nn.relu(params["table"][token] @ params["w"]) @ params["head"]


@pytest.mark.parametrize("name", MODELS)
def test_every_leaf_is_placed_as_by_hand(name):
    forward, params, inputs, expected = MODELS[name]
    assert said(forward, params, *inputs) == expected


def random_layer(rng: random.Random) -> tuple[Callable[..., Any], Any, Any, Any]:
    """A kernel whose axes are split, permuted and merged, and a model that undoes it."""
    roles = {"l": "batch", "r": "reduction", "o": "output"}
    roles |= dict(
        rng.sample([("e", "batch"), ("s", "reduction"), ("p", "output")], rng.randint(0, 3))
    )
    sizes = {"l": 4, "e": 6, "r": 8, "s": 10, "o": 12, "p": 14}
    atoms = []
    for letter in roles:
        atoms += (
            [(letter, 0, 2), (letter, 1, sizes[letter] // 2)]
            if rng.random() < 0.4
            else [(letter, 0, sizes[letter])]
        )
    rng.shuffle(atoms)
    stored: list[list[Any]] = []
    for atom in atoms:
        if stored and roles[stored[-1][-1][0]] == roles[atom[0]] and rng.random() < 0.6:
            stored[-1].append(atom)
        else:
            stored.append([atom])
    kernel = shape(*(math.prod(size for _, _, size in axis) for axis in stored))
    kinds = [roles[axis[0][0]] for axis in stored]
    sides = [tuple(a for a, k in enumerate(kinds) if k == kind) for kind in ("reduction", "output")]
    expected = matrix(*(side if len(side) > 1 else side[0] for side in sides))

    inner = [letter for letter in roles if letter != "l"]
    of_w = rng.sample(inner, len(inner))
    of_x = rng.sample(
        ["n", *(letter for letter in inner if roles[letter] != "output")],
        k=len(inner) - sum(roles[a] == "output" for a in inner) + 1,
    )
    of_y = rng.sample(
        ["n", *(letter for letter in inner if roles[letter] != "reduction")],
        k=len(inner) - sum(roles[a] == "reduction" for a in inner) + 1,
    )
    equation = f"{''.join(of_x)},{''.join(of_w)}->{''.join(of_y)}"
    if rng.random() < 0.5:
        equation = f"{''.join(of_w)},{''.join(of_x)}->{''.join(of_y)}"
    turned = equation.startswith("".join(of_w) + ",")
    how, cast, remat = (
        rng.choice(["scan", "counter", "static"]),
        rng.random() < 0.5,
        rng.random() < 0.5,
    )
    layers_axis = rng.randint(0, len(of_w))

    def forward(params, x):
        w = params["w"].reshape([size for axis in stored for _, _, size in axis])
        order = [*of_w[:layers_axis], "l", *of_w[layers_axis:]]
        flat = [atom for axis in stored for atom in axis]
        by_letter = sorted(range(len(flat)), key=lambda i: (order.index(flat[i][0]), flat[i][1]))
        w = jnp.transpose(w, by_letter).reshape([sizes[letter] for letter in order])
        w = w.astype("bfloat16") if cast else w

        def layer(x, w):
            y = jnp.einsum(equation, *((w, x) if turned else (x, w)))
            return x + jnp.tanh(y).mean().astype(x.dtype)

        layer = jax.checkpoint(layer) if remat else layer
        if how == "scan":
            x, _ = jax.lax.scan(
                lambda x, w: (layer(x, w), None), x, jnp.moveaxis(w, layers_axis, 0)
            )
        elif how == "counter":
            at = functools.partial(
                jax.lax.dynamic_index_in_dim, w, axis=layers_axis, keepdims=False
            )
            x = jax.lax.fori_loop(0, 4, lambda i, x: layer(x, at(i)), x)
        else:
            for i in range(4):
                x = layer(x, w[(slice(None),) * layers_axis + (i,)])
        return x.reshape(-1, x.shape[-1]) @ params["head"]

    inputs = shape(*(3 if letter == "n" else sizes[letter] for letter in of_x))
    return forward, {"w": kernel, "head": shape(inputs.shape[-1], 5)}, inputs, expected


@pytest.mark.parametrize("seed", range(60))
def test_axes_of_a_random_einsum_are_found_through_splits_permutations_and_merges(seed):
    forward, params, inputs, expected = random_layer(random.Random(seed))
    assert said(forward, params, inputs) == {"w": expected, "head": VOCABULARY}


STACKED = {"w": shape(3 * 8, 16), "head": shape(16, 2)}


def opaque(x, w):
    """A kernel that no jaxpr looks into."""
    return pl.pallas_call(lambda *refs: None, jax.ShapeDtypeStruct((2, 16), x.dtype))(x, w)


def in_a_kernel(params, x):
    return opaque(x, params["w"]) @ params["head"]


def layers_merged_into_inputs(params, x):
    y, _ = jax.lax.scan(
        lambda y, w: (y + x @ w, None), jnp.zeros((2, 16)), params["w"].reshape(3, 8, 16)
    )
    return y @ params["head"]


def unused(params, x):
    return jax.jit(lambda params, x: jnp.tanh(x)[:, :1] * params["head"][:2])(params, x)


def summed_up(params, x):
    return jnp.tile(x, (1, 2)) * params["w"].sum(0) @ params["head"]


def cut_across(params, x):
    return jnp.tile(x, (1, 8)) @ params["w"].reshape(64, 6) @ params["head"][:6]


OPAQUE = {
    in_a_kernel: "'pallas_call' takes it",
    layers_merged_into_inputs: "axis 0 is split between batch and reduction",
    unused: "forward does not use it",
    summed_up: "it is only summed up",
    cut_across: "a reshape cuts across its axes",
}


@pytest.mark.parametrize("forward", OPAQUE, ids=lambda forward: forward.__name__)
def test_what_the_model_does_not_tell_is_said_once_and_left_to_adam(forward):
    with (
        jax.numpy_rank_promotion("allow"),
        pytest.warns(UserWarning, match="does not tell") as warned,
    ):
        specs = infer_dimension_numbers(forward, STACKED, shape(2, 8))
    assert specs["w"] is None
    (warning,) = warned
    said = str(warning.message)
    assert f"w (24, 16) ({OPAQUE[forward]}" in said
    assert "3,072 bytes" in said
    assert "dimension_numbers_from_rules" in said
    assert warning.filename == __file__


def test_contradicting_products_are_said_and_not_decided_by_order():
    def forward(params, x):
        one = jnp.einsum("bi,ijk->bjk", x, params["w"]).mean((1, 2))
        other = jnp.einsum("bij,ijk->bk", x[:, :, None] * x[:, None], params["w"])
        return (one[:, None] + other) @ params["head"]

    params = {"w": shape(8, 8, 4), "head": shape(4, 2)}
    assert said(forward, params, shape(2, 8)) == {"w": UNKNOWN, "head": VOCABULARY}


def test_names_stand_in_where_the_model_does_not_tell():
    params = {"mlp": {"kernel": shape(8, 16), "gamma": shape(8, 16)}}

    def forward(params, x):
        return sum(opaque(x, w) for w in jax.tree.leaves(params))

    with pytest.warns(UserWarning, match=r"mlp/gamma .* and mlp/kernel|mlp/kernel") as warned:
        specs = infer_dimension_numbers(forward, params, shape(2, 8))
    assert specs == {"mlp": {"gamma": None, "kernel": ApolloDimensionNumbers(-2, -1)}}
    assert len(warned) == 1


def test_no_warning_where_all_is_told():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forward, params, inputs, _ = MODELS["scanned_on_axis_one"]
        infer_dimension_numbers(forward, params, *inputs)


def test_embeddings_and_heads_are_matrices_on_demand():
    forward, params, inputs, _ = MODELS["looked_up_by_one_hot"]
    assert infer_dimension_numbers(forward, params, *inputs) == {"table": None, "head": None}
    specs = infer_dimension_numbers(forward, params, *inputs, project_embeddings=True)
    assert specs == {"table": matrix(0, 1), "head": matrix(0, 1)}


@pytest.mark.parametrize(
    "specification", [optax.contrib.MuonDimensionNumbers, optax.contrib.GaLoreDimensionNumbers]
)
def test_the_answer_comes_in_the_specifications_of_optax(specification):
    forward, params, inputs, _ = MODELS["scanned_on_axis_one"]
    specs = infer_dimension_numbers(forward, params, *inputs, specification=specification)
    assert specs["up"] == specification(reduction_axis=0, output_axis=2)
    assert type(specs["up"]) is specification
    assert specs["norm"] is None


def test_the_tree_is_what_apollo_takes():
    forward, shapes, inputs, _ = MODELS["scanned_on_axis_one"]
    params = jax.tree.map(lambda x: jnp.ones(x.shape), shapes)
    specs = infer_dimension_numbers(forward, params, *inputs)
    assert specs.keys() == params.keys()
    tx = apollo_mini(0.01, weight_dimension_numbers=specs)
    state = tx.init(params)
    updates, _ = tx.update(params, state, params)
    assert state[0].mu["up"].shape == (3, 1, 16)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Module:
    w: Any
    head: Any

    def __call__(self, x):
        return jnp.tanh(x @ self.w) @ self.head


def test_parameters_may_be_a_module_that_can_be_called():
    module = Module(jnp.ones((8, 16)), jnp.ones((16, 2)))
    specs = infer_dimension_numbers(lambda module, x: module(x), module, shape(2, 8))
    assert specs == Module(matrix(0, 1), None)
    assert apollo_mini(0.01, weight_dimension_numbers=specs).init(module)[0].mu["w"].shape == (
        1,
        16,
    )


def test_nothing_runs_and_other_leaves_are_passed_on():
    seen = []

    def forward(params, x, scale, training):
        seen.append((params["activation"], params["rate"], scale, training))
        return params["activation"](x @ params["w"]) * scale @ params["head"]

    params = {"w": shape(8, 8), "head": shape(8, 2), "activation": jnp.tanh, "rate": 0.5}
    specs = infer_dimension_numbers(forward, params, shape(2, 8), 2.0, True)
    assert specs == {"w": matrix(0, 1), "head": None, "activation": None, "rate": None}
    assert seen == [(jnp.tanh, 0.5, 2.0, True)]


def test_inputs_may_be_closed_over():
    x = jnp.ones((2, 6), int)

    def forward(params):
        return block(params["table"][x], params) @ params["head"]

    params = {"table": shape(20, 8), "norm": shape(8), "up": shape(8, 16), "down": shape(16, 8)}
    expected: dict[str, Any] = {"table": VOCABULARY, "norm": ELEMENTWISE, "head": VOCABULARY}
    expected |= {"up": matrix(0, 1), "down": matrix(0, 1)}
    assert said(forward, {**params, "head": shape(8, 3)}) == expected


def test_a_forward_function_is_required_and_must_return_arrays():
    no_function: Any = {"w": shape(2, 2)}
    with pytest.raises(TypeError, match="forward must be a function"):
        infer_dimension_numbers(no_function, shape(2, 2))
    with pytest.raises(ValueError, match="forward returned no array"):
        infer_dimension_numbers(lambda params, x: None, {"w": shape(2, 2)}, shape(2, 2))
