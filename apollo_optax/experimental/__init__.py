"""What no chip has timed yet. Names and behaviour may change in any release.

`pallas_tpu` and `pallas_gpu` are implementations of APOLLO's update that read each gradient once
less than XLA's program. Pass one as `implementation=` to `apollo`, `apollo_mini` or
`scale_by_apollo`. The compiler's own figures of what a kernel saves are in
`benchmarks/hbm_traffic.py`.
"""

from apollo_optax.experimental._pallas import pallas_gpu, pallas_tpu

__all__ = ["pallas_gpu", "pallas_tpu"]
