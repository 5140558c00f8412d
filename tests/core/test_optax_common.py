"""Optax's own tests of contributed optimizers and of sharding, which its wheel has, with ours."""

import importlib.util
import warnings
from types import ModuleType
from typing import Any

import jax
import pytest
from absl.testing import parameterized

import apollo_optax

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_dimension_numbers:UserWarning")

# Ranks are of the tests' parameters, and rates such that 30,000 steps end within their tolerance.
OURS: dict[str, dict[str, Any]] = {
    "apollo": {"learning_rate": 1e-2, "rank": 2},
    "apollo_mini": {"learning_rate": 1e-3},
    "swan": {"learning_rate": 1e-3},
}


def loaded(name: str) -> ModuleType:
    """A copy of a module of Optax's tests whose tables of optimizers are those of ours."""
    rows = [
        {"opt_name": name, "opt_kwargs": options, "wrapper_name": None, "wrapper_kwargs": None}
        for name, options in OURS.items()
    ]
    optimizers = {name: getattr(apollo_optax, name)(**options) for name, options in OURS.items()}
    product, named = parameterized.product, parameterized.named_parameters
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", "")  # the module sets it
        patch.setattr(parameterized, "product", lambda _, **grid: product(rows, **grid))
        patch.setattr(
            parameterized,
            "named_parameters",
            lambda *cases: named(*cases) if len(cases) > 1 else named(optimizers.items()),
        )
        with warnings.catch_warnings(action="ignore"):  # of the optimizers that are left out
            spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def compare_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Optax's tests compare versions as text, by which 0.10 is before 0.7, and are skipped."""
    if jax.version.__version_info__ >= (0, 10):
        monkeypatch.setattr(jax, "__version__", "0.9")


common = loaded("optax.contrib._common_test")
common._get_opt_factory = vars(apollo_optax).__getitem__  # type: ignore[attr-defined]

ContribTest = common.ContribTest
ShardingTest = loaded("optax._src.sharding_test").ShardingTest
