"""Fuses the backward pass with the update, one layer at a time.

No gradient of the whole model exists. A model is three pure functions over `{"blocks": stacked,
"rest": ...}`. The step runs the blocks forward and keeps their inputs, and then runs the blocks
backwards. Any per-leaf Optax transformation turns the gradient of a block into an update, which is
written into the stacked weights in place. The gradient is dropped before the next block. The
optimizer state is the ordinary state of the stacked tree, so checkpoints fit both kinds of step.

What needs all gradients at once cannot be combined with a layer-wise step:

- In place of clipping by the global norm, use APOLLO's limiter (`limit_norm_growth`), which needs
  only the norm of each matrix.
- In place of gradient accumulation (`optax.MultiSteps`), use a larger micro-batch. The activations
  take less memory than the accumulated gradients would.
- In place of `optax.apply_if_finite`, use `make_guarded_step`.

Statistics of a stacked leaf, such as a trust ratio or a clipped root mean square, are statistics of
one layer here.
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
