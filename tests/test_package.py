import importlib.metadata
import itertools
import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import apollo_optax

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_version_is_that_of_the_installed_package() -> None:
    assert apollo_optax.__version__ == importlib.metadata.version("apollo-optax")
    assert PROJECT["version"]


def test_the_package_says_where_its_method_is_published() -> None:
    assert PROJECT["urls"]["Paper"].startswith("https://arxiv.org/")


def test_the_lock_has_an_allowed_version_of_all_that_the_tests_need() -> None:
    pins = re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "requirements-dev.lock").read_text(), re.M)
    extras = PROJECT["optional-dependencies"]
    groups = [extras[name] for name in ("quantization", "examples", "hub", "docs", "test")]
    for requirement in map(Requirement, itertools.chain(PROJECT["dependencies"], *groups)):
        if requirement.name != PROJECT["name"]:
            versions = [
                version for name, version in pins if name == canonicalize_name(requirement.name)
            ]
            assert versions, f"{requirement.name} is not in the lock"
            assert all(requirement.specifier.contains(version) for version in versions)


def test_the_lock_names_no_place_to_install_from() -> None:
    lock = (ROOT / "requirements-dev.lock").read_text()
    assert not re.search(r"://|--(extra-)?index|--find-links|^-e|^/", lock, re.M)
