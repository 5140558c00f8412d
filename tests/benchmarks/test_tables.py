"""The tables of the README and the documentation are those of the committed results."""

from pathlib import Path

import pytest

from benchmarks.tables import PAGES, TABLES, with_tables


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_results(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert with_tables(text) == text


@pytest.mark.parametrize("name", TABLES)
def test_every_table_is_on_a_page(name: str) -> None:
    assert any(f"<!-- {name} -->" in page.read_text(encoding="utf-8") for page in PAGES)
