"""`myna data check`, `convert`: rows looked at and rewritten before anything is trained."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from myna.errors import DataError, UsageError
from myna.terminal import AsJson, new_console, one_line, print_json

if TYPE_CHECKING:
    from myna.data.token_checks import TokenSettings
    from myna.recipe import Recipe
    from myna.settings import DataSettings

RECIPES = (".yaml", ".yml")
NO_RECIPE = "tokens: give a recipe in place of the rows (`myna init ROWS` writes one)"


class BadRow(StrEnum):
    """What becomes of rows that cannot be used."""

    fail = "fail"
    skip = "skip"
    quarantine = "quarantine"


RowsPath = Annotated[
    str,
    typer.Argument(
        metavar="PATH|RECIPE|-",
        help="rows (a file, a folder, a pattern; `-`: standard input), or a recipe.yaml",
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a setting of the recipe")
]
OnBadRow = Annotated[
    BadRow | None,
    typer.Option(
        help="rows that cannot be used: exit 3 · leave out · leave out and keep; default: the recipe's"
    ),
]


def check(
    path: RowsPath,
    overrides: Overrides = None,
    on_bad_row: OnBadRow = None,
    private: Annotated[
        bool, typer.Option(help="look for secrets and personal data too, which takes long")
    ] = True,
    near: Annotated[bool, typer.Option(help="look for near duplicates too, which takes long")] = True,
    tokens: Annotated[
        bool, typer.Option(help="count tokens, where a recipe names a base that is on this disk")
    ] = True,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="write what is found as a page too")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Every fault with file, line, code and cure; exit 3 where a row cannot be used, 0 with warnings alone."""
    from myna.data.review import review_rows
    from myna.data.stdin_rows import spooled

    with spooled(path) as (path, told):
        rows, test, wanted, settings = _settings(path, overrides)
        on_bad_row = on_bad_row or wanted
        counting = _counting(path, overrides) if tokens else {}
        keep = on_bad_row == BadRow.quarantine
        files = {"train": (rows, settings)} | _other_files(path, overrides)
        reviews, kept = {}, {}
        for name, (file, own) in files.items():
            review = review_rows(
                file,
                test=test,
                private=private,
                near=near,
                tokens=counting.get(name, NO_RECIPE if tokens else None),
                keep_faults=keep,
                **own,
            )
            kept[name] = _quarantine(review.faults, Path(_stem(file)), on_bad_row, told)
            reviews[name] = review = told(review)
            if not as_json:
                if len(files) > 1:
                    new_console().print(f"data.{name} {file}", style="bold", markup=False, highlight=False)
                _print(review, kept[name])
    if html is not None:
        _write_page(html, reviews)
    if as_json:
        found = {name: review.as_json() | {"quarantine": kept[name]} for name, review in reviews.items()}
        page = {"html": str(html)} if html else {}
        print_json(found.pop("train") | ({"others": found} if found else {}) | page)
    elif html is not None:
        new_console().print(
            f"{'page':<14}{one_line(str(html))}", markup=False, highlight=False, soft_wrap=True
        )
    fails = on_bad_row == BadRow.fail
    if any(one.num_unskippable or (one.num_errors and (fails or not one.usable)) for one in reviews.values()):
        raise typer.Exit(DataError.exit_code)


def _counting(path: str, overrides: list[str] | None) -> dict[str, TokenSettings | str]:
    """Of each file of a recipe what its tokens are counted with, or why they are not."""
    from myna.data.sides import row_files
    from myna.token_settings import token_settings

    if Path(path).suffix.lower() not in RECIPES:
        return {}
    recipe = _recipe(path, overrides)
    return {name: token_settings(recipe, data) for name, (_, data) in row_files(recipe.data).items()}


def _write_page(path: Path, reviews: Mapping[str, Any]) -> None:
    from myna.review_page import review_page
    from myna.run import write_text

    write_text(path, review_page(reviews))


def convert(
    path: RowsPath,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.jsonl", help="where the rows go")],
    overrides: Overrides = None,
    on_bad_row: OnBadRow = None,
    yes: Annotated[bool, typer.Option("--yes", help="replace FILE where it exists")] = False,
    as_json: AsJson = False,
) -> None:
    """Rows of any shape as `messages` rows."""
    from myna.data.check import gathered
    from myna.data.rows import as_row, read_conversations
    from myna.data.stdin_rows import spooled
    from myna.run import write_lines

    if out.suffix.lower() not in (".jsonl", ".ndjson"):
        raise UsageError(
            "rows are written as JSON lines", where=str(out), help=f"-o {out.with_suffix('.jsonl')}"
        )
    if path != "-" and _recipe(path, overrides).data.mix:
        raise UsageError(
            "data.mix is not converted with data.train", where=path, help="convert each file by itself"
        )
    if out.exists() and not yes:
        raise UsageError("is there already", where=str(out), help="--yes replaces it")
    with spooled(path) as (path, told):
        rows, _, wanted, settings = _settings(path, overrides)
        on_bad_row = on_bad_row or wanted
        read = read_conversations(rows, **settings)
        read.require_trained()
        if read.faults and (on_bad_row == BadRow.fail or not read.is_usable):
            raise gathered(read.faults, rows)
        # before out is written: it may be the rows' own file
        kept = _quarantine(read.faults, out.with_suffix(""), on_bad_row, told)
    rows_out = read.conversations
    write_lines(out, (json.dumps(as_row(one), ensure_ascii=False) + "\n" for one in rows_out))
    if as_json:
        print_json({"out": str(out), "rows": len(rows_out), "left_out": len(read.faults), "quarantine": kept})
        return
    console = new_console()
    console.print(f"{len(rows_out)} conversations written to {out}", highlight=False)
    if read.faults:
        console.print(f"{len(read.faults)} faulty rows are left out{_kept_in(kept)}", highlight=False)


def _stem(rows: Path) -> str:
    """What files about these rows are named after: the name without its endings, of a pattern its folder's."""
    from myna.data.sources import WILD

    path = Path(os.path.abspath(rows))  # a link may lead in a circle
    while any(c in path.name for c in WILD):
        path = path.parent
    return path.name.partition(".")[0] or "rows"


def _quarantine(
    faults: Sequence[DataError], stem: Path, on_bad_row: BadRow, told: Callable[[Any], Any]
) -> str | None:
    """Writes the faulty rows; the file's path, None where nothing was to be written.

    A file of that name which holds others stays, since the rows in it may be nowhere else: this one gets a number.
    """
    if on_bad_row != BadRow.quarantine or not faults:
        return None
    from myna.data.quarantine import quarantine_lines
    from myna.data.sources import QUARANTINED
    from myna.run import write_text

    text = "".join(told(line) for line in quarantine_lines(faults))
    for ending in chain([""], (f"-{number}" for number in count(2))):
        path = stem.with_name(f"{stem.name}{ending}{QUARANTINED}")
        if not path.exists():
            write_text(path, text)
            return str(path)
        if path.is_file() and path.read_bytes() == text.encode():
            return str(path)
    raise AssertionError("numbers do not end")


def _kept_in(kept: str | None) -> str:
    return f" and kept in {kept}" if kept else ""


def _settings(path: str, overrides: list[str] | None) -> tuple[Path, Path | None, BadRow, Mapping[str, Any]]:
    """The rows, the test rows where a recipe names them, what becomes of faulty ones, and how they are read."""
    data = _data(path, overrides)
    test = Path(data.test) if data.test else None
    return Path(data.train), test, BadRow(data.on_bad_row), _reading(data)


def _other_files(path: str, overrides: list[str] | None) -> dict[str, tuple[Path, Mapping[str, Any]]]:
    """What a recipe reads besides its training and test rows, and how each is read, by the name of its setting."""
    from myna.data.sides import row_files

    files = row_files(_data(path, overrides)).items()
    return {
        name: (Path(file), _reading(data)) for name, (file, data) in files if name not in ("train", "test")
    }


def _data(path: str, overrides: list[str] | None) -> DataSettings:
    from myna.data.sides import row_paths
    from myna.recipe import is_path

    data = _recipe(path, overrides).data
    if all(is_path(file) for file in row_paths(data)):
        return data
    from myna.model.hub_rows import locate_data

    return locate_data(data, new_console(stderr=True).print)[0]


def _recipe(path: str, overrides: list[str] | None) -> Recipe:
    from myna.recipe import build_recipe, load_recipe

    if not path.isascii() and any("\ud800" <= character <= "\udfff" for character in path):
        raise UsageError("the name is not UTF-8", where=path, help="rename it, or give its folder")
    if Path(path).suffix.lower() in RECIPES:
        return load_recipe(Path(path), overrides or [])
    return build_recipe({"data": {"train": path}}, overrides or [])


def _reading(data: DataSettings) -> Mapping[str, Any]:
    from myna.data.rows import reading_of

    return {"format_name": data.format, "columns": data.columns, "reading": reading_of(data)}


def _print(review: Any, kept: str | None) -> None:
    console = new_console()
    for finding in review.findings:
        colour = "red" if finding.level == "error" else "yellow"
        console.print(
            f"[{colour}]{finding.level}\\[{finding.code}][/{colour}] {finding.what}: {finding.count}"
        )
        for where, message in finding.places:
            console.print(f"  {one_line(where)}: {message}", markup=False, highlight=False, soft_wrap=True)
        if finding.count > len(finding.places):
            console.print(f"  and {finding.count - len(finding.places)} more", highlight=False)
        for cure in finding.cures:
            console.print(f"  help: {cure}", markup=False, highlight=False, soft_wrap=True)
    for label, text in review.as_lines():
        console.print(f"{label:<14}{one_line(text)}", markup=False, highlight=False, soft_wrap=True)
    if kept:
        console.print(f"{'kept':<14}the faulty rows in {one_line(kept)}", markup=False, highlight=False)
