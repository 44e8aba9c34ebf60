"""Pages that are made from the code are what the code makes, and links between pages lead somewhere."""

from __future__ import annotations

import re
import runpy

import pytest
from source_tree import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_recipe_page_is_up_to_date() -> None:
    made = runpy.run_path(str(ROOT / "scripts" / "make_docs.py"))["recipe_page"]()
    assert (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8") == made, "run scripts/make_docs.py"


def test_the_table_of_faults_is_that_of_the_tests() -> None:
    made = runpy.run_path(str(ROOT / "scripts" / "make_docs.py"))["faults_page"]()
    assert (ROOT / "docs" / "data-faults.md").read_text(encoding="utf-8") == made, "run scripts/make_docs.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: object) -> None:
    from pathlib import Path

    assert isinstance(page, Path)
    targets = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if "://" not in target and not (page.parent / target).exists()] == []
