"""The tests of this folder need JAX, Optax, Chex and pytest, and nothing else of this project."""

import ast
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
SOURCES = [FOLDER.parent / "conftest.py", *sorted(FOLDER.glob("*.py"))]
# NumPy and SciPy come with JAX, Abseil with Optax, Jaxtyping with this project.
ALLOWED = {"absl", "apollo_optax", "chex", "jax", "jaxtyping", "numpy", "optax", "pytest", "scipy"}


def imported(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    modules += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {module.split(".")[0] for module in modules}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_nothing_else_is_imported(path: Path) -> None:
    assert imported(path) <= ALLOWED | sys.stdlib_module_names
