"""Every Python block of the README and the docs runs, and what trains in it learns."""

import re
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# The pages that are read first; the others' blocks are slow.
FIRST = ("README", "index", "getting_started")
BLOCKS = [
    pytest.param(
        block,
        id=f"{page.stem}-{number}",
        marks=[] if page.stem in FIRST else pytest.mark.slow,
    )
    for page in PAGES
    for number, block in enumerate(BLOCK.findall(page.read_text()))
]


@pytest.mark.parametrize("block", BLOCKS)
def test_block_runs_and_learns(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    namespace: dict[str, object] = {"__name__": "__docs__"}
    with jax.numpy_rank_promotion("allow"):  # a user's program, not ours
        exec(compile(block, "docs", "exec"), namespace)
    if losses := namespace.get("losses"):
        assert isinstance(losses, list)
        assert losses[-1] < 0.5 * losses[0]


def test_ci_runs_the_test_command_of_the_readme():
    blocks = re.findall(r"^```bash\n(.*?)\n```$", (ROOT / "README.md").read_text(), re.M | re.S)
    commands = blocks[1].split(" && ")
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line for line in lines if line in commands] == commands
