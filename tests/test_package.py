import importlib.metadata
import tomllib
from pathlib import Path

import apollo_optax

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


def test_the_version_is_that_of_the_installed_package() -> None:
    assert apollo_optax.__version__ == importlib.metadata.version("apollo-optax")
    assert PROJECT["version"]


def test_the_package_says_where_its_method_is_published() -> None:
    assert PROJECT["urls"]["Paper"].startswith("https://arxiv.org/")
