"""The blocks of docs/clients.md run and learn with the packages they are of: pytest -m clients."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.clients
PAGE = (Path(__file__).parents[2] / "docs" / "clients.md").read_text()
BLOCKS = {
    section.split("\n", 1)[0]: re.findall(r"^```py\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    for section in PAGE.split("\n## ")[1:]
}
PACKAGES = {
    "Tunix": "tunix",
    "Gemma and Kauldron": "kauldron",
    "EasyDeL": "easydel",
    "Levanter and Haliax": "levanter",
    "Keras": "keras",
    "Haiku": "haiku",
    "NumPyro": "numpyro",
}
LEARNS = "assert losses[-1] < 0.5 * losses[0], losses"
# The command line needs a checkpoint and a data set; this is what it does with its configuration.
MAKES_ITS_OPTIMIZER = """
pipeline = object.__new__(peft_main.PeftPipeline)
pipeline.config = {"optimizer_config": {"opt_type": "apollo_mini", "learning_rate": 0.01}}
state = pipeline.create_optimizer("optimizer_config").init({"kernel": np.zeros((8, 16))})
assert state.inner_state[0].mu["kernel"].shape == (1, 16)
assert set(state.hyperparams) == {"learning_rate"}
"""


def test_each_client_of_the_page_has_a_block():
    assert set(BLOCKS) == set(PACKAGES)
    assert all(BLOCKS.values())


@pytest.mark.parametrize("client", PACKAGES)
def test_recipe_runs_and_learns(client, tmp_path):
    if importlib.util.find_spec(PACKAGES[client]) is None:
        pytest.skip(f"{client} is not installed; not all of these agree on a version of JAX")
    first, *more = BLOCKS[client]
    script = tmp_path / "recipe.py"
    checks = [LEARNS, *(block.split("if __name__")[0] + MAKES_ITS_OPTIMIZER for block in more)]
    script.write_text("\n".join([first, *checks]))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script],
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "4", "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
