"""The pages for a newcomer: every command is run, and what stands below it is what it says."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import Command
from shell_pages import ROOT, run_page

from myna.data.rows import load_rows
from myna.recipe import load_recipe

PAGE = ROOT / "docs" / "from-your-export.md"
TOOLS = ("bash", "iconv", "awk", "sed", "grep", "head", "cut")

pytestmark = pytest.mark.skipif(not all(map(shutil.which, TOOLS)), reason="a tool of the shell is missing")


def test_what_the_commands_say_stands_on_the_page(myna: Command, tmp_path: Path, tiny_base: Path) -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert run_page(page, tmp_path) == page, "run: python tests/shell_pages.py docs/from-your-export.md"
    assert len(load_rows("clean.jsonl", load_recipe(Path("recipe.yaml"), []).data).conversations) == 9
    # the recipe that names the table itself trains as well
    settings = ["--set", f"model.base={tiny_base}", "--set", "train.max_steps=1"]
    recipe = page.partition("```yaml\n")[2].partition("```")[0]
    (tmp_path / "own.yaml").write_text(recipe, encoding="utf-8")
    done = myna("train", "own.yaml", *settings, "--set", "run.name=own")
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "runs" / "own" / "rows" / "quarantine.jsonl").read_text().splitlines()) == 2


def test_a_page_that_says_something_else_is_seen(tmp_path: Path) -> None:
    page = "```sh\necho one\necho two >&2\n```\n\n```text\none\n```\n"
    made = run_page(page, tmp_path)
    assert made == page.replace("one\n```\n", "one\ntwo\n```\n") != page
    assert run_page(made, tmp_path) == made
    with pytest.raises(AssertionError, match="without output says"):
        run_page("```sh\necho one\n```\n", tmp_path)
