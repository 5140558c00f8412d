"""The bounds on a program's time: none may be above what any run of the program takes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from apollo_optax import planning
from apollo_optax.planning import GPUS, TPUS, Plan, _plan, mesh_for, parse_target
from apollo_optax.planning._collectives import Exchange, exchange
from apollo_optax.planning._hbm import touched
from apollo_optax.planning._hlo import parse_program
from apollo_optax.planning._products import products
from apollo_optax.planning._roofline import bounds, exchanged_bytes, operations
from apollo_optax.planning._targets import Hop, Rates, rates_of
from examples.llama import plan as llama_plan

pytestmark = pytest.mark.optimized

KIB = 1024
RATES = Rates({32: 1e9, 16: 2e9, 8: 4e9}, memory_bytes=1e6)


def shaped(*shape, dtype=jnp.float32, sharding=None):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def program_of(step, *args, **options):
    return parse_program(jax.jit(step, **options).lower(*args).compile().as_text() or "")


def entry(*lines, before=""):
    body = "\n".join(f"  {line}" for line in lines)
    return parse_program(f"HloModule m\n{before}\nENTRY %main () -> f32[] {{\n{body}\n}}\n")


# Operations


@pytest.mark.parametrize("layers", [1, 3])
def test_products_count_once_a_layer_and_nothing_else_does(layers):
    def loss(weights, x):
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0])

    program = program_of(jax.grad(loss), shaped(layers, 64, 64), shaped(8, 64))
    forward = 2 * 8 * 64 * 64
    # Backward two products a layer, but for the gradient of x in the first.
    assert operations(program) == pytest.approx(3 * layers * forward, abs=forward)


@pytest.mark.parametrize(
    ("line", "count"),
    [
        (
            '%y = (f32[8,32], s8[64]) custom-call(%a, %b), custom_call_target="__cublas$gemm", '
            'backend_config={"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}',
            2 * 8 * 16 * 32,
        ),
        (
            "%y = f32[8,32] dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
            2 * 8 * 16 * 32,
        ),
        ("%y = f32[8,32] convolution(%a, %b), dim_labels=bf_io->bf", 2 * 8 * 16 * 32),
        # 3 taps over 8 places, of which the first and the last have one in the padding.
        (
            "%y = f32[1,8,5] convolution(%image, %taps), window={size=3 pad=1_1}, "
            "dim_labels=b0f_0io->b0f",
            2 * 5 * 4 * (3 * 8 - 2),
        ),
        # A batch of 8 products, which a TPU writes as an axis with holes.
        (
            "%y = f32[8,2,5] convolution(%batch, %kernels), "
            "window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0io->0bf",
            8 * 2 * 2 * 4 * 5,
        ),
        ("%y = f32[8,16] add(%a, %a)", 0),
    ],
    ids=["library", "dot", "dot of a TPU", "convolution", "batch of a TPU", "no product"],
)
def test_a_product_counts_its_multiplications_and_additions(line, count):
    program = entry(
        "%a = f32[8,16] parameter(0)",
        "%b = f32[16,32] parameter(1)",
        "%image = f32[1,8,4] parameter(2)",
        "%taps = f32[3,4,5] parameter(3)",
        "%batch = f32[8,2,4] parameter(4)",
        "%kernels = f32[8,4,5] parameter(5)",
        f"ROOT {line}",
    )
    assert operations(program) == count


DOT = "dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}"


@pytest.mark.parametrize(
    ("dtype", "seconds"),
    [("f32", 1.0), ("bf16", 0.5), ("s8", 0.25), ("s4", 0.125), ("f64", 1.0), ("c64", 1.0)],
)
def test_a_product_is_at_the_peak_of_its_dtype(dtype, seconds):
    program = entry(
        f"%a = {dtype}[8,16] parameter(0)",
        f"%b = {dtype}[16,32] parameter(1)",
        f"ROOT %y = f32[8,32] {DOT}",
    )
    at_float32 = 2 * 8 * 16 * 32 / 1e9
    assert bounds(program, RATES, 1).compute_seconds == pytest.approx(seconds * at_float32)


def fused(*lines):
    body = "\n".join(f"  {line}" for line in lines)
    return f"%fused () -> f32[] {{\n{body}\n}}\n"


def test_a_fusion_that_widens_its_operands_may_multiply_them_as_they_were():
    program = entry(
        "%p = bf16[8,16] parameter(0)",
        "%q = f32[16,32] parameter(1)",
        "ROOT %y = f32[8,32] fusion(%p, %q), kind=kCustom, calls=%fused",
        before=fused(
            "%p = bf16[8,16] parameter(0)",
            "%b = f32[16,32] parameter(1)",
            "%a = f32[8,16] convert(%p)",
            f"ROOT %y = f32[8,32] {DOT}",
        ),
    )
    (call,) = [i for i in program.computations[program.entry].values() if i.opcode == "fusion"]
    assert list(products(call, program.computations[program.entry], program)) == [
        (2 * 8 * 16 * 32, 16)
    ]


def test_of_a_product_that_a_fusion_slices_the_slice_counts():
    program = entry(
        "%p = f32[8,16] parameter(0)",
        "%q = f32[16,32] parameter(1)",
        "ROOT %y = f32[2,32] fusion(%p, %q), kind=kCustom, calls=%fused",
        before=fused(
            "%a = f32[8,16] parameter(0)",
            "%b = f32[16,32] parameter(1)",
            f"%y = f32[8,32] {DOT}",
            "ROOT %z = f32[2,32] slice(%y), slice={[0:2], [0:32]}",
        ),
    )
    assert operations(program) == 2 * 2 * 16 * 32


def test_a_loop_that_does_not_tell_its_trips_is_free_in_a_bound_and_refused_in_a_count():
    def until_small(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) > 1, lambda x: x @ x, x)

    program = program_of(until_small, shaped(64, 64))
    assert bounds(program, RATES, 1).compute_seconds == 0
    with pytest.raises(ValueError, match="does not tell its trips"):
        operations(program)


def test_of_branches_the_one_with_the_fewest_operations_counts():
    def step(flag, x):
        return jax.lax.cond(flag, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert operations(program_of(step, shaped(dtype=bool), shaped(32, 32))) == 2 * 32**3


# Memory


def test_an_update_reads_its_arguments_and_writes_its_results():
    def sgd(weights, grads):
        return weights - 0.1 * grads

    program = program_of(sgd, shaped(64, 1024), shaped(64, 1024), donate_argnums=0)
    size = 64 * 1024 * 4
    assert touched(program) == (2 * size, size)
    seconds = bounds(program, RATES, 1).memory_seconds
    assert seconds == pytest.approx(3 * size / RATES.memory_bytes)
    # A cache may hold some before and some after.
    cached = bounds(program, RATES._replace(cache_bytes=100 * KIB), 1).memory_seconds
    assert seconds - cached == pytest.approx(2 * 100 * KIB / RATES.memory_bytes)
    assert bounds(program, RATES._replace(cache_bytes=3 * size), 1).memory_seconds == 0


def test_a_table_that_is_looked_up_need_not_be_read():
    program = program_of(lambda table, i: table[i], shaped(4096, 64), shaped(8, dtype=jnp.int32))
    assert touched(program).read < 4096 * 64 * 4 / 100


def test_a_cache_that_gets_a_row_is_not_written_as_a_whole():
    def step(cache, row, i):
        cache = jax.lax.dynamic_update_slice(cache, row, (i, 0))
        return cache, jnp.sum(cache)

    program = program_of(
        step, shaped(4096, 64), shaped(1, 64), shaped(dtype=jnp.int32), donate_argnums=0
    )
    assert touched(program).written < 4 * KIB


def test_stacked_weights_are_read_once_though_a_loop_slices_them():
    def forward(weights, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    program = program_of(forward, shaped(5, 64, 256 // 4), shaped(8, 64))
    assert touched(program).read == pytest.approx(5 * 64 * 64 * 4, rel=0.05)


def test_weights_that_a_loop_replaces_layer_by_layer_are_written_once():
    def step(weights):
        def layer(i, weights):
            new = 0.9 * jax.lax.dynamic_index_in_dim(weights, i, keepdims=False)
            return jax.lax.dynamic_update_index_in_dim(weights, new, i, 0)

        return jax.lax.fori_loop(0, 5, layer, weights)

    program = program_of(step, shaped(5, 64, 64), donate_argnums=0)
    size = 5 * 64 * 64 * 4
    assert tuple(touched(program)) == pytest.approx((size, size))


def test_what_a_step_hands_on_as_it_is_does_not_count():
    def step(state):
        return {"weights": 2 * state["weights"], "frozen": state["frozen"]}

    state = {"weights": shaped(1024), "frozen": shaped(1 << 20)}
    program = program_of(step, state, donate_argnums=0)
    assert touched(program) == (1024 * 4, 1024 * 4)


# Collectives

LINK = Hop(1, 1e9)
SWITCH = Hop(1, 1e9, reduces=True)
NETWORK = Hop(8, 1e9)


@pytest.mark.parametrize(
    ("kind", "devices", "hop", "sent_and_received"),
    [
        ("all-reduce", 8, LINK, (2 * 700, 2 * 700)),
        ("all-reduce", 8, SWITCH, (800, 800)),
        ("all-gather", 8, LINK, (700, 700)),
        ("all-gather", 8, SWITCH, (100, 700)),
        ("reduce-scatter", 8, SWITCH, (700, 100)),
        ("all-to-all", 8, LINK, (700, 700)),
        ("collective-permute", 2, LINK, (800, 800)),
        ("collective-permute", 1, LINK, (0, 0)),
        ("ragged-all-to-all", 8, LINK, (0, 0)),
        ("all-gather", 8, NETWORK, (0, 0)),
        ("all-gather", 16, NETWORK, (400, 400)),
        ("all-reduce", 16, NETWORK, (800, 800)),
        ("all-to-all", 16, NETWORK, (8 * 400, 8 * 400)),
        ("all-gather", None, LINK, (750, 750)),
    ],
)
def test_a_collective_sends_what_no_algorithm_can_save(kind, devices, hop, sent_and_received):
    found = Exchange(kind, 800, devices)
    assert exchanged_bytes(found, hop, device_count=16) == pytest.approx(sent_and_received)


def test_each_device_of_a_slice_exchanges_with_those_of_other_slices_over_the_network():
    found = Exchange("all-reduce between slices", 800, None)
    network = Hop(4, 1e9)
    assert exchanged_bytes(found, network, device_count=8, slices=2) == (4 * 800, 4 * 800)
    assert exchanged_bytes(found, LINK, device_count=8, slices=2) == (0, 0)


@pytest.mark.parametrize(
    ("groups", "devices"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", 2),
        ("replica_groups=mesh['data'=2,'model'=4] {'model'}", 4),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", 8),
        ("replica_groups=mesh['a'=8] {'a':(2)4}", 4),
        ("replica_groups={}", None),
        ("to_apply=%add", None),
    ],
)
def test_a_group_is_read_in_each_notation(groups, devices):
    program = entry(
        "%a = f32[8] parameter(0)", f"ROOT %y = f32[8] all-reduce(%a), channel_id=1, {groups}"
    )
    computation = program.computations[program.entry]
    assert exchange(computation["y"], computation) == Exchange("all-reduce", 32, devices)


def scanned_collectives():
    mesh = mesh_for("cpu:8", {"data": 2, "model": 4})
    columns = NamedSharding(mesh, P(None, None, "model"))
    rows = NamedSharding(mesh, P(None, "model", None))
    x = shaped(16, 64, sharding=NamedSharding(mesh, P("data")))

    def forward(into, out_of, x):
        def layer(x, weights):
            return jnp.tanh(x @ weights[0]) @ weights[1], None

        return jax.lax.scan(layer, x, (into, out_of))[0]

    weights = shaped(3, 64, 256, sharding=columns), shaped(3, 256, 64, sharding=rows)
    return program_of(forward, *weights, x)


def test_collectives_of_scanned_layers_bound_the_time_once_a_layer():
    links = RATES._replace(hops=(LINK,))
    payload = 16 // 2 * 64 * 4
    seconds = bounds(scanned_collectives(), links, device_count=8).collective_seconds
    assert seconds == pytest.approx(3 * payload * 2 * 3 / 4 / 1e9)


def test_a_collective_in_several_parts_counts_once(request):
    text = (request.path.parent / "hlo" / "tpu.hlo").read_text()
    rates = RATES._replace(hops=(LINK,))
    whole = bounds(parse_program(text), rates, device_count=4).collective_seconds
    without_last = parse_program(text.replace("calls=%last_part", "calls=%add"))
    assert whole == bounds(without_last, rates, device_count=4).collective_seconds > 0


# Peaks

# Dense, in teraflops and gigabytes a second, from the vendors' pages and data sheets.
DATA_SHEETS = {
    "a100-80gb": (312, 2039),
    "h100-80gb": (989, 3350),
    "h200": (989, 4800),
    "b200": (2250, 7670),
    "rtx-4090-24gb": (165.2, 1008),
    "tpu-v4": (275, 1200),
    "tpu-v5e": (197, 819),
    "tpu-v5p": (459, 2765),
    "tpu-v6e": (918, 1638),
    "tpu7x": (2307 / 2, 7380 / 2),
}


@pytest.mark.parametrize("chip", DATA_SHEETS)
def test_a_peak_is_not_below_the_data_sheet_and_little_above(chip):
    rates = rates_of(parse_target(chip))
    assert rates is not None
    teraflops, gigabytes = DATA_SHEETS[chip]
    # NVIDIA states some at a lower clock than the highest.
    assert 0.999 < rates.operations[16] / (1e12 * teraflops) < 1.09
    assert 0.999 < rates.memory_bytes / (1e9 * gigabytes) < 1.03


@pytest.mark.parametrize("chip", [*TPUS, *GPUS])
def test_every_chip_has_peaks_that_grow_as_dtypes_shrink(chip):
    rates = rates_of(parse_target(chip))
    assert rates is not None
    peaks = [rates.operations[bits] for bits in sorted(rates.operations, reverse=True)]
    assert peaks == sorted(peaks)
    assert rates.memory_bytes > 1e11


@pytest.mark.parametrize(
    ("target", "hops"),
    [
        ("tpu-v5e", ()),
        ("tpu-v5e:2x2", (Hop(1, 2 * 50e9),)),
        ("tpu-v5e:16x16", (Hop(1, 4 * 50e9),)),
        ("tpu-v5p:8x8x8", (Hop(1, 6 * 100e9),)),
        ("tpu7x:2x2x1", (Hop(2, 2 * 100e9),)),
        ("2*tpu-v5e:16x16", (Hop(1, 4 * 50e9), Hop(256, 256 * 3.125e9))),
        ("a100-80gb:8", (Hop(1, 300e9), Hop(8, 8 * 25e9, reduces=True))),
        ("h200", (Hop(1, 450e9, reduces=True), Hop(8, 8 * 50e9, reduces=True))),
        ("rtx-4060-8gb:2", (Hop(1, 16e9),)),
    ],
)
def test_a_chip_has_the_links_of_its_place(target, hops):
    rates = rates_of(parse_target(target))
    assert rates is not None
    assert rates.hops == hops


# Plans


def planned(monkeypatch, rates):
    monkeypatch.setattr(_plan, "rates_of", lambda target: rates)

    def step(weights, x):
        return weights - 0.1 * jax.grad(lambda weights: jnp.sum((x @ weights) ** 2))(weights)

    return planning.compile_for("cpu", step, shaped(256, 64), shaped(8, 256), donate_argnums=0)


@pytest.mark.parametrize(
    ("rates", "limited_by"),
    [(Rates({32: 1e6}, 1e12), "compute"), (Rates({32: 1e12}, 1e6), "memory")],
)
def test_a_plan_tells_what_limits_the_step_and_both_bounds(monkeypatch, rates, limited_by):
    plan = planned(monkeypatch, rates)
    seconds = plan.compute_seconds, plan.memory_seconds, plan.collective_seconds
    assert plan.limited_by == limited_by
    assert plan.step_seconds_at_least == max(seconds)
    assert plan.step_seconds_without_overlap == sum(seconds)
    assert plan.tokens_per_second_at_most(512) == 512 / max(seconds)
    assert plan.compute_seconds == plan.flops / rates.operations[32]
    assert json.loads(plan.to_json())["memory_seconds"] == plan.memory_seconds


def test_a_local_device_has_no_bound(monkeypatch):
    plan = planned(monkeypatch, None)
    assert plan.compute_seconds is plan.step_seconds_at_least is plan.limited_by is None
    assert plan.tokens_per_second_at_most(512) is None
    assert plan.flops == 2 * 2 * 8 * 256 * 64


def test_a_plan_made_without_bounds_has_none():
    fields = {field.name: None for field in dataclasses.fields(Plan)}
    plan = Plan(**fields)  # type: ignore[arg-type]
    assert plan.step_seconds_without_overlap is None


SMALL = ["--model", "nano", "--device", "cpu", "--batch", "2", "--sequence", "16"]


def test_the_command_prints_the_bound_in_one_line(monkeypatch, capsys):
    plan = planned(monkeypatch, Rates({32: 1e12}, 1e6))
    monkeypatch.setattr(llama_plan, "plan_step", lambda config: plan)
    assert llama_plan.main([*SMALL, "--weights", "f32"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "at most" in line]
    seconds = plan.memory_seconds
    assert line == (
        f"bound        {2 * 16 / seconds:,.0f} tokens/s at most, limited by memory; a step takes "
        f"{seconds:.3g} s or more"
    )


def test_the_best_bound_need_not_be_that_of_the_largest_batch(monkeypatch):
    plan = planned(monkeypatch, Rates({32: 1e12}, 1e12))
    # The compiler of the largest that fits computes something twice.
    plans = {
        batch: dataclasses.replace(plan, fits=batch < 4, compute_seconds=seconds)
        for batch, seconds in {1: 1.0, 2: 1.5, 3: 3.0, 4: 2.0}.items()
    }
    found = planning.LargestBatch(3, plans[3], plans[4], plans)
    monkeypatch.setattr(llama_plan, "plan_step", lambda config: plans[1])
    monkeypatch.setattr(llama_plan, "_largest_batch", lambda config: found)
    config = llama_plan.PlanConfig("nano", "cpu", sequence=16, weights="f32", largest_batch=True)
    report = llama_plan.plan_report(config)
    assert report["tokens_per_second_at_most"] == 16
    assert (report["largest_batch"], report["best_bound_batch"]) == (3, 2)
    assert report["best_bound_tokens_per_second"] == pytest.approx(2 * 16 / 1.5)


@pytest.mark.planning
@pytest.mark.parametrize("target", ["tpu-v5e", "a100-80gb"])
def test_compilers_of_all_chips_make_the_same_operations_of_a_step(target):
    def step(weights, x):
        def loss(weights):
            y = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]
            return jnp.sum(y.astype(jnp.float32) ** 2)

        grads = jax.grad(loss)(weights)
        return optax.apply_updates(weights, jax.tree.map(lambda g: -0.1 * g, grads))

    weights, x = shaped(4, 512, 512, dtype=jnp.bfloat16), shaped(256, 512, dtype=jnp.bfloat16)
    plan = planning.compile_for(target, step, weights, x, donate_argnums=0)
    assert plan.flops == pytest.approx(3 * 4 * 2 * 256 * 512 * 512, rel=0.1)
    assert plan.memory_seconds is not None
    rates = rates_of(parse_target(target))
    assert rates is not None
    least = 2 * 4 * 512 * 512 * 2 + 256 * 512 * 2 - 2 * rates.cache_bytes
    assert plan.memory_seconds == pytest.approx(max(0, least) / rates.memory_bytes, rel=0.05)
