"""The count of bytes that a compiled program moves, by hand."""

import pytest

from apollo_optax.planning._hbm import hbm_bytes
from apollo_optax.planning._hlo import parse_program

# An array of 1 KiB is read twice, once ahead into the chip's memory, S(1), and a loop of 5 trips
# writes one of 512 bytes each time.
PROGRAM = """HloModule jit_step, is_scheduled=true

%fused (a: f32[256]) -> bf16[256] {
  %a = f32[256]{0:T(256)} parameter(0)
  ROOT %b = bf16[256]{0:T(256)} convert(%a)
}

%body (state: (f32[256])) -> (f32[256]) {
  %state = (f32[256]{0:T(256)}) parameter(0)
  %x = f32[256]{0:T(256)} get-tuple-element(%state), index=0
  %y = bf16[256]{0:T(256)} fusion(%x), kind=kLoop, calls=%fused
  ROOT %out = (f32[256]{0:T(256)}) tuple(%x)
}

%condition (state: (f32[256])) -> pred[] {
  %state = (f32[256]{0:T(256)}) parameter(0)
  ROOT %go = pred[] constant(true)
}

ENTRY %main (w: f32[256]) -> f32[256] {
  %w = f32[256]{0:T(256)} parameter(0)
  %start = (f32[256]{0:T(256)S(1)}, f32[256]{0:T(256)}, u32[]{:S(2)}) copy-start(%w)
  %done = f32[256]{0:T(256)S(1)} copy-done(%start)
  %half = bf16[256]{0:T(256)} fusion(%done), kind=kLoop, calls=%fused
  %state = (f32[256]{0:T(256)}) tuple(%w)
  %loop = (f32[256]{0:T(256)}) while(%state), condition=%condition, body=%body, TRIPS
  ROOT %sum = f32[256]{0:T(256)} add(%w, %w)
}
"""


NOTED = PROGRAM.replace("TRIPS", 'backend_config={"known_trip_count":{"n":"5"}}')
UNTOLD = PROGRAM.replace("TRIPS", "metadata={}")
COUNTED = UNTOLD.replace(
    "ROOT %go = pred[] constant(true)",
    """%i = s32[] get-tuple-element(%state), index=1
  %n = s32[] constant(7)
  ROOT %go = pred[] compare(%i, %n), direction=LT""",
).replace(
    "%state = (f32[256]{0:T(256)}) tuple(%w)",
    """%first = s32[] constant(2)
  %state = (f32[256]{0:T(256)}, s32[]) tuple(%w, %first)""",
)


@pytest.mark.parametrize("program", [NOTED, COUNTED], ids=["noted", "in the condition"])
def test_arrays_in_other_memories_are_not_counted_and_loops_are_as_often_as_they_run(program: str):
    ahead, half, loop, total = 1024, 512, 5 * (1024 + 512), 2 * 1024
    assert hbm_bytes(parse_program(program)) == ahead + half + loop + total


@pytest.mark.parametrize(
    "program",
    [UNTOLD, COUNTED.replace("tuple(%w, %first)", "fusion(%w), calls=%fused")],
    ids=["no counter", "a counter that begins anywhere"],
)
def test_a_loop_whose_trips_are_unknown_is_refused(program: str):
    with pytest.raises(ValueError, match="loop loop does not tell its trips"):
        hbm_bytes(parse_program(program))


def test_of_branches_the_cheapest_that_can_be_counted_is():
    branches = """
%small (s: (f32[256])) -> f32[256] {
  %s = (f32[256]{0}) parameter(0)
  %x2 = f32[256]{0} get-tuple-element(%s), index=0
  ROOT %twice = f32[256]{0} add(%x2, %x2)
}

%endless (t: (f32[256])) -> f32[256] {
  %t = (f32[256]{0}) parameter(0)
  %u = (f32[256]{0}) while(%t), condition=%condition, body=%body
  ROOT %x3 = f32[256]{0} get-tuple-element(%u), index=0
}

ENTRY """
    chosen = "branch_computations={%endless, %small}"
    program = PROGRAM.replace("ENTRY ", branches).replace(
        "while(%state)", "conditional(%p, %state)"
    )
    program = program.replace("condition=%condition, body=%body, TRIPS", chosen)
    ahead, half, branch, total = 1024, 512, 2 * 1024, 2 * 1024
    assert hbm_bytes(parse_program(program)) == ahead + half + branch + total
