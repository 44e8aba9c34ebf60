"""Writes docs/recipe.md from the recipe's own fields, and the last table of docs/data-faults.md from that of the tests.

Policy tests compare. Run: .venv/bin/python scripts/make_docs.py
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from myna.recipe import setting_lines

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "recipe.md"
FAULTS = ROOT / "docs" / "data-faults.md"
LAST_TABLE = "## Where each fault is told\n"
HEAD = """# The recipe

Every setting with its default. Made by `scripts/make_docs.py` from `myna/recipe.py`.

YAML 1.2 (`2e-4` is a number, `no` is a text). Unknown keys are refused with line and nearest name. Paths count from the
recipe's folder; `--set KEY=VALUE` overrides any setting, and its paths count from the current folder. Of a run that is there
`myna evaluate` takes `--set evaluate.…`, `myna export` `--set export.quantize` and `export.importance`, and the run keeps
them; `merge`, `verify` and `chat` take none. `myna init FILE`
writes a recipe with all of this as comments; the run keeps the resolved one, every default written out.
"""


def recipe_page() -> str:
    lines = [HEAD]
    block = ""
    for key, default, description in setting_lines():
        section = key.split(".")[0]
        if section != block:
            block = section
            lines += [f"\n## {section}\n", "| setting | default | what it is |", "| --- | --- | --- |"]
        shown = f"`{default}`" if default not in ("", "required") else default
        lines.append(f"| `{key}` | {shown} | {description.replace('|', '·')} |")
    return "\n".join(lines) + "\n"


def faults_page() -> str:
    """docs/data-faults.md as it is, with its last table made anew."""
    sys.path.insert(0, str(ROOT / "tests"))
    table = runpy.run_path(str(ROOT / "tests" / "faults_table.py"))["as_markdown"]()
    before, heading, after = FAULTS.read_text(encoding="utf-8").partition(LAST_TABLE)
    said = after.partition("| fault |")[0]
    return before + heading + said + table


if __name__ == "__main__":
    FAULTS.write_text(faults_page(), encoding="utf-8")
    PAGE.write_text(recipe_page(), encoding="utf-8")
