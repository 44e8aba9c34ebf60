"""`myna data show`: rendered rows on the terminal, as JSON, or as a page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from myna.errors import UsageError
from myna.terminal import AsJson, new_console, print_json

if TYPE_CHECKING:
    from myna.recipe import Recipe

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="a recipe.yaml")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a setting of the recipe")
]


def show(
    recipe: RecipePath,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(help="how many rows", min=1)] = 3,
    row: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N|FILE:N", help="this row: its number, or its place as errors tell it; may be repeated"
        ),
    ] = None,
    ids: Annotated[bool, typer.Option("--ids", help="a token a line, with its id")] = False,
    packs: Annotated[
        bool, typer.Option("--packs", help="what packing makes of all rows, instead of single ones")
    ] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="write a page with every token to be pointed at")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="replace FILE where it exists")] = False,
    as_json: AsJson = False,
) -> None:
    """Rendered rows with the trained tokens coloured: exactly what the model will see."""
    from myna.preview import preview_rows
    from myna.recipe import load_recipe

    if html is not None and html.exists() and not yes:
        raise UsageError("is there already", where=str(html), help="--yes replaces it")
    loaded = load_recipe(recipe, overrides or [])
    if packs:
        if row or ids or html:
            raise UsageError("--packs tells of all rows, and goes with --json alone")
        _show_packs(loaded, as_json)
        return
    shown = preview_rows(loaded, rows, new_console(stderr=True).print, row or ())
    if html is not None:
        from myna.preview_page import preview_page
        from myna.run import write_text

        write_text(html, preview_page(Path(loaded.data.train).name, shown, loaded.model.base))
    if as_json:
        told = {"html": str(html)} if html else {}
        print_json({"rows": [one.as_json(with_tokens=ids) for one in shown], **told})
        return
    console = new_console()
    if html is not None:
        console.print(f"{len(shown)} rows written to {html}", markup=False, highlight=False)
        return
    for one in shown:
        console.print(one.as_tokens() if ids else one.as_text(), soft_wrap=True)
        console.print(one.summary, style="dim", markup=False, highlight=False, soft_wrap=True)
        console.print()


def _show_packs(recipe: Recipe, as_json: bool) -> None:
    from myna.prepare import plan_rows

    facts = plan_rows(recipe, new_console(stderr=True).print)
    if as_json:
        print_json({"packs": facts.as_json()})
        return
    for sentence in facts.sentences():
        new_console().print(sentence, highlight=False, soft_wrap=True)
