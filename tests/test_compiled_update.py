"""What the compilers make of the update: how often gradients are read, and that none is turned."""

import math
import re
from typing import Any

import jax
import optax
import pytest

from apollo_optax import ApolloDimensionNumbers, apollo_mini, scale_by_apollo
from apollo_optax.experimental import pallas_tpu
from apollo_optax.planning._hbm import hbm_bytes
from apollo_optax.planning._hlo import parse_program
from apollo_optax.planning._plan import compile_update

pytestmark = pytest.mark.optimized

LAST_TWO = ApolloDimensionNumbers(-2, -1)
TARGETS = [
    pytest.param("cpu", marks=pytest.mark.slow),
    pytest.param("tpu-v5e", marks=pytest.mark.planning),
    pytest.param("a100-80gb", marks=pytest.mark.planning),
]
_COPY = re.compile(r"= \w+\[([\d,]+)\]\S* (?:transpose|copy|copy-start)\(")


def compiled_update(
    target: str, optimizer: optax.GradientTransformation, shape: tuple[int, ...]
) -> str:
    """A step of one leaf in float32, as text."""
    params = {"w": jax.ShapeDtypeStruct(shape, "float32")}
    return compile_update(optimizer, params, target).as_text() or ""


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("rank", "granularity"), [(1, "tensor"), (64, "channel")])
@pytest.mark.parametrize("shape", [(1, 512, 1536), (1, 1536, 512), (2, 512, 1536), (2, 1536, 512)])
def test_no_gradient_is_transposed_or_copied(target, rank, granularity, shape):
    tx = scale_by_apollo(rank, granularity=granularity, weight_dimension_numbers=LAST_TWO)
    hlo = compiled_update(target, tx, shape)
    sizes = [math.prod(map(int, found[1].split(","))) for found in _COPY.finditer(hlo)]
    assert not [size for size in sizes if size >= math.prod(shape)]


@pytest.mark.planning
@pytest.mark.parametrize("shape", [(1, 4096, 8192), (1, 8192, 4096)])
def test_a_kernel_saves_a_read_of_the_gradient(shape):
    def moved(implementation: Any) -> int:
        tx = scale_by_apollo(64, weight_dimension_numbers=LAST_TWO, implementation=implementation)
        return hbm_bytes(parse_program(compiled_update("tpu-v5e", tx, shape)))

    assert moved(pallas_tpu) < moved(None) - 0.9 * 4 * math.prod(shape)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        pytest.param("cpu", 5, marks=pytest.mark.slow),
        pytest.param("tpu-v5e", 4, marks=pytest.mark.planning),
    ],
)
def test_weight_decay_and_schedule_are_applied_in_the_same_pass(target, words):
    """Gradient twice (on a CPU norm and projection are two reads), weight in and out."""
    shape = (2, 1024, 4096)
    schedule = optax.cosine_decay_schedule(0.01, 100)
    mini = apollo_mini(schedule, weight_dimension_numbers=LAST_TWO, weight_decay=0.1)
    moved = hbm_bytes(parse_program(compiled_update(target, mini, shape)))
    assert moved / (4 * math.prod(shape)) == pytest.approx(words, rel=0.01)


@pytest.mark.planning
def test_a_kernel_counts_as_what_it_moves_in_the_compilers_own_sum():
    params = {"w": jax.ShapeDtypeStruct((4, 1024, 4096), "float32")}

    def moved(implementation: Any) -> float:
        tx = scale_by_apollo(64, weight_dimension_numbers=LAST_TWO, implementation=implementation)
        analysis: Any = compile_update(tx, params, "tpu-v5e").cost_analysis()
        return analysis["bytes accessed"]

    read = 4 * math.prod(params["w"].shape)
    assert 2 * read < moved(pallas_tpu) < moved(None) - 0.9 * read
