"""APOLLO and APOLLO-Mini as Optax gradient transformations: AdamW's training at SGD's memory."""

from apollo_optax._matrices import ApolloDimensionNumbers, transformer_dimension_numbers
from apollo_optax._optimizers import apollo, apollo_mini
from apollo_optax._projection import Projection, gaussian, rademacher, svd
from apollo_optax._rounding import apply_updates_stochastic
from apollo_optax._transform import (
    LimitNormGrowthState,
    ScaleByApolloState,
    limit_norm_growth,
    scale_by_apollo,
)

__all__ = [
    "ApolloDimensionNumbers",
    "LimitNormGrowthState",
    "Projection",
    "ScaleByApolloState",
    "apollo",
    "apollo_mini",
    "apply_updates_stochastic",
    "gaussian",
    "limit_norm_growth",
    "rademacher",
    "scale_by_apollo",
    "svd",
    "transformer_dimension_numbers",
]
