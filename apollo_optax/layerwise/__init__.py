"""Fuses the backward pass with the update, one layer at a time: no gradient of the whole model
exists.

A model is three pure functions over `{"blocks": stacked, "rest": ...}`. The step runs the blocks
forward keeping their inputs, then backwards: each block's gradient is made, turned into an update
by any per-leaf Optax transformation, written into the stacked weights in place, and dropped before
the next. The optimizer state is the ordinary one of the stacked tree, so checkpoints serve both.

What needs all gradients at once does not go with it. Clipping by the global norm: use APOLLO's
limiter (`limit_norm_growth`), which needs a matrix's own norm only. Accumulating gradients
(`optax.MultiSteps`): use a larger micro-batch, whose activations cost less than the gradients kept.
`optax.apply_if_finite`: use `make_guarded_step`. Statistics of a stacked leaf (a trust
ratio, a clipped root mean square) are statistics of a layer here.
"""

from apollo_optax.layerwise._checks import check_per_leaf, init
from apollo_optax.layerwise._model import (
    EXACT,
    STOCHASTIC,
    GuardReport,
    LayerwiseModel,
    WeightFormat,
)
from apollo_optax.layerwise._step import make_guarded_step, make_loss, make_step

__all__ = [
    "EXACT",
    "STOCHASTIC",
    "GuardReport",
    "LayerwiseModel",
    "WeightFormat",
    "check_per_leaf",
    "init",
    "make_guarded_step",
    "make_loss",
    "make_step",
]
