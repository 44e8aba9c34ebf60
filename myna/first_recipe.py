"""A commented recipe for rows that were looked at: what `myna init` writes. Loads nothing heavy."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from myna.data.rows import load_rows
from myna.errors import UsageError
from myna.model.hub_rows import locate_rows
from myna.recipe import build_recipe, setting_lines
from myna.run import write_text


def init_recipe(
    rows: Path, path: Path, overrides: Sequence[str] = (), *, overwrite: bool = False
) -> tuple[Path, list[str]]:
    """Looks at a data file and writes a commented recipe for it; returns its path and what was found out.

    `overrides` are `key=value` texts, by which the rows are read too.

    Raises DataError for rows that cannot be used, UsageError where the recipe is there already.
    """
    if path.exists() and not overwrite:
        raise UsageError(
            "there is a recipe already", where=str(path), help=f"myna init {rows} --yes replaces it"
        )
    recipe = build_recipe({"data": {"train": str(rows)}}, overrides)
    loaded = load_rows(locate_rows(rows).path, recipe.data)
    chosen = {"model.base": "smollm2-135m", "data.train": json.dumps(str(rows), ensure_ascii=False)}
    chosen |= {"export.quantize": "[Q4_K_M, Q8_0]"}
    settings = recipe.model_dump(mode="json")
    for text in overrides:
        section, name = text.partition("=")[0].strip().split(".")[:2]
        chosen[f"{section}.{name}"] = json.dumps(settings[section][name], ensure_ascii=False)
    lines = [f"# {sentence}" for sentence in loaded.said]
    lines += ["# Lines that are commented out show the default.", ""]
    block = ""
    for key, default, description in setting_lines():
        section, name = key.split(".")
        if section != block:
            block = section
            lines += [""] if lines[-1] else []
            lines.append(f"{section}:" if _has_choice(section, chosen) else f"# {section}:")
        value = chosen.get(key)
        shown = f"  {name}: {value}" if value else f"  # {name}: {default}".rstrip()
        lines.append(f"{shown:<40}  # {description}")
    write_text(path, "\n".join(lines) + "\n")
    return path, list(loaded.said)


def _has_choice(section: str, chosen: Mapping[str, str]) -> bool:
    return any(key.startswith(f"{section}.") for key in chosen)
