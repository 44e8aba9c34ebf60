"""`myna merge`, `export`, `evaluate`, `verify`: one stage of a run each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from myna.errors import CheckFailed, UsageError
from myna.show import Show
from myna.terminal import AsJson, new_console, outcome_table, print_findings, print_json, run_stage

RunName = Annotated[str, typer.Argument(metavar="RUN", help="a run directory, or a name under ./runs")]
Target = Annotated[
    str,
    typer.Argument(
        metavar="TARGET",
        help="a run; or what Myna did not train: an adapter or model folder, FILE.gguf, hf:org/name@revision",
    ),
]
Base = Annotated[
    str | None, typer.Option(metavar="SPEC", help="the base of an adapter; default: the one its config names")
]
Name = Annotated[str | None, typer.Option(help="of the run that is made; default: the folder's or file's")]
Rows = Annotated[
    Path | None, typer.Option(metavar="FILE", help="rows to measure on, where Myna did not train it")
]

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="a setting of this stage; the run keeps it"),
]


def merge(target: Target, base: Base = None, name: Name = None, as_json: AsJson = False) -> None:
    """Base + adapter → merged/, shown to be the same."""
    from myna.adopt import adopted
    from myna.export.stage import merge_stage
    from myna.run import read_json

    def work(show: Show) -> Mapping[str, Any]:
        with adopted(target, base=base, name=name, adapters_only=True, show=show) as run:
            merge_stage(run, show=show)
            merged = read_json(run.parity_path)["merged"]
            return {"run": str(run.path), "merged": str(run.merged_dir), "parity": merged}

    run_stage(work, as_json, lambda result: f"merged   {result['merged']}")


def export(
    target: Target,
    quantize: Annotated[
        str | None, typer.Option(metavar="TYPES", help="Q4_K_M,Q8_0,… ; default: the recipe's")
    ] = None,
    base: Base = None,
    name: Name = None,
    rows: Rows = None,
    overrides: Overrides = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="the adapter alone, to load beside a base")
    ] = False,
    direct: Annotated[
        bool, typer.Option("--direct", help="from base + adapter, without writing a merged copy")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """merged/ → GGUF files, each proven to be the model before it gets its name."""
    from myna.adopt import adopted, set_in_run
    from myna.export.adapter_stage import adapter_stage
    from myna.export.stage import export_stage, merge_stage, require_types
    from myna.run import read_json
    from myna.stored import is_whole, stored_recipe

    def work(show: Show) -> Mapping[str, Any]:
        with adopted(target, base=base, name=name, rows=rows, show=show) as run:
            set_in_run(run, overrides or (), ("export.quantize", "export.importance"))
            if direct and is_whole(run):
                raise UsageError("there is no adapter: leave --direct out", where=str(run.path))
            paths = {}
            if adapter:
                paths["adapter"] = str(run.path / adapter_stage(run, show=show)["path"])
            if quantize or not adapter:
                recipe = stored_recipe(run)
                named = quantize.upper().split(",") if quantize else recipe.export.quantize
                wanted = [part.strip() for part in named]
                require_types(wanted, importance=recipe.export.importance)  # said before anything is merged
                if not (is_whole(run) or direct):
                    merge_stage(run, show=show)
                files = export_stage(run, wanted, show=show, direct=direct)
                paths |= {file_type: str(run.path / entry["path"]) for file_type, entry in files.items()}
            return {"run": str(run.path), "files": paths, "parity": read_json(run.parity_path)}

    run_stage(
        work, as_json, lambda result: "\n".join(f"file     {path}" for path in result["files"].values())
    )


def evaluate(
    target: Target,
    base: Base = None,
    name: Name = None,
    rows: Rows = None,
    overrides: Overrides = None,
    again: Annotated[bool, typer.Option("--again", help="answer every row again")] = False,
    as_json: AsJson = False,
) -> None:
    """Base, tuned and every exported file on the same held-out rows; writes evaluation.json and report.html."""
    from myna.adopt import adopted, set_in_run
    from myna.evaluate.stage import evaluate_stage
    from myna.export.stage import merge_stage
    from myna.given_rows import require_rows
    from myna.pipeline import outcome
    from myna.stored import is_whole

    def work(show: Show) -> Mapping[str, Any]:
        with adopted(target, base=base, name=name, rows=rows, show=show) as run:
            require_rows(run, target)
            set_in_run(run, overrides or (), ("evaluate.",))
            if not is_whole(run):
                merge_stage(run, show=show)
            evaluate_stage(run, show=show, again=again)
            return outcome(run)

    run_stage(work, as_json, outcome_table)


def verify(run: RunName, as_json: AsJson = False) -> None:
    """The story of a run: every digest taken again, every gate, what was measured. Exit code 5 where one fails."""
    from myna.run import find_run
    from myna.verify import story, verify_run

    found = find_run(run)
    findings = verify_run(found)
    failed = [finding for finding in findings if finding.verdict == "fail"]
    error = CheckFailed(
        f"{len(failed)} of {len(findings)} things are not as the run left them",
        where=str(found.path),
        help="put the files back, or make them again: myna export, myna evaluate --again, or a new run",
        code="verify",
    )
    if not as_json:
        print_findings(new_console(), story(found), findings)
        if failed:
            raise error
        return
    told = {"story": dict(story(found)), "findings": [finding.as_json() for finding in findings]}
    verdict = {"verdict": "fail", "error": error.as_json()} if failed else {"verdict": "pass"}
    print_json({"run": str(found.path), **verdict, **told})  # one object, whatever was found
    if failed:
        raise typer.Exit(error.exit_code)
