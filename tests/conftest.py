import importlib.util
import os
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

# Shapes and dtypes that the annotations state hold in every call, where no test gives wrong ones.
CHECKED = (
    "_generator",
    "_limiter",
    "_magnitudes",
    "_matrices",
    "_placement",
    "_projections",
    "experimental",
)
if importlib.util.find_spec("beartype"):  # it comes with the [test] extra
    importlib.import_module("tests.typecheck")
    jaxtyping.install_import_hook(
        [f"apollo_optax.{name}" for name in CHECKED], "tests.typecheck.check_types"
    )

# For what runs on meshes; everything else is on the first. Eight cost a worker half a second.
jax.config.update("jax_num_cpu_devices", 8)
# The programs of the tests are small: they take longer to compile than to run.
jax.config.update("jax_disable_most_optimizations", True)
# Each program in one piece, by XLA's older emitters.
FASTER = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_parallel_codegen_split_count=1"
if jax.__version_info__ < (0, 11, 1):  # later ones do not have them
    FASTER += " --xla_cpu_use_fusion_emitters=false"


def pytest_configure(config: pytest.Config) -> None:
    """Lets the default tier compile faster."""
    if "not slow" in config.getoption("markexpr"):
        os.environ["XLA_FLAGS"] = FASTER


@pytest.fixture(autouse=True)
def no_rank_promotion():
    """Silent broadcasting between different numbers of axes is an error in our own code."""
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(scope="session", autouse=True)
def compile_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keeps compiled programs for the tests to come, a cache a worker: JAX's has no lock."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    # XLA reads its flags with the first program: those set from here on are for what tests start.
    jax.block_until_ready(jnp.zeros(()))
    # What tests start is compiled likewise, the same program by one process after another.
    others = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled_by_others")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        "XLA_FLAGS": FASTER,
    }
    os.environ.update(others)


@pytest.fixture(autouse=True)
def compile_as_users_do(request: pytest.FixtureRequest) -> Iterator[None]:
    """Optimizes what a test compiles that is marked so."""
    optimized = request.node.get_closest_marker("optimized") is not None
    jax.config.update("jax_disable_most_optimizations", not optimized)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
