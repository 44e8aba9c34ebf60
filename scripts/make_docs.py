"""Writes docs/recipe.md from the recipe's own fields; a policy test compares. Run: .venv/bin/python scripts/make_docs.py"""

from __future__ import annotations

from pathlib import Path

from myna.recipe import setting_lines

PAGE = Path(__file__).parent.parent / "docs" / "recipe.md"
HEAD = """# The recipe

Every setting with its default. Made by `scripts/make_docs.py` from `myna/recipe.py`.

YAML 1.2 (`2e-4` is a number, `no` is a text). Unknown keys are refused with line and nearest name. Paths count from the
recipe's folder; `--set KEY=VALUE` overrides any setting, and its paths count from the current folder. `myna init FILE`
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


if __name__ == "__main__":
    PAGE.write_text(recipe_page(), encoding="utf-8")
