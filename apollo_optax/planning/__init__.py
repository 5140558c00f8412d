"""Compiles a training step for chips that you do not have, and says what the step needs there.

XLA's compilers for TPUs and GPUs run on a machine that has neither chip. They lay out every buffer
of a step, so you know what the step needs before you rent a chip. Nothing is run.

    plan = planning.compile_for("a100-80gb:8", step, params, state, batch, donate_argnums=(0, 1))
    plan.fits, plan.peak_bytes, plan.collectives
    plan.step_seconds_at_least, plan.limited_by

In a checkout, install the compilers with `pip install -e '.[planning]'`. Set `JAX_PLATFORMS=cpu` so
that JAX does not look for the chips. The numbers leave out the memory of other processes on a chip,
and the fragmentation of an allocator that has served other programs before.
"""

from apollo_optax.planning._collectives import Collective
from apollo_optax.planning._largest_batch import LargestBatch, largest_batch
from apollo_optax.planning._plan import Plan, compile_for
from apollo_optax.planning._targets import GPUS, TPUS, Target, mesh_for, parse_target

__all__ = [
    "GPUS",
    "TPUS",
    "Collective",
    "LargestBatch",
    "Plan",
    "Target",
    "compile_for",
    "largest_batch",
    "mesh_for",
    "parse_target",
]
