"""`from myna import …`: what is offered, what is documented and what is there are the same names."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from source_tree import ROOT

import myna

README = ROOT / "README.md"


def documented_names(page: str) -> set[str]:
    """The first `name` of each list item or table row under a heading "From Python"."""
    match = re.search(r"^(#+) From Python\n(.*?)(?=^#{1,6} |\Z)", page, re.MULTILINE | re.DOTALL)
    assert match, 'README.md has no heading "From Python"'
    return set(re.findall(r"^\s*(?:[-*]|\|) `(?:myna\.)?(\w+)", match[2], re.MULTILINE))


def test_the_names_are_sorted_and_unique() -> None:
    assert list(myna.__all__) == sorted(set(myna.__all__))


@pytest.mark.parametrize("name", myna.__all__)
def test_every_name_is_there(name: str) -> None:
    assert getattr(myna, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = myna.no_such_name


def test_importing_the_package_imports_none_of_it() -> None:
    code = "import sys, myna; print([name for name in sys.modules if name.startswith('myna.')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_readme_lists_exactly_these() -> None:
    assert documented_names(README.read_text(encoding="utf-8")) == set(myna.__all__)


def test_documented_names_are_read_from_the_section_alone() -> None:
    page = "# x\n- `Other`\n## From Python\n- `Recipe`: a\n| `train(recipe)` | `Not` |\n### More\n- `Later`\n"
    assert documented_names(page) == {"Recipe", "train"}
