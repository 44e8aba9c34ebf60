"""Every recipe that is shipped loads."""

from __future__ import annotations

from pathlib import Path

import pytest
from source_tree import ROOT

from myna.recipe import load_recipe

RECIPES = sorted((ROOT / "recipes").glob("*.y*ml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_the_recipe_loads(path: Path) -> None:
    assert load_recipe(path).data.train
