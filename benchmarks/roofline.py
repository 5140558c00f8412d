"""How fast is a step at best, and does anything measured beat the bound?

    JAX_PLATFORMS=cpu python -m benchmarks.roofline

Adds rows to `results/roofline.json`, one for each that has none yet, of five kinds, or of one with
`--kind`:

- `count`: operations of a program as this project counts them, and as the TPU's compiler does.
- `program`: on this machine, whose peaks are measured by products, a copy and a sum, the bound on a
  program's time and the median of what it takes. Nothing else should run.
- `timed_update`: the bound on an update of LLaMA-7B's matrices, and measured times of it.
- `plan`: steps of LLaMA-7B on 8 A100s with plain data parallelism.
- `pod`: on pods of TPUs.

Compiles for an hour on two cores. Prints the tables. A bound is no speed: what a chip reaches is
below, often by half.
"""

import argparse
import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from apollo_optax.planning import parse_target
from apollo_optax.planning._collectives import read_traffic
from apollo_optax.planning._hlo import parse_program
from apollo_optax.planning._plan import compile_update
from apollo_optax.planning._roofline import Bounds, bounds, operations
from apollo_optax.planning._targets import Rates, devices_of, rates_of
from benchmarks import accelerator_step_time
from benchmarks.accelerator_step_time import OPTIMIZERS
from benchmarks.plans import plan_missing, row_of
from benchmarks.rows import RESULTS, Row, add_row, add_rows, read_rows
from examples.llama import layered, model, train
from examples.llama.config import MODELS, parameter_count
from examples.llama.optimizers import OptimizerSettings, make_optimizer
from examples.llama.plan import PlanConfig

OUTPUT = RESULTS / "roofline.json"
COMMAND = "JAX_PLATFORMS=cpu python -m benchmarks.roofline"

# Plans

_STEP = PlanConfig(model="7b", device="a100-80gb:8", mesh="data=8", rank=256)
_ADAMW = dataclasses.replace(_STEP, optimizer="adamw", moments="bf16")
_APOLLO = dataclasses.replace(_STEP, optimizer="apollo")
_MINI = dataclasses.replace(_STEP, optimizer="apollo_mini")
_LONG: dict[str, Any] = {"sequence": 2048, "remat": True}
# The largest that fit, of `largest_micro_batch`.
LARGEST = {
    "AdamW, bfloat16 moments": dataclasses.replace(_ADAMW, batch=13, **_LONG),
    "APOLLO, r = 256": dataclasses.replace(_APOLLO, batch=23, **_LONG),
    "APOLLO-Mini": dataclasses.replace(_MINI, batch=25, **_LONG),
    "AdamW, layer by layer": dataclasses.replace(
        _ADAMW, moments="f32", update="layerwise", batch=11, **_LONG
    ),
    "APOLLO-Mini, layer by layer": dataclasses.replace(
        _MINI, update="layerwise", batch=61, **_LONG
    ),
}
PAPERS = {
    "AdamW, bfloat16 moments": dataclasses.replace(_ADAMW, batch=4),
    "APOLLO, r = 256": dataclasses.replace(_APOLLO, batch=16),
    "APOLLO-Mini": dataclasses.replace(_MINI, batch=16),
}
PODS = {"tpu-v5e:16x16": "fsdp=256", "tpu-v5p:8x8x8": "data=2,fsdp=256"}
POD_STEPS = {
    "AdamW": dataclasses.replace(_ADAMW, moments="f32"),
    "APOLLO-Mini": _MINI,
}


def on_pod(config: PlanConfig, device: str, mesh: str) -> PlanConfig:
    """A step with one sequence of 2048 tokens a chip."""
    return dataclasses.replace(config, device=device, mesh=mesh, batch=1, **_LONG)


def claim_plans() -> Iterator[PlanConfig]:
    """Those of the A100s: at their largest micro-batch, and as in the paper."""
    yield from LARGEST.values()
    for config in PAPERS.values():
        yield config
        yield dataclasses.replace(config, remat=True)


def pod_plans() -> Iterator[PlanConfig]:
    """Those of the pods."""
    for device, mesh in PODS.items():
        yield from (on_pod(config, device, mesh) for config in POD_STEPS.values())


# Counts

_COUNTED_ON = "tpu-v5e"
_LAYER = dataclasses.replace(MODELS["60m"], num_layers=1)


def _counted() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Programs without a loop, whose body the compiler would count once, and their arguments."""

    def array(*sizes: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype)

    def mlp(weights: Any, x: Any) -> Any:
        return jnp.sum(jnp.tanh(x @ weights[0]) @ weights[1])

    def attention(query: Any, key: Any, value: Any) -> Any:
        return jnp.sum(jax.nn.dot_product_attention(query, key, value, is_causal=True))

    def convolution(kernel: Any, x: Any) -> Any:
        y = jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.sum(y * y)

    params = jax.eval_shape(lambda: model.init_params(_LAYER, 0, param_dtype=jnp.bfloat16))
    loss = train.make_loss(_LAYER, dtype=jnp.bfloat16, remat=False)
    heads = array(4, 512, 8, 64)
    return {
        "product": (jnp.matmul, (array(2048, 2048), array(2048, 2048))),
        "MLP, gradient": (
            jax.grad(mlp),
            ((array(512, 1376), array(1376, 512)), array(1024, 512)),
        ),
        "attention, gradient": (jax.grad(attention, argnums=(0, 1, 2)), (heads, heads, heads)),
        "convolution, gradient": (
            jax.grad(convolution, argnums=(0, 1)),
            (array(3, 3, 128, 256), array(8, 56, 56, 128)),
        ),
        "LLaMA with one layer, gradient": (
            jax.grad(loss),
            (params, array(4, 257, dtype=jnp.int32)),
        ),
    }


def count_row(name: str) -> Row:
    """Operations by this project's count and by the compiler's."""
    step, args = _counted()[name]
    target = parse_target(_COUNTED_ON)
    on_chip = jax.sharding.SingleDeviceSharding(devices_of(target)[0])
    jitted = jax.jit(step, in_shardings=on_chip)
    compiled = jitted.trace(*args).lower(lowering_platforms=("tpu",)).compile()
    program = parse_program(compiled.as_text() or "")
    if read_traffic(program).loops:
        raise ValueError(f"{name} has a loop, whose body the compiler counts once")
    analysis: Any = compiled.cost_analysis()
    return {
        "count": name,
        "target": _COUNTED_ON,
        "operations": operations(program),
        "compiler_operations": analysis["flops"],
    }


# This machine

_MODEL = MODELS["60m"]
_TOKENS = 256
_SECONDS, _MOST_RUNS = 1.0, 30

Carry = Any
Program = tuple[Callable[..., Carry], Carry, tuple[Any, ...]]
"""`step(carry, *others) -> carry`, and what it begins with."""


def _update_program(name: str) -> Program:
    optimizer = OPTIMIZERS[name](128)
    sizes = accelerator_step_time.shapes("60m", stacked=True)
    grads = {key: jnp.full(shape, 0.01, jnp.float32) for key, shape in sizes.items()}

    def step(carry: Carry, grads: Any) -> Carry:
        params, state = carry
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.copy, grads)
    return step, (params, jax.jit(optimizer.init)(params)), (grads,)


def _training_program(optimizer: Any, layer_by_layer: bool) -> Program:
    tx = make_optimizer(OptimizerSettings(optimizer, 1e-3, 1000, rank=128))
    if layer_by_layer:
        training = layered.layered_training(_MODEL, tx, dtype=jnp.float32, weights="f32")
    else:
        training = train.standard_training(_MODEL, tx, dtype=jnp.float32)
    params = training.keep(model.init_params(_MODEL, 0))
    state = training.init_state(params)
    return lambda state, tokens: training.step(state, tokens)[0], state, (_tokens(),)


def _tokens() -> Any:
    return jnp.arange(_TOKENS + 1, dtype=jnp.int32)[None] % _MODEL.vocab_size


def _loss_program(gradient: bool) -> Program:
    loss = train.make_loss(_MODEL, dtype=jnp.float32, remat=False)
    params = model.init_params(_MODEL, 0)
    if gradient:
        carry = jax.tree.map(jnp.copy, params)
        return (lambda _, *args: jax.grad(loss)(*args)), carry, (params, _tokens())
    return (lambda _, *args: loss(*args)), jnp.zeros(()), (params, _tokens())


def _mlp_program() -> Program:
    def loss(weights: Any, x: Any) -> Any:
        return jnp.sum(jnp.tanh(x @ weights[0]) @ weights[1])

    def step(weights: Carry, x: Any) -> Carry:
        return jax.tree.map(lambda w, g: w - 1e-6 * g, weights, jax.grad(loss)(weights, x))

    weights = jnp.full((1024, 4096), 0.01), jnp.full((4096, 1024), 0.01)
    return step, weights, (jnp.full((512, 1024), 0.1),)


PROGRAMS: dict[str, Callable[[], Program]] = {
    "update, SGD": lambda: _update_program("optax.sgd"),
    "update, AdamW": lambda: _update_program("optax.adamw"),
    "update, APOLLO-Mini": lambda: _update_program("APOLLO-Mini"),
    "update, APOLLO, r = 128": lambda: _update_program("APOLLO"),
    "MLP, step": _mlp_program,
    "loss": lambda: _loss_program(gradient=False),
    "gradient": lambda: _loss_program(gradient=True),
    "training step, AdamW": lambda: _training_program("adamw", layer_by_layer=False),
    "training step, APOLLO-Mini": lambda: _training_program("apollo_mini", layer_by_layer=False),
    "training step, APOLLO-Mini, layer by layer": lambda: _training_program(
        "apollo_mini", layer_by_layer=True
    ),
}


def _timed(step: Callable[[Carry], Carry], carry: Carry) -> list[float]:
    """Seconds of each run but the first two."""
    seconds: list[float] = []
    until = time.perf_counter() + _SECONDS
    while len(seconds) < 5 or (time.perf_counter() < until and len(seconds) < _MOST_RUNS):
        began = time.perf_counter()
        carry = jax.block_until_ready(step(carry))
        seconds.append(time.perf_counter() - began)
    return seconds[2:]


def machine_rates() -> Rates:
    """The peaks of this machine: the fastest run of several products, a copy and a sum."""
    rate = 0.0
    for size in (1024, 2048):
        x = jnp.full((size, size), 0.01, jnp.float32)
        seconds = min(_timed(jax.jit(lambda y, x=x: 0.1 * (y @ x)), x))
        rate = max(rate, 2 * size**3 / seconds)
    x = jnp.ones(1 << 26, jnp.float32)
    copy = 2 * x.nbytes / min(_timed(jax.jit(lambda x: x + 1, donate_argnums=0), jnp.copy(x)))
    add_up = jax.jit(lambda x, y: jnp.sum(x) + 0 * y)
    read = x.nbytes / min(_timed(functools.partial(add_up, x), jnp.zeros(())))
    caches = Path("/sys/devices/system/cpu/cpu0/cache").glob("index[23]/size")
    cache_bytes = 1024 * sum(int(path.read_text().strip().rstrip("K")) for path in caches)
    return Rates({32: rate}, max(copy, read), cache_bytes)


def program_rows() -> Iterator[Row]:
    """The bounds on the programs' times on this machine, and their medians.

    The peaks are the best of those between any two programs, as something else may run meanwhile.
    """
    peaks, timed = [machine_rates()], {}
    for name, make in PROGRAMS.items():
        step, carry, others = make()
        compiled = jax.jit(step, donate_argnums=0).lower(carry, *others).compile()
        seconds = _timed(functools.partial(_with_others, compiled, others), carry)
        timed[name] = parse_program(compiled.as_text() or ""), seconds
        peaks.append(machine_rates())
    rates = Rates(
        {32: max(peak.operations[32] for peak in peaks)},
        max(peak.memory_bytes for peak in peaks),
        peaks[0].cache_bytes,
    )
    for name, (program, seconds) in timed.items():
        yield {
            "program": name,
            "gigaflops": round(rates.operations[32] / 1e9, 1),
            "gigabytes_per_second": round(rates.memory_bytes / 1e9, 1),
            **_rounded(bounds(program, rates, device_count=1)),
            "fastest_seconds": round(min(seconds), 6),
            "step_seconds": round(statistics.median(seconds), 6),
        }


def _with_others(step: Callable[..., Carry], others: tuple[Any, ...], carry: Carry) -> Carry:
    return step(carry, *others)


def _rounded(found: Bounds) -> Row:
    at_least = max(found)
    return {
        "compute_seconds": round(found.compute_seconds, 6),
        "memory_seconds": round(found.memory_seconds, 6),
        "step_seconds_at_least": round(at_least, 6),
        "limited_by": "compute" if at_least == found.compute_seconds else "memory",
    }


# Published times

_PAPER = "arXiv:2412.05270"
_PAPERS_SECONDS = {"optax.adamw": 0.173, "APOLLO": 0.159, "APOLLO-Mini": 0.142, "GaLore": 2.874}
PUBLISHED = [
    # Matrix products of a token in a training step: 6 for each weight of a matrix.
    ("LLaMA-7B, 2,048 A100s", "7b", "a100-80gb", 1e12 / (82_432 * 3600), "arXiv:2302.13971"),
    (
        *("Llama 2 7B, 128 A100s", "7b", "a100-80gb", 3_700),
        "pytorch.org/blog/maximizing-training",
    ),
    (
        *("Llama 2 70B, 512 v5p", "70b", "tpu-v5p", 692),
        "maxtext.readthedocs.io/en/maxtext-v0.2.0/reference/models/tiering.html",
    ),
    (
        *("Llama 2 70B, 256 v6e", "70b", "tpu-v6e", 900),
        "maxtext.readthedocs.io/en/maxtext-v0.2.0/reference/models/tiering.html",
    ),
]
# Where only a share of the peak is published, with the products of attention in it.
UTILIZATIONS = [("Llama 2 70B, 256 v5e", 0.57, "github.com/google/maxtext")]


def update_names() -> Iterator[tuple[str, str]]:
    """Optimizer and chip of each measured update."""
    yield from ((name, "a100-80gb") for name in _PAPERS_SECONDS)
    measured = read_rows(accelerator_step_time.OUTPUT)
    yield from ((row["optimizer"], "h200") for row in measured if row.get("model") == "7b")


def update_row(name: str, target: str) -> Row:
    """The bound on an update of LLaMA-7B's matrices in bfloat16, and what was measured."""
    layers = MODELS["7b"].num_layers
    # Optax's GaLore takes no stacked layers: one layer of it, as often as there are layers.
    repeats = layers if name == "GaLore" else 1
    sizes = accelerator_step_time.shapes("7b", stacked=repeats == 1)
    if repeats > 1:
        sizes = {key: shape for key, shape in sizes.items() if key.endswith("_00")}
    params = {key: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for key, shape in sizes.items()}
    make = {"GaLore": lambda rank: optax.contrib.galore(1e-4, rank=rank), **OPTIMIZERS}[name]
    compiled = compile_update(make(256), params, target)
    rates = rates_of(parse_target(target))
    assert rates is not None
    of_one = bounds(parse_program(compiled.as_text() or ""), rates, device_count=1)
    found = Bounds(*(repeats * seconds for seconds in of_one))
    measured, source = _PAPERS_SECONDS.get(name), _PAPER
    if target == "h200":
        rows = read_rows(accelerator_step_time.OUTPUT)
        row = next(r for r in rows if r.get("model") == "7b" and r["optimizer"] == name)
        measured, source = row["step_seconds"], "accelerator_step_time.json"
    return {
        "timed_update": name,
        "target": target,
        **_rounded(found),
        "step_seconds": measured,
        "source": source,
    }


def tokens_per_second_at_most(name: str, target: str) -> float:
    """What a chip reaches at most of the products of weights, without attention."""
    shape, rates = MODELS[name], rates_of(parse_target(target))
    assert rates is not None
    weights = parameter_count(shape) - shape.vocab_size * shape.hidden_size
    return rates.operations[16] / (6 * weights)


# Tables


def table(rows: Sequence[Row]) -> str:
    """The bound on tokens a second of 8 A100s, in Markdown."""
    lines = [
        "| step | micro-batch | tokens/s at most | limited by | over AdamW's "
        "| without overlap | over AdamW's |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for configs, remat in ((LARGEST, True), (PAPERS, False), (PAPERS, True)):
        first: tuple[float, float] | None = None
        for name, config in configs.items():
            row = row_of(rows, dataclasses.replace(config, remat=remat))
            bound, alone = row["tokens_per_second_at_most"], _without_overlap(row)
            first = first or (bound, alone)
            activations = "recomputed" if remat else "kept"
            batch = f"{config.batch} x {config.sequence:,}, {activations}"
            batch += "" if row["fits"] else "; does not fit"
            lines.append(
                f"| {name} | {batch} | {bound:,.0f} | {row['limited_by']} | {bound / first[0]:.2f} "
                f"| {alone:,.0f} | {alone / first[1]:.2f} |"
            )
    return "\n".join(lines)


def pod_table(rows: Sequence[Row]) -> str:
    """The bound on tokens a second of TPU pods, in Markdown."""
    lines = [
        "| pod | optimizer | tokens/s at most | limited by | compute | memory | links |",
        "| --- | --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for (device, mesh), (name, config) in itertools.product(PODS.items(), POD_STEPS.items()):
        row = row_of(rows, on_pod(config, device, mesh))
        seconds = [
            f"{1e3 * row[f'{part}_seconds']:,.3g} ms"
            for part in ("compute", "memory", "collective")
        ]
        cells = [
            f"`{device}`, {mesh}",
            name,
            f"{row['tokens_per_second_at_most']:,.0f}",
            row["limited_by"],
            *seconds,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def machine_table(rows: Sequence[Row]) -> str:
    """Bounds and times of programs on a CPU, in Markdown."""
    lines = [
        "| program | bound | limited by | measured | over the bound |",
        "| --- | ---: | --- | ---: | ---: |",
    ]
    lines += [f"| {row['program']} | {_against(row)} |" for row in rows if "program" in row]
    return "\n".join(lines)


def published_table(rows: Sequence[Row]) -> str:
    """Bounds on updates of LLaMA-7B, and measured times, in Markdown."""
    lines = [
        "| update | chip | bound | limited by | measured | over the bound |",
        "| --- | --- | ---: | --- | ---: | ---: |",
    ]
    lines += [
        f"| {row['timed_update']} | `{row['target']}` | {_against(row)} |"
        for row in rows
        if "timed_update" in row
    ]
    lines += [
        "",
        "| training | tokens/s a chip | at most | share |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, shape, target, measured, source in PUBLISHED:
        bound = tokens_per_second_at_most(shape, target)
        lines.append(
            f"| [{name}](https://{_address(source)}) | {measured:,.0f} | {bound:,.0f} "
            f"| {measured / bound:.0%} |"
        )
    lines += [f"| [{name}](https://{at}) | | | {share:.0%} |" for name, share, at in UTILIZATIONS]
    return "\n".join(lines)


def count_table(rows: Sequence[Row]) -> str:
    """Operations by both counts, in Markdown."""
    lines = ["| program | compiler's count | this count over it |", "| --- | ---: | ---: |"]
    for row in rows:
        if "count" in row:
            share = row["operations"] / row["compiler_operations"]
            lines.append(
                f"| {row['count']} | {row['compiler_operations'] / 1e9:.2f}e9 | {share:.4f} |"
            )
    return "\n".join(lines)


def _against(row: Row) -> str:
    bound, measured = row["step_seconds_at_least"], row["step_seconds"]
    return (
        f"{1e3 * bound:.1f} ms | {row['limited_by']} | {1e3 * measured:.1f} ms "
        f"| {measured / bound:.2f}"
    )


def _without_overlap(row: Row) -> float:
    at_most, at_least = row["tokens_per_second_at_most"], row["step_seconds_at_least"]
    return at_most * at_least / row["step_seconds_without_overlap"]


def _address(source: str) -> str:
    return source.replace("arXiv:", "arxiv.org/abs/")


def main() -> None:
    """Adds what has no row yet, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = ("count", "program", "timed_update", "plan", "pod")
    parser.add_argument("--kind", choices=kinds, action="append")
    wanted = parser.parse_args().kind or kinds
    made: dict[str, list[tuple[Callable[..., Row], tuple[str, ...]]]] = {
        "count": [(count_row, (name,)) for name in _counted()],
        "timed_update": [(update_row, names) for names in update_names()],
    }
    for kind, rows in made.items():
        done = {(row.get(kind), row.get("target")) for row in read_rows(OUTPUT)}
        for make, names in rows if kind in wanted else ():
            if not any(names == key[: len(names)] for key in done):
                row = make(*names)
                print(row, flush=True)
                add_row(OUTPUT, COMMAND, row)
    if "program" in wanted and not any("program" in row for row in read_rows(OUTPUT)):
        add_rows(OUTPUT, COMMAND, list(program_rows()))
    if "plan" in wanted:
        plan_missing(OUTPUT, COMMAND, claim_plans())
    if "pod" in wanted:
        plan_missing(OUTPUT, COMMAND, pod_plans())
    for kind, of_kind in {
        "count": count_table,
        "program": machine_table,
        "timed_update": published_table,
        "plan": table,
        "pod": pod_table,
    }.items():
        if kind in wanted:
            print(of_kind(read_rows(OUTPUT)))


if __name__ == "__main__":
    main()
