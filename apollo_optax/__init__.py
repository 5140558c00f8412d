"""APOLLO and APOLLO-Mini as Optax gradient transformations: AdamW's training at SGD's memory."""

import importlib.metadata

from apollo_optax._alias import apollo, apollo_mini, swan
from apollo_optax._apollo import scale_by_apollo
from apollo_optax._leaves import ScaleByApolloState
from apollo_optax._limiter import LimitNormGrowthState, limit_norm_growth
from apollo_optax._matrices import ApolloDimensionNumbers
from apollo_optax._names import transformer_dimension_numbers
from apollo_optax._projections import Projection, gaussian, rademacher, svd
from apollo_optax._rounding import apply_updates_stochastic
from apollo_optax._swan import scale_by_swan
from apollo_optax.dimension_numbers._describe import Description, describe
from apollo_optax.dimension_numbers._infer import infer_dimension_numbers
from apollo_optax.dimension_numbers._rules import dimension_numbers_from_rules

try:
    __version__ = importlib.metadata.version("apollo-optax")
except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
    __version__ = "unknown"

__all__ = [
    "ApolloDimensionNumbers",
    "Description",
    "LimitNormGrowthState",
    "Projection",
    "ScaleByApolloState",
    "apollo",
    "apollo_mini",
    "apply_updates_stochastic",
    "describe",
    "dimension_numbers_from_rules",
    "gaussian",
    "infer_dimension_numbers",
    "limit_norm_growth",
    "rademacher",
    "scale_by_apollo",
    "scale_by_swan",
    "svd",
    "swan",
    "transformer_dimension_numbers",
]
