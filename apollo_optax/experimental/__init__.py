"""Features that no chip has timed yet. Names and behaviour may change in any release.

`pallas_tpu` is an implementation of APOLLO's update that reads each gradient once less than XLA's
program. Pass it as `implementation=` to `apollo` or `scale_by_apollo`, with a rank that is a
multiple of 8. APOLLO-Mini, of rank 1, has no such kernel. `benchmarks/hbm_traffic.py` has the
compiler's figures of the traffic that it saves.
"""

from apollo_optax.experimental._pallas import pallas_tpu

__all__ = ["pallas_tpu"]
