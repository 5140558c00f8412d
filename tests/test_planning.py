"""Those marked `planning` compile for chips that are not here: pytest -m planning."""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from apollo_optax import apollo_mini, planning
from apollo_optax.planning import GPUS, TPUS, Collective, _targets, mesh_for, parse_target
from apollo_optax.planning._collectives import read_traffic
from apollo_optax.planning._hlo import parse_program
from apollo_optax.planning._plan import needed_bytes

pytestmark = pytest.mark.optimized

GIB = 2**30
FLOAT32 = 4

# What a compiler may leave out of a plan is known here, where the compiler is.
compile_for: Any = planning.compile_for
largest_batch: Any = planning.largest_batch


def shaped(*shape, dtype=jnp.float32, sharding=None):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def sgd_step(weights, x):
    return weights - 0.1 * jax.grad(lambda weights: jnp.sum((x @ weights) ** 2))(weights)


# Targets


@pytest.mark.parametrize(
    ("refusal", "error", "match"),
    [
        ("topology not implemented for cuda", ImportError, "JAX_PLATFORMS=cpu before Python"),
        ("no support for this GPU", NotImplementedError, "no support for this GPU"),
    ],
    ids=["dropped compiler", "the compiler's own"],
)
def test_a_gpu_compiler_that_refuses_is_not_taken_for_a_missing_one(
    refusal, error, match, monkeypatch
):
    def refuse(**kwargs):
        raise NotImplementedError(refusal)

    monkeypatch.setattr(_targets, "_require_gpu_compiler", lambda: None)
    monkeypatch.setattr(_targets.topologies, "get_topology_desc", refuse)
    with pytest.raises(error, match=match):
        _targets.devices_of(parse_target("a100-80gb"))


@pytest.mark.parametrize(
    ("name", "chip", "device_count"),
    [
        ("tpu-v5e", "tpu-v5e", 1),
        ("tpu-v5e:16x16", "tpu-v5e", 256),
        ("tpu-v4:2x2x1", "tpu-v4", 4),
        ("tpu-v5p:8x8x8", "tpu-v5p", 512),
        ("tpu-v5p:4x8x12", "tpu-v5p", 384),
        ("TPU-v6e:2x4", "tpu-v6e", 8),
        ("tpu7x:2x2x1", "tpu7x", 8),
        ("2*tpu-v5e:16x16", "tpu-v5e", 512),
        ("a100-40gb", "a100-40gb", 1),
        ("h100-80gb:8", "h100-80gb", 8),
        ("h200:16", "h200", 16),
        ("rtx-4090-24gb:2", "rtx-4090-24gb", 2),
        ("cpu", "cpu", 1),
    ],
)
def test_target_has_the_devices_of_its_name(name, chip, device_count):
    target = parse_target(name)
    assert target.chip == chip
    assert target.device_count == device_count


def test_local_is_every_device_of_this_machine():
    assert planning.parse_target("local").device_count == len(jax.devices())
    assert list(mesh_for("local", {"data": len(jax.devices())}).devices) == jax.devices()


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("a100-80g:8", "a100-80gb"),
        ("tpu-v5:4x4", "tpu-v5e"),
        ("v6e:2x2", "tpu-v6e"),
        ("tpu-7x:2x2x1", "tpu7x"),
        ("rtx-4090:1", "rtx-4090-24gb"),
        ("h100:8", "h100-80gb"),
        ("quantum", "local"),
    ],
)
def test_unknown_chip_is_answered_with_the_nearest_names(name, nearest):
    with pytest.raises(ValueError, match=rf"unknown chip .* did you mean .*{nearest}"):
        parse_target(name)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("tpu-v5e:3x3", "its shapes: 1x1, 2x2, 2x4"),
        ("tpu-v5e:8", "its shapes: 1x1, 2x2, 2x4"),
        ("tpu-v4:2x2", "multiples of 4"),
        ("tpu-v5p:16x20x32", "up to 8960 chips"),
        ("a100-80gb:2x2", "has no shape"),
        ("a100-80gb:12", "multiple of 8"),
        ("2*a100-80gb:8", "several slices are for TPUs"),
        ("a100-80gb:0", "no devices"),
        ("0*tpu-v5e:4x4", "no devices"),
        ("tpu-v5e:", "not of the form"),
        ("", "not of the form"),
    ],
)
def test_impossible_target_is_refused_with_what_is_possible(name, complaint):
    with pytest.raises(ValueError, match=complaint):
        parse_target(name)


def test_target_equals_itself_under_another_spelling():
    assert parse_target("A100-80GB") == parse_target("a100-80gb:1")
    assert parse_target("tpu-v5e") == parse_target("1*tpu-v5e:1x1")


@pytest.mark.parametrize("name", [name for name in GPUS if name.endswith("gb")])
def test_usable_memory_of_a_gpu_is_a_little_below_its_name(name):
    gigabytes = int(name.rsplit("-", 1)[1].removesuffix("gb"))
    # A gigabyte is 2**30 bytes on a consumer card's box, and of an A100 or H100 about 1.06e9 bytes.
    assert 0.89 < parse_target(name).capacity_bytes / (gigabytes * GIB) < 0.96


@pytest.mark.parametrize(
    ("name", "package"), [("tpu-v6e:8x16", "libtpu"), ("h200:7", "jax-cuda13-plugin")]
)
def test_missing_compiler_names_what_to_install(monkeypatch, name, package):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(ImportError, match=rf"{package}.*pip install -e '\.\[planning\]'"):
        compile_for(name, jnp.tanh, shaped(8))


def test_more_local_devices_than_there_are_is_an_error_that_says_what_to_set():
    with pytest.raises(ValueError, match="JAX_NUM_CPU_DEVICES=4096"):
        compile_for("cpu:4096", jnp.tanh, shaped(8))


@pytest.mark.parametrize("sizes", [{"data": 2}, {"data": 2, "model": 2}])
def test_mesh_of_another_size_than_the_target_is_an_error(sizes):
    with pytest.raises(ValueError, match=r"the mesh data=2.* target 'cpu' has 1"):
        mesh_for("cpu", sizes)


# Plans


def test_peak_is_arguments_and_outputs_less_aliases_and_temporaries():
    plan = compile_for("cpu", sgd_step, shaped(256, 64), shaped(8, 256), donate_argnums=0)
    assert plan.argument_bytes == (256 * 64 + 8 * 256) * FLOAT32
    assert plan.output_bytes == plan.alias_bytes == 256 * 64 * FLOAT32
    assert plan.peak_bytes == plan.argument_bytes + plan.temporary_bytes
    assert plan.fits
    assert plan.collectives == {}
    assert plan.flops >= 2 * 2 * 8 * 256 * 64  # the products forward and backward
    assert plan.hbm_bytes >= plan.argument_bytes


def test_undonated_step_warns_and_counts_twice():
    def step(weights, grads):
        return weights - 0.1 * grads

    args = shaped(256, 64), shaped(256, 64)
    donated = compile_for("cpu", step, *args, donate_argnums=0)
    with pytest.warns(UserWarning, match=r"65,536 of the arguments' 131,072 bytes.*donate_argnums"):
        undonated = compile_for("cpu", step, *args)
    assert undonated.peak_bytes - donated.peak_bytes == 256 * 64 * FLOAT32


def test_step_with_nothing_to_donate_does_not_warn():
    compile_for("cpu", lambda weights, x: jnp.sum(x @ weights), shaped(256, 64), shaped(8, 256))


def test_jitted_step_keeps_its_own_donation():
    step = jax.jit(sgd_step, donate_argnums=0)
    plan = compile_for("cpu", step, shaped(256, 64), shaped(8, 256))
    assert plan.alias_bytes == 256 * 64 * FLOAT32


def test_step_that_does_not_fit_is_an_answer():
    plan = compile_for("cpu", jnp.tanh, shaped(2**20, 2**20), donate_argnums=0)
    assert not plan.fits
    assert plan.peak_bytes >= 2**40 * FLOAT32 > plan.capacity_bytes


def test_whole_optimizer_step_is_planned_from_shapes_with_its_typed_key():
    params = {"kernel": shaped(64, 128), "bias": shaped(128)}
    tx = apollo_mini(1e-3)
    state = jax.eval_shape(tx.init, params)

    def step(params, state, x, key):
        dropped = x * jax.random.bernoulli(key, 0.9, x.shape)
        grads = jax.grad(lambda p: jnp.sum((dropped @ p["kernel"] + p["bias"][None]) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    plan = compile_for(
        "cpu", step, params, state, shaped(4, 64), jax.random.key(0), donate_argnums=(0, 1)
    )
    parameters, moments = 64 * 128 + 128, 2 * 128 + 2 * 128
    assert plan.alias_bytes >= (parameters + moments) * FLOAT32


def test_planning_runs_nothing():
    ran = []

    def step(x):
        jax.debug.callback(lambda: ran.append("step"))
        return jnp.sum(x)

    compile_for("cpu", step, jnp.ones(8))
    jax.effects_barrier()
    assert ran == []


def test_static_arguments_and_python_scalars_pass_through():
    def step(weights, repeats, factor):
        for _ in range(repeats):
            weights = jnp.tanh(weights) * factor
        return weights

    for number in (1, -2):
        plan = compile_for("cpu", step, shaped(16), 3, 0.5, static_argnums=number, donate_argnums=0)
        assert plan.output_bytes == 16 * FLOAT32


def test_plan_is_one_json_object():
    plan = compile_for("cpu", sgd_step, shaped(256, 64), shaped(8, 256), donate_argnums=0)
    answer = json.loads(plan.to_json())
    assert answer["peak_bytes"] == plan.peak_bytes
    assert answer["fits"] is True
    assert {"argument_bytes", "temporary_bytes", "capacity_bytes", "collectives", "flops"} <= (
        answer.keys()
    )


def test_configuration_and_environment_are_left_as_they_were():
    configuration, environment = dict(jax.config.values), dict(os.environ)
    compile_for("cpu", jnp.sum, shaped(16))
    assert dict(jax.config.values) == configuration
    assert dict(os.environ) == environment


# The largest batch


def one_mebibyte_a_sample(batch):
    return jnp.sum, [shaped(batch, 2**18)]


def fits_up_to(most, tried):
    """A build whose steps need little for a batch up to `most` and a pebibyte above it."""

    def build(batch):
        tried.append(batch)
        return jnp.sum, [shaped(batch) if batch <= most else shaped(2**48)]

    return build


@pytest.mark.parametrize("most", [1, 2, 3, 7, 8, 23, 100])
def test_largest_batch_is_found_though_peaks_are_no_line(most):
    tried: list[int] = []
    found = largest_batch("cpu", fits_up_to(most, tried))
    assert found.batch == most
    assert found.plan.fits
    assert not found.next_plan.fits
    assert len(tried) <= 2 * most.bit_length() + 12
    assert len(tried) == len(set(tried))


def test_peaks_in_line_with_the_batch_take_few_compilations():
    capacity = parse_target("cpu:8").capacity_bytes
    tried: list[int] = []

    def build(batch):
        tried.append(batch)
        return jnp.sum, [shaped(batch, capacity // FLOAT32 // 37)]

    assert largest_batch("cpu:8", build).batch == 37
    assert len(tried) <= 5


def test_largest_batch_is_a_multiple_as_asked():
    tried: list[int] = []
    assert largest_batch("cpu", fits_up_to(100, tried), multiple_of=8).batch == 96
    assert all(batch % 8 == 0 for batch in tried)


def test_largest_batch_is_zero_where_none_fits():
    found = largest_batch("cpu", fits_up_to(3, []), multiple_of=4)
    assert (found.batch, found.plan) == (0, None)
    assert not found.next_plan.fits


@pytest.mark.parametrize("limit", [1, 5, 64])
def test_largest_batch_stops_at_its_limit(limit):
    tried: list[int] = []
    found = largest_batch("cpu", fits_up_to(1000, tried), limit=limit)
    assert (found.batch, found.next_plan) == (limit, None)
    assert max(tried) == limit


@pytest.mark.parametrize(
    "wrong", [{"multiple_of": 0}, {"limit": 0}, {"multiple_of": 9, "limit": 8}]
)
def test_impossible_search_is_refused(wrong):
    with pytest.raises(ValueError, match="multiple_of must be 1 or more"):
        largest_batch("cpu", one_mebibyte_a_sample, **wrong)


# A mesh of eight CPU devices


def data_parallel_plan():
    mesh = mesh_for("cpu:8", {"data": 8})
    x = shaped(64, 256, sharding=NamedSharding(mesh, P("data")))
    return compile_for("cpu:8", sgd_step, shaped(256, 128), x, donate_argnums=0)


def test_data_parallel_step_reduces_the_gradient_once():
    plan = data_parallel_plan()
    assert plan.device_count == 8
    assert plan.argument_bytes == (256 * 128 + 8 * 256) * FLOAT32  # weights whole, x in eighths
    assert list(plan.collectives) == ["all-reduce"]
    assert plan.collectives["all-reduce"].count == 1
    assert plan.collective_bytes == plan.collectives["all-reduce"].bytes == 256 * 128 * FLOAT32


def scanned_plan(layers):
    mesh = mesh_for("cpu:8", {"data": 2, "model": 4})
    columns = NamedSharding(mesh, P(None, None, "model"))
    rows = NamedSharding(mesh, P(None, "model", None))
    x = shaped(16, 64, sharding=NamedSharding(mesh, P("data")))

    def forward(into, out_of, x):
        def layer(x, weights):
            return jnp.tanh(x @ weights[0]) @ weights[1], None

        return jnp.sum(jax.lax.scan(layer, x, (into, out_of))[0])

    weights = shaped(layers, 64, 256, sharding=columns), shaped(layers, 256, 64, sharding=rows)
    return compile_for("cpu:8", forward, *weights, x)


@pytest.mark.parametrize("layers", [2, 5])
def test_collectives_of_scanned_layers_count_once_a_layer(layers):
    plan = scanned_plan(layers)
    assert plan.loops == (layers,)
    per_layer = 16 // 2 * 64 * FLOAT32  # the activations, which half of the devices have each
    assert plan.collectives["all-reduce"].count == layers + 1
    assert plan.collectives["all-reduce"].bytes == layers * per_layer + FLOAT32


def spec_only_plan():
    def step(weights, x):
        return sgd_step(weights, jax.lax.with_sharding_constraint(x, P("data")))

    return compile_for(
        "cpu:8",
        step,
        shaped(256, 128),
        shaped(64, 256),
        mesh=mesh_for("cpu:8", {"data": 4, "model": 2}),
        in_shardings=(P(None, "model"), P("data")),
        out_shardings=P(None, "model"),
        donate_argnums=0,
    )


def test_step_that_names_axes_only_is_traced_within_the_mesh():
    plan = spec_only_plan()
    assert plan.argument_bytes == (256 * 128 // 2 + 64 * 256 // 4) * FLOAT32
    assert plan.collective_bytes == 256 * 128 // 2 * FLOAT32


def explicit_plans():
    mesh = mesh_for("cpu:8", {"data": 4, "model": 2}, axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        args = jax.eval_shape(
            lambda: (
                jax.reshard(jnp.zeros((256, 128)), P(None, "model")),
                jax.reshard(jnp.zeros((64, 256)), P("data")),
            )
        )
        within = compile_for("cpu:8", sgd_step, *args, donate_argnums=0)
    return within, compile_for("cpu:8", sgd_step, *args, mesh=mesh, donate_argnums=0)


def test_explicit_axes_are_planned_from_what_eval_shape_returns():
    within, given = explicit_plans()
    assert within == given
    assert given.argument_bytes == (256 * 128 // 2 + 64 * 256 // 4) * FLOAT32


def complaints_about_meshes():
    mesh = mesh_for("cpu:8", {"data": 8})
    x = shaped(64, 256, sharding=NamedSharding(mesh, P("data")))
    attempts = [
        lambda: compile_for("cpu:4", jnp.sum, x),
        lambda: compile_for("cpu:4", jnp.sum, shaped(64, 256), mesh=mesh),
        lambda: compile_for("cpu:4", jnp.sum, shaped(64), in_shardings=NamedSharding(mesh, P())),
        lambda: mesh_for("cpu:8", {"data": 4, "model": 4}),
    ]
    complaints = []
    for attempt in attempts:
        try:
            attempt()
        except ValueError as error:
            complaints.append(str(error))
    return complaints


def test_shardings_over_other_devices_than_the_target_has_are_refused():
    *foreign, wrong_size = complaints_about_meshes()
    assert len(foreign) == 3
    for complaint in foreign:
        assert "over 8 devices" in complaint
        assert "planning.mesh_for('cpu:4', ...)" in complaint
    assert "data=4, model=4 has 16 devices" in wrong_size
    assert "'cpu:8' has 8" in wrong_size


# Reading compiled programs, in the words of each compiler

HLO = Path(__file__).parent / "hlo"


def test_gpu_program_is_read_with_its_loops():
    traffic = read_traffic(parse_program((HLO / "gpu.hlo").read_text()))
    assert traffic.loops == (12,)
    gathered = 32 * 4 * 2
    assert traffic.collectives == {
        "all-gather": Collective(12, 12 * gathered),
        "reduce-scatter": Collective(12, 12 * 2 * gathered),
        "all-reduce": Collective(1, FLOAT32 + gathered // 4),
    }


def test_tpu_program_is_read_with_its_loops_fusions_offloads_and_slices():
    traffic = read_traffic(parse_program((HLO / "tpu.hlo").read_text()))
    trips = 8 - 2  # the counter's bound and start
    assert traffic.loops == (trips,)
    assert traffic.collectives == {
        # Two fusions, one collective.
        "all-gather": Collective(trips, trips * 32 * 128 * 2),
        "reduce-scatter": Collective(trips, trips * 32 * 128 * FLOAT32),
        "all-reduce": Collective(trips, trips * 16 * 128 * FLOAT32),
        "collective-permute": Collective(trips, trips * 8 * 128 * 2),
        "all-reduce between slices": Collective(1, 16 * 128 * FLOAT32),
    }


@pytest.mark.parametrize(
    "stage", ["empty", "no text", "words", "StableHLO", "HLO before the compiler", "no entry"]
)
def test_text_without_an_entry_is_refused_with_what_is_expected(stage):
    lowered = jax.jit(jnp.sin).lower(jnp.ones(4))
    text: Any = {
        "empty": "",
        "no text": None,  # as `jax.stages.Compiled.as_text` says that there is none
        "words": "all-reduce",
        "StableHLO": lowered.as_text(),
        "HLO before the compiler": lowered.as_text("hlo"),
        "no entry": (HLO / "gpu.hlo").read_text().replace("ENTRY ", ""),
    }[stage]
    with pytest.raises(ValueError, match=r"compiled program, .*\.compile\(\)\.as_text\(\)") as info:
        parse_program(text)
    assert f"hlo begins {str(text)[:40]!r} and has no entry" in str(info.value)


def test_program_without_collectives_has_none():
    program = jax.jit(jnp.sin).lower(jnp.ones(4)).compile().as_text()
    assert read_traffic(parse_program(program or "")) == ({}, ())


def test_loop_that_does_not_tell_its_trips_counts_once():
    program = (HLO / "tpu.hlo").read_text()
    traffic = read_traffic(parse_program(program.replace("constant(8)", "parameter(1)")))
    assert traffic.loops == (None,)
    assert traffic.collectives["all-gather"].count == 1


@pytest.mark.parametrize(
    ("refusal", "gibibytes"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (26.84G) exceeds available HBM (15.75G).",
            26.84,
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. Used 1.16T of 94.75G hbm. Exceeded hbm capacity by 1.07T.",
            1.16 * 1024,
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 20M of 16M", None),
        ("INVALID_ARGUMENT: something else (15.00G)", None),
    ],
)
def test_refusal_tells_what_the_program_needs(refusal, gibibytes):
    needed = needed_bytes(refusal)
    assert needed == (gibibytes and pytest.approx(gibibytes * GIB, abs=1))


# With the compilers of chips that are not here


@pytest.mark.planning
def test_targets_compile_one_after_another_and_leave_no_trace():
    configuration, environment = dict(jax.config.values), dict(os.environ)
    args = shaped(1024, 256), shaped(8, 1024)
    for target in ("tpu-v5e", "a100-80gb", "cpu", "h100-80gb", "tpu-v4", "tpu-v5e"):
        plan = compile_for(target, sgd_step, *args, donate_argnums=0)
        assert plan.fits
        assert plan.argument_bytes == (1024 * 256 + 8 * 1024) * FLOAT32
        assert plan.alias_bytes == 1024 * 256 * FLOAT32
        assert plan.flops == 2 * 2 * 8 * 1024 * 256
        assert (plan.step_seconds_at_least is None) == (target == "cpu")
    assert dict(jax.config.values) == configuration
    assert dict(os.environ) == environment


@pytest.mark.planning
@pytest.mark.parametrize("chip", TPUS)
def test_capacity_of_a_tpu_is_what_its_compiler_calls_available(chip):
    plan = compile_for(chip, lambda x: 2 * x, shaped(400_000, 400_000), donate_argnums=0)
    assert not plan.fits
    assert plan.peak_bytes >= 400_000**2 * FLOAT32
    assert plan.argument_bytes == 400_000**2 * FLOAT32
    assert plan.temporary_bytes is None
    assert f"available HBM ({plan.capacity_bytes / GIB:.2f}G)" in plan.refusal


@pytest.mark.planning
def test_argument_that_dies_early_counts_though_the_compiler_takes_the_program():
    def step(x, weights):
        last, layers = jax.lax.scan(lambda x, _: (jnp.tanh(x @ weights), x), x, length=8)
        return jnp.sum(layers[::-1] * last[None])

    plan = compile_for("tpu-v5e", step, shaped(365_000, 1024), shaped(1024, 1024))
    assert plan.refusal is None
    assert plan.temporary_bytes < plan.capacity_bytes < plan.peak_bytes
    assert not plan.fits


@pytest.mark.planning
@pytest.mark.parametrize("chip", GPUS)
def test_every_gpu_compiles_and_says_what_does_not_fit(chip):
    small = compile_for(chip, sgd_step, shaped(1024, 256), shaped(8, 1024), donate_argnums=0)
    large = compile_for(chip, jnp.tanh, shaped(2**18, 2**18), donate_argnums=0)
    assert small.fits
    assert not large.fits
    assert large.peak_bytes == large.argument_bytes == 2**36 * FLOAT32


@pytest.mark.planning
@pytest.mark.parametrize(
    ("target", "sizes"),
    [
        ("tpu-v5e:16x16", {"data": 32, "model": 8}),
        ("tpu-v4:2x2x1", {"data": 4}),
        ("tpu-v5p:8x8x8", {"fsdp": 128, "tensor": 4}),
        ("tpu-v6e:2x4", {"data": 2, "fsdp": 2, "tensor": 2}),
        ("tpu7x:2x2x1", {"data": 4, "tensor": 2}),
        ("a100-80gb:8", {"data": 8}),
        ("h100-80gb:16", {"data": 2, "tensor": 8}),
    ],
)
def test_mesh_covers_every_device_of_the_target(target, sizes):
    mesh = mesh_for(target, sizes)
    assert dict(mesh.shape) == sizes
    assert len(set(mesh.devices.flat)) == parse_target(target).device_count


@pytest.mark.planning
def test_first_axis_crosses_between_slices_and_no_other_does():
    mesh = mesh_for("2*tpu-v5e:4x4", {"data": 4, "model": 8})
    slices = [[device.slice_index for device in row] for row in mesh.devices]
    assert slices == [[0] * 8, [0] * 8, [1] * 8, [1] * 8]
    with pytest.raises(ValueError, match=r"crosses between the 2 slices.* multiple of 2"):
        mesh_for("2*tpu-v5e:4x4", {"model": 1, "data": 32})


@pytest.mark.planning
@pytest.mark.parametrize("target", ["a100-80gb:8", "tpu-v5e:2x4", "tpu7x:2x2x1"])
def test_scanned_layers_count_once_a_layer_on_every_compiler(target):
    mesh = mesh_for(target, {"data": 4, "model": 2})
    layers = 4
    weights = tuple(
        shaped(layers, *sizes, dtype=jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        for sizes, spec in [
            ((512, 1024), P(None, None, "model")),
            ((1024, 512), P(None, "model", None)),
        ]
    )
    x = shaped(32, 512, dtype=jnp.bfloat16, sharding=NamedSharding(mesh, P("data")))

    def forward(weights, x):
        def layer(x, weights):
            return jnp.tanh(x @ weights[0]) @ weights[1], None

        return jax.lax.scan(layer, x, weights)[0]

    plan = compile_for(target, forward, weights, x)
    assert plan.loops in ((layers,), ())  # unrolled is also right
    activations = 32 // 4 * 512 * 2
    assert plan.collectives["all-reduce"] == Collective(layers, layers * activations)


@pytest.mark.planning
def test_step_between_slices_tells_what_crosses():
    target = "2*tpu-v5e:2x2"
    mesh = mesh_for(target, {"data": 8})
    x = shaped(64, 256, sharding=NamedSharding(mesh, P("data")))
    plan = compile_for(target, sgd_step, shaped(256, 128), x, donate_argnums=0)
    assert any(kind.endswith("between slices") for kind in plan.collectives)


@pytest.mark.planning
def test_typed_keys_compile_everywhere():
    def step(weights, key):
        return weights + jax.random.normal(key, weights.shape), jax.random.split(key, 1)[0]

    for target in ("tpu-v5e", "a100-80gb"):
        key = jax.eval_shape(lambda: jax.random.key(0))
        assert compile_for(target, step, shaped(256, 128), key, donate_argnums=0).fits


@pytest.mark.planning
@pytest.mark.parametrize("chip", ["rtx-4060-8gb", "tpu-v5e"])
def test_largest_batch_fills_the_chip(chip):
    def build(batch):
        return jnp.sum, [shaped(batch, 8, 2**24)]  # half a gibibyte a sample, in whole tiles

    found = largest_batch(chip, build)
    assert found.batch == parse_target(chip).capacity_bytes * 2 // GIB
    assert not found.next_plan.fits


@pytest.mark.planning
def test_shardings_over_another_target_are_refused():
    x = shaped(64, sharding=NamedSharding(mesh_for("a100-80gb:8", {"data": 8}), P("data")))
    with pytest.raises(ValueError, match=r"8 devices \(NVIDIA A100.*mesh_for\('tpu-v5e:2x4'"):
        compile_for("tpu-v5e:2x4", jnp.sum, x)
