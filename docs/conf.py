"""Sphinx configuration: `python -m sphinx -W --keep-going -b html docs docs/_build`.

Nothing is run and nothing is fetched: notebooks are shown with their committed outputs.
"""

import ast
import inspect
import json
import re
import shutil
import textwrap
import tomllib
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]
COPIES = Path(__file__).parent / "_notebooks"
# Names of modules' functions that elsewhere are those of Optax.
AMBIGUOUS = ("init", "apply_updates")

project = "apollo-optax"
author = "The apollo-optax authors"
project_copyright = f"2026, {author}. Apache-2.0"
release = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]

# The last one brings MathJax itself, so that formulas are rendered without a network.
extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "myst_nb",
    "sphinx_copybutton",
    "sphinx-mathjax-offline",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"

default_role = "literal"  # docstrings are Markdown's kind: single backticks are code
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
maximum_signature_line_length = 88  # a longer one has a line for every argument
autosummary_generate = False  # the pages of docs/api are written by hand
napoleon_use_ivar = True
napoleon_attr_annotations = False  # the signature has them
add_module_names = False
copybutton_exclude = ".linenos, .gp, .go"

html_theme = "furo"
html_title = "apollo-optax"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]


def copy_notebooks() -> None:
    """Copies the notebooks, which lie beside the documentation, to where Sphinx looks for pages."""
    shutil.rmtree(COPIES, ignore_errors=True)
    COPIES.mkdir()
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                cell["source"] = _links_from_copy("".join(cell["source"]))
        (COPIES / path.name).write_text(json.dumps(notebook), encoding="utf-8")


def _links_from_copy(text: str) -> str:
    text = text.replace("](../", "](../../").replace("](../../docs/", "](../")
    return _as_downloads(text, "../../")


def _as_downloads(text: str, root: str) -> str:
    """Links to pages beside the documentation, such as the README, as links to their files."""
    return re.sub(rf"\]\(({re.escape(root)}[^)#]+\.md)(#[^)]*)?\)", r"](path:\1)", text)


def mark_downloads(app: Sphinx, docname: str, source: list[str]) -> None:
    """Does so for the pages in the documentation's own folder, and links notebooks' copies."""
    del app
    if "/" not in docname:
        source[0] = _as_downloads(source[0].replace("](../notebooks/", "](_notebooks/"), "../")


def mark_code(app: Sphinx, what: str, name: str, of: Any, options: Any, lines: list[str]) -> None:
    """Marks code in docstrings as reStructuredText has it.

    The indented code of a module is code, not a quotation; a plural after a backtick is set apart.
    """
    del app, name, of, options
    text = re.sub(
        r"(`[^`]+`)([a-z]?)", lambda m: f"{m[1]}\\ {m[2]}" if m[2] else m[1], "\n".join(lines)
    )
    if what == "module":
        text = re.sub(r"\n\n(?= {4}\S)", "\n\n.. code-block:: python\n\n", text)
    lines[:] = text.split("\n")


def signature_as_written(
    app: Sphinx, what: str, name: str, of: Any, options: Any, signature: str, returned: str
) -> tuple[str, str | None] | None:
    """Shows types by the names that the source gives them: their unions fill pages."""
    del app, name, options, returned
    if what not in ("function", "class") or not signature:
        return None
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(of))).body
    if isinstance(node, ast.FunctionDef):
        return f"({ast.unparse(node.args)})", ast.unparse(node.returns or ast.Constant(None))
    assert isinstance(node, ast.ClassDef)
    fields = []
    for line in node.body:
        if isinstance(line, ast.AnnAssign):
            is_of_dataclass = isinstance(line.value, ast.Call)  # field(...): no default
            fields.append(
                ast.unparse(line).split(" = ")[0] if is_of_dataclass else ast.unparse(line)
            )
    return (f"({', '.join(fields)})", None) if fields else None


def link_names(app: Sphinx, tree: nodes.document, page: str) -> None:
    """Links code that is a public name, or a call of one, to its entry in the API reference."""
    entries = {
        short: (name, entry.docname)
        for name, entry in app.env.domains.python_domain.objects.items()
        if entry.objtype in ("module", "function", "class", "data") and not entry.aliased
        for short in (name, name.removeprefix("apollo_optax."), name.split(".")[-1])
        if short not in AMBIGUOUS
    }
    for code in list(tree.findall(nodes.literal)):
        call = re.fullmatch(r"([\w.]+)(\(.*\))?", code.astext())
        if not call or call[1] not in entries or isinstance(code.parent, nodes.reference):
            continue
        name, entry_page = entries[call[1]]
        uri = "" if entry_page == page else app.builder.get_relative_uri(page, entry_page)
        anchor = f"module-{name}" if name in app.env.domains.python_domain.modules else name
        link = nodes.reference("", "", code.deepcopy(), refuri=f"{uri}#{anchor}", internal=True)
        code.replace_self(link)


def keep_outputs_in_build(app: Sphinx) -> None:
    """Has MyST-NB write the notebooks' pictures into the build folder, not beside it."""
    folder = Path(app.doctreedir) / "notebook_outputs"
    env: Any = app.env
    env.mystnb_config = env.mystnb_config.copy(output_folder=str(folder))


def remove_copies(app: Sphinx, error: Exception | None) -> None:
    """Removes the copies of the notebooks."""
    del app, error
    shutil.rmtree(COPIES, ignore_errors=True)


def setup(app: Sphinx) -> None:
    """Called by Sphinx before it looks for pages."""
    copy_notebooks()
    app.connect("builder-inited", keep_outputs_in_build, priority=900)
    app.connect("build-finished", remove_copies)
    app.connect("source-read", mark_downloads)
    app.connect("autodoc-process-docstring", mark_code)
    app.connect("autodoc-process-signature", signature_as_written)
    app.connect("doctree-resolved", link_names)
