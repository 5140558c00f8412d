"""The documentation builds without a warning, and its figures are those of the results."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import apollo_optax
from apollo_optax import layerwise, planning, quantization, sharding

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    arguments = ["-W", "--keep-going", "-q", "-b", "html", "-d", str(folder / "doctrees")]
    build = subprocess.run(
        [sys.executable, "-m", "sphinx", *arguments, str(DOCS), str(folder / "html")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert build.returncode == 0, build.stderr
    return folder / "html"


@pytest.mark.slow
def test_formulas_are_rendered_without_a_network(site: Path) -> None:
    scripts = re.findall(r'<script[^>]* src="([^"]+)"', (site / "api.html").read_text("utf-8"))
    assert not [script for script in scripts if "://" in script]
    (mathjax,) = (script.split("?")[0] for script in scripts if "mathjax" in script)
    assert (site / mathjax).is_file()


@pytest.mark.slow
def test_the_build_leaves_nothing_beside_it(site: Path) -> None:
    assert {path.name for path in site.parent.iterdir()} == {"html", "doctrees"}
    assert not (DOCS / "_notebooks").exists()


def entries(site: Path) -> set[str]:
    page = (site / "api.html").read_text(encoding="utf-8")
    return set(re.findall(r'<dt class="sig[^"]*" id="([^"]+)"', page))


@pytest.mark.slow
def test_every_page_is_built_and_linked_from_the_index(site: Path) -> None:
    index = (site / "index.html").read_text(encoding="utf-8")
    for page in DOCS.glob("*.md"):
        assert (site / f"{page.stem}.html").is_file()
        assert page.stem == "index" or f'href="{page.stem}.html"' in index


@pytest.mark.slow
def test_every_public_name_has_an_entry(site: Path) -> None:
    assert {f"apollo_optax.{name}" for name in apollo_optax.__all__} <= entries(site)


@pytest.mark.slow
def test_every_public_name_of_the_modules_has_an_entry(site: Path) -> None:
    named = {
        f"{module.__name__}.{name}"
        for module in (layerwise, planning, quantization, sharding)
        for name in module.__all__
        if name != "QArray"  # qwix's, documented there
    }
    assert named <= entries(site)


@pytest.mark.slow
def test_every_notebook_is_a_page(site: Path) -> None:
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        assert (site / "_notebooks" / f"{notebook.stem}.html").is_file()


def words_of(page: Path) -> str:
    """Its text with single spaces, wherever its lines break."""
    return " ".join(page.read_text(encoding="utf-8").split())


def test_figures_of_the_update_in_the_text_are_those_of_the_results() -> None:
    timed = json.loads((RESULTS / "step_time.json").read_text(encoding="utf-8"))["rows"]
    (over_adamw,) = (
        row["over_adamw"]
        for row in timed
        if (row["model"], row["optimizer"]) == ("60m", "APOLLO-Mini")
    )
    traffic = json.loads((RESULTS / "hbm_traffic.json").read_text(encoding="utf-8"))["rows"]
    words = {(row["optimizer"], row["dtype"], row["target"]): row["hbm_words"] for row in traffic}
    mini, adamw = (words[name, "float32", "tpu-v5e"] for name in ("APOLLO-Mini", "AdamW"))
    page = words_of(DOCS / "benchmarks.md")
    assert f"APOLLO-Mini takes {over_adamw:.2f} of `optax.adamw`'s time" in page
    assert f"moves {mini:.1f} words of memory a parameter where AdamW moves {adamw:g}." in page
    stacked, apart = (
        row["compiler_words"]
        for name in ("APOLLO-Mini", "APOLLO-Mini, layers apart")
        for row in traffic
        if (row["optimizer"], row["dtype"], row["target"]) == (name, "float32", "tpu-v5e")
    )
    assert f"is {stacked:.1f} with stacked layers and {apart:.1f} with layers apart" in page
    names = ("APOLLO, r = 256", "APOLLO, r = 256, kernel", "AdamW")
    plain, kernel, adamw = (words[name, "bfloat16", "tpu-v5e"] for name in names)
    assert (
        f"In bfloat16 plain code moves {1 - plain / adamw:.0%} less than AdamW at r = 256" in page
    )
    assert f"with the kernel it moves {1 - kernel / adamw:.0%} less" in page


def test_figures_of_the_update_on_an_accelerator_in_the_text_are_those_of_the_results() -> None:
    path = RESULTS / "accelerator_step_time.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    of_7b = {row["optimizer"]: row for row in rows if row.get("model") == "7b"}
    adamw, page = of_7b["optax.adamw"], words_of(DOCS / "benchmarks.md")
    rate = adamw["gigabytes_moved"] / adamw["step_seconds"] / 1e3
    assert f"AdamW's update of 7B reads and writes {rate:.1f} TB a second" in page
    mini, apollo = (of_7b[name]["over_adamw"] for name in ("APOLLO-Mini", "APOLLO"))
    assert f"APOLLO-Mini takes {mini:.2f} of its time" in page
    assert f"APOLLO at rank 256 takes {apollo:.2f}" in page


def test_figures_of_the_micro_batch_in_the_text_are_those_of_the_results() -> None:
    rows = json.loads((RESULTS / "largest_micro_batch.json").read_text(encoding="utf-8"))["rows"]
    cell = ("adamw", "standard", "f32", 256)
    (row,) = (
        row
        for row in rows
        if (row["optimizer"], row["update"], row["moments"], row["sequence"]) == cell
    )
    peak, capacity = (f"{row[key] / 2**30:.2f}" for key in ("peak_bytes", "capacity_bytes"))
    page = words_of(DOCS / "benchmarks.md")
    assert f"AdamW's ordinary step needs {peak} of the {capacity} GiB" in page


def test_figures_of_the_readme_are_those_of_the_results() -> None:
    def rows(name: str) -> list[Any]:
        return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["rows"]

    readme = words_of(ROOT / "README.md")
    state = {
        row["optimizer"]: row["state_bytes"]
        for row in rows("state_sizes")
        if row["model"] == "LLaMA 7B"
    }
    assert f"{state['AdamW'] / 1e9:.0f} GB for LLaMA-7B in float32" in readme
    small = state["APOLLO-Mini, vocabulary factored"]
    assert f"APOLLO-Mini with a factored vocabulary keeps {small / 1e6:.0f} MB" in readme
    (peak,) = (
        row["peak_bytes"]
        for row in rows("peak_memory")
        if (row["target"], row["weights"], row["sequence"], row.get("vocabulary"))
        == ("a100-80gb", "int8", 256, "factored")
    )
    assert f"LLaMA-7B in {peak / 2**30:.1f} GiB" in readme
