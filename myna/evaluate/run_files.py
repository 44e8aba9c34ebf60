"""The files of a run that its report is made from, read once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from myna.errors import DataError
from myna.recipe import Recipe, load_recipe
from myna.run import Run, read_json
from myna.stored import stored_recipe

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class RunFiles:
    """What a run holds of the files a report is made from; None or empty where a stage has not been run."""

    run: Run
    info: Entry | None
    recipe: Recipe | None
    metrics: Sequence[Entry]
    evaluation: Entry | None
    parity: Entry | None


def read_run_files(run: Run) -> RunFiles:
    """The files of a run that a report is made from; a missing one is None or empty."""
    return RunFiles(
        run=run,
        info=_read_optional(run.path / "run.json"),
        recipe=_read_recipe(run),
        metrics=read_metrics(run.metrics_path) if run.metrics_path.exists() else (),
        evaluation=_read_optional(run.evaluation_path),
        parity=_read_optional(run.parity_path),
    )


def read_metrics(path: Path) -> tuple[dict[str, Any], ...]:
    """The lines of metrics.jsonl by step, with the validation loss where there is one.

    Where a resume did a step again, its last line counts. A last line without its end was cut by a kill and is not
    counted; any other broken line is a DataError.
    """
    by_step: dict[int, dict[str, Any]] = {}
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            entry = json.loads(line)
            # a step's validation loss has a line of its own
            by_step[entry["step"]] = (by_step.get(entry["step"], {}) if "loss" not in entry else {}) | entry
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"is no line of metrics: {error}", where=f"{path}:{number}") from None
    return tuple(by_step.values())


def _read_recipe(run: Run) -> Recipe | None:
    if not run.recipe_path.exists():
        return None
    return stored_recipe(run) if run.exists() else load_recipe(run.recipe_path)


def _read_optional(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.exists() else None
