"""`myna merge`, `export`, `evaluate`, `verify`: one stage of a run each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from myna.show import Show
from myna.terminal import AsJson, outcome_table, run_stage

RunName = Annotated[str, typer.Argument(metavar="RUN", help="a run directory, or a name under ./runs")]


def merge(run: RunName, as_json: AsJson = False) -> None:
    """Base + adapter → merged/, shown to be the same."""
    from myna.export.stage import merge_stage
    from myna.run import find_run, read_json

    found = find_run(run)

    def work(show: Show) -> Mapping[str, Any]:
        merge_stage(found, show=show)
        merged = read_json(found.parity_path)["merged"]
        return {"run": str(found.path), "merged": str(found.merged_dir), "parity": merged}

    run_stage(work, as_json, lambda result: f"merged   {result['merged']}")


def export(
    run: RunName,
    quantize: Annotated[
        str | None, typer.Option(metavar="TYPES", help="Q4_K_M,Q8_0,… ; default: the recipe's")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """merged/ → GGUF files, each measured against merged before it gets its name."""
    from myna.export.stage import export_stage, merge_stage
    from myna.run import find_run, read_json
    from myna.stored import stored_recipe

    found = find_run(run)
    wanted = (
        [part.strip() for part in quantize.split(",")] if quantize else stored_recipe(found).export.quantize
    )

    def work(show: Show) -> Mapping[str, Any]:
        merge_stage(found, show=show)
        files = export_stage(found, wanted, show=show)
        paths = {file_type: str(found.path / entry["path"]) for file_type, entry in files.items()}
        return {"run": str(found.path), "files": paths, "parity": read_json(found.parity_path)}

    run_stage(
        work, as_json, lambda result: "\n".join(f"file     {path}" for path in result["files"].values())
    )


def evaluate(
    run: RunName,
    again: Annotated[bool, typer.Option("--again", help="answer every row again")] = False,
    as_json: AsJson = False,
) -> None:
    """Base, tuned and every exported file on the same held-out rows; writes evaluation.json and report.html."""
    from myna.evaluate.stage import evaluate_stage
    from myna.export.stage import merge_stage
    from myna.pipeline import outcome
    from myna.run import find_run

    found = find_run(run)

    def work(show: Show) -> Mapping[str, Any]:
        merge_stage(found, show=show)
        evaluate_stage(found, show=show, again=again)
        return outcome(found)

    run_stage(work, as_json, outcome_table)
