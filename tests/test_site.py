"""The documentation builds without a warning, and its figures are those of the results."""

import fcntl
import json
import os
import re
import statistics
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

import apollo_optax
from apollo_optax import layerwise, planning, quantization, sharding
from benchmarks import real_model
from benchmarks.convergence.report import results_of
from benchmarks.rows import read_rows

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results"
TPU, A100 = "tpu-v5e", "a100-80gb"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built once: two builds at a time would remove each other's copies of notebooks."""
    of_worker = tmp_path_factory.getbasetemp()
    folder = (of_worker.parent if "PYTEST_XDIST_WORKER" in os.environ else of_worker) / "site"
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "html" / "objects.inv").is_file():
            _build(folder)
    return folder / "html"


def _build(folder: Path) -> None:
    arguments = ["-W", "--keep-going", "-q", "-b", "html", "-d", str(folder / "doctrees")]
    build = subprocess.run(
        [sys.executable, "-m", "sphinx", *arguments, str(DOCS), str(folder / "html")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert build.returncode == 0, build.stderr


@pytest.mark.slow
def test_formulas_are_rendered_without_a_network(site: Path) -> None:
    page = site / "api" / "optimizers.html"
    scripts = re.findall(r'<script[^>]* src="([^"]+)"', page.read_text("utf-8"))
    assert not [script for script in scripts if "://" in script]
    (mathjax,) = (script.split("?")[0] for script in scripts if "mathjax" in script)
    assert (page.parent / mathjax).is_file()


@pytest.mark.slow
def test_the_build_leaves_nothing_beside_it(site: Path) -> None:
    assert {path.name for path in site.parent.iterdir()} == {"html", "doctrees"}
    assert not (DOCS / "_notebooks").exists()


def entries(site: Path) -> set[str]:
    pages = (page.read_text(encoding="utf-8") for page in (site / "api").glob("*.html"))
    return {
        name for page in pages for name in re.findall(r'<dt class="sig[^"]*" id="([^"]+)"', page)
    }


@pytest.mark.slow
def test_every_page_is_built_and_linked_from_the_index(site: Path) -> None:
    index = (site / "index.html").read_text(encoding="utf-8")
    for page in DOCS.glob("*.md"):
        assert (site / f"{page.stem}.html").is_file()
        assert page.stem == "index" or f'href="{page.stem}.html"' in index


class _Page(HTMLParser):
    """The targets of a page's links and the places that links may name."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.places: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links.update(value for name, value in attrs if name in ("href", "src") and value)
        self.places.update(value for name, value in attrs if name == "id" and value)


def broken(link: str, origin: Path, places: dict[Path, set[str]]) -> bool:
    """Whether a link that needs no network leads to no file, or to no place in its page."""
    url = urlsplit(link)
    if url.scheme or url.netloc:
        return False
    file = (origin.parent / unquote(url.path)).resolve() if url.path else origin
    anchor = bool(url.fragment) and file in places
    return not file.exists() or (anchor and unquote(url.fragment) not in places[file])


@pytest.mark.slow
def test_every_local_link_of_the_site_leads_to_its_place(site: Path) -> None:
    pages = {page.resolve(): _Page(page) for page in site.rglob("*.html")}
    places = {path: page.places | {"", "top"} for path, page in pages.items()}
    found = {
        f"{path.relative_to(site.resolve())}: {link}"
        for path, page in pages.items()
        for link in page.links
        if broken(link, path, places)
    }
    assert not found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md", "CONTRIBUTING.md"])
def test_every_local_link_beside_the_site_leads_to_its_place(site: Path, name: str) -> None:
    places = {
        (DOCS / page.relative_to(site)).with_suffix(".md"): _Page(page).places
        for page in site.rglob("*.html")
    }
    links = re.findall(r"\]\(([^)\s]+)\)", (ROOT / name).read_text(encoding="utf-8"))
    assert not [link for link in links if broken(link, ROOT / name, places)]


def test_links_of_pages_lead_to_files_of_the_checkout_too() -> None:
    for page in DOCS.rglob("*.md"):
        links = re.findall(r"\]\(([^)\s#]+)", page.read_text(encoding="utf-8"))
        local = (link.removeprefix("path:") for link in links if ":" not in link.split("/")[0])
        assert not [link for link in local if not (page.parent / link).exists()], page


@pytest.mark.slow
def test_no_word_is_misspelt() -> None:
    texts = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")]
    code = ["apollo_optax", "examples", "benchmarks", "notebooks"]
    sources = [path for folder in code for path in ROOT.glob(f"{folder}/**/*.py")]
    notebooks = ROOT.glob("notebooks/*.ipynb")
    check = [sys.executable, "-m", "codespell_lib", *map(str, [*texts, *sources, *notebooks])]
    spelling = subprocess.run(check, cwd=ROOT, capture_output=True, text=True)
    assert spelling.returncode == 0, spelling.stdout + spelling.stderr


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
    page = words_of(DOCS / "benchmarks.md")
    assert f"APOLLO-Mini takes {over_adamw:.2f} of `optax.adamw`'s time" in page
    adamw, mini, on_a100 = (
        words[name, "float32", target]
        for name, target in (("AdamW", TPU), ("APOLLO-Mini", TPU), ("APOLLO-Mini", A100))
    )
    assert f"AdamW moves {adamw:g} words of memory a parameter." in page
    assert f"APOLLO-Mini moves {mini:.1f} on the TPU and {on_a100:.1f} on the A100." in page
    summed = {
        (row["optimizer"], row["dtype"]): row["compiler_words"]
        for row in traffic
        if row["target"] == TPU
    }
    for optimizer, dtype in (("APOLLO-Mini", "float32"), ("APOLLO, r = 256", "bfloat16")):
        stacked, apart = (summed[name, dtype] for name in (optimizer, f"{optimizer}, layers apart"))
        assert f"from {stacked:.2f} to {apart:.2f}" in page
    less = {
        (name, target): f"{1 - words[name, 'bfloat16', target] / adamw:.0%}"
        for name, target in (
            ("APOLLO, r = 256", TPU),
            ("APOLLO, r = 256", A100),
            ("APOLLO, r = 256, kernel", TPU),
        )
    }
    plain, plain_on_a100, kernel = less.values()
    assert f"In bfloat16, APOLLO at r = 256 moves {plain} less than AdamW on the TPU" in page
    assert f"and {plain_on_a100} less on the A100" in page
    assert f"With the kernel it moves {kernel} less on the TPU." in page


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
    assert f"AdamW's ordinary step needs {peak} GiB. A program can use {capacity} GiB" in page


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
    assert f"keeps {state['APOLLO-Mini'] / 1e9:.1f} GB for LLaMA-7B" in readme
    (peak,) = (
        row["peak_bytes"]
        for row in rows("peak_memory")
        if (row["target"], row["weights"], row["sequence"], row.get("vocabulary"))
        == ("a100-80gb", "int8", 256, "factored")
    )
    for page in (readme, words_of(DOCS / "index.md")):
        assert f"LLaMA-7B in {peak / 2**30:.1f} GiB" in page


def test_figures_of_the_released_model_in_the_text_are_those_of_the_results() -> None:
    rows = read_rows(RESULTS / "real_model.json")

    def losses(name: str) -> list[float]:
        best = real_model.best_trial(found := real_model.losses_of(rows, name))
        return [found[best._replace(seed=seed)] for seed in (0, 1, 2)]

    def state(name: str) -> float:
        return next(row["state_bytes"] for row in rows if row["method"] == name)

    adamw, apollo, small = map(losses, ("adamw", "apollo_quarter", "apollo_mini_factored"))
    below, above = (statistics.fmean(adamw) - statistics.fmean(each) for each in (apollo, small))
    page = words_of(DOCS / "benchmarks.md")
    of_state = state("apollo_quarter") / state("adamw")
    assert f"with {of_state:.0%} of its state. Their means are {below:.3f} apart, within" in page
    assert 0 < below <= statistics.stdev(apollo)
    assert f"keeps {state('apollo_mini_factored') / 1e6:.1f} MB, a five-hundredth of" in page
    assert round(state("adamw") / state("apollo_mini_factored"), -2) == 500
    for each in (page, words_of(DOCS / "fine_tuning.md")):
        assert f"ends {-above:.2f} above AdamW" in each
    assert -above <= statistics.stdev(small)
    assert f"it keeps {state('apollo_mini') / 1e6:.1f} MB and ends alike" in page
    assert abs(statistics.fmean(losses("apollo_mini")) - statistics.fmean(small)) < 0.002
    assert f"ends alike, with {state('apollo_eighth') / state('adamw'):.0%} of AdamW's" in page
    assert abs(statistics.fmean(losses("apollo_eighth")) - statistics.fmean(apollo)) < 0.002
    (in_int8,) = real_model.losses_of(rows, "apollo_mini_int8").values()
    assert f"It ends {in_int8 - small[0]:.3f} above the float32 run" in page
    (swan,) = real_model.losses_of(rows, "swan")
    assert swan.learning_rate == real_model.METHODS["swan"].start / 2
    seconds = next(row["step_seconds"] for row in rows if row["method"] == "swan")
    assert f"A step of SWAN takes {seconds:.0f} s" in page
    assert f"with {state('lora') / 1e6:.1f} MB of state" in page
    assert max(losses("lora")) > statistics.fmean(adamw) > statistics.fmean(losses("lora"))
    of_vocabulary = {
        name: real_model.best_trial(real_model.losses_of(rows, name)).vocabulary_learning_rate
        for name in ("adamw", "apollo_quarter", "apollo_eighth", "apollo_mini_factored")
    }
    of_mini = real_model.best_trial(real_model.losses_of(rows, "apollo_mini"))
    assert (
        f"vocabulary was {of_vocabulary['adamw']:g}, and {of_mini.vocabulary_learning_rate:g} for "
        "APOLLO-Mini with Adam there"
    ) in words_of(DOCS / "fine_tuning.md")
    assert len(set(of_vocabulary.values())) == 1
    peaks = {row["method"]: row for row in rows if "process_bytes" in row}
    int8 = peaks["apollo_mini_int8"]
    of_process = int8["process_bytes"] / peaks["adamw"]["process_bytes"]
    assert f"takes {of_process:.0%} of AdamW's. Of it, {int8['python_bytes'] / 2**30:.2f}" in page


def test_the_rule_of_thumb_is_the_sweep_of_the_convergence_benchmark() -> None:
    rates = {
        result.name: result.learning_rate
        for result in results_of(read_rows(RESULTS / "convergence.json"))
    }
    apollo, mini, adamw = (rates[name] for name in ("apollo_r32", "apollo_mini", "adamw"))
    page = words_of(DOCS / "choosing.md")
    assert (round(apollo / adamw), round(mini / adamw)) == (7, 14)
    assert f"seven times AdamW's best | our sweep: {apollo:g} for APOLLO, {adamw:g} for" in page
    assert "Its best learning rate was fourteen times AdamW's" in page
