"""All stages in order. Each is a function from files of a run to files of a run, and is skipped where it is done.

recipe ─ train ─► adapter/ ─ merge ─► merged/ ─ export ─► gguf/, parity.json ─ evaluate ─► evaluation.json ─► report.html
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from myna.data.sides import row_files
from myna.data.sources import is_there
from myna.engine.memory import forget_models
from myna.errors import Interrupted, MynaError, UsageError
from myna.evaluate.run_files import read_metrics
from myna.evaluate.stage import evaluate_stage
from myna.export.stage import export_stage, merge_stage, require_types
from myna.lock import lock_run
from myna.mirror import bring_in, find_taken
from myna.model.hub_rows import rows_on_disk
from myna.plan import unused_settings
from myna.prepare import keep_trained, prepare
from myna.recipe import Recipe
from myna.run import Run, file_sha256, read_json, run_files
from myna.show import Show
from myna.signals import catch_signals
from myna.state import Progress
from myna.stored import is_adopted, refuse_existing, run_of, stored_recipe


def run_recipe(
    recipe: Recipe,
    *,
    resume: bool = False,
    force: bool = False,
    resume_from: Path | None = None,
    show: Show | None = None,
) -> dict[str, Any]:
    """The whole way for one recipe; returns what `--json` prints. The rest is as `train_stage` has it."""
    show = show or Show()
    run = train_stage(recipe, resume=resume, force=force, resume_from=resume_from, show=show)
    # what a resumed recipe says of export and evaluation counts; the rest is as it was trained
    settings = stored_recipe(run)
    merge_stage(run, show=show)
    export_stage(run, settings.export.quantize, show=show)
    evaluate_stage(run, show=show)
    return outcome(run)


def train_stage(
    recipe: Recipe,
    *,
    resume: bool = False,
    force: bool = False,
    resume_from: Path | None = None,
    show: Show | None = None,
) -> Run:
    """Trains the recipe's adapter. Refuses a run that exists unless `resume`; does nothing where it is trained.

    With `resume` it goes on where the run stopped; `force` does so although recipe, data or base are not what they were.
    `resume_from` is a checkpoint, a mirror or a run elsewhere to go on from.
    """
    from myna.ready import make_ready
    from myna.train import train_on

    show = show or Show()
    require_types(recipe.export.quantize, importance=recipe.export.importance)
    run = run_of(recipe)
    if run.exists() and is_adopted(run):
        raise UsageError(
            f"the run {run.name} was made from {run.info()['source']['path']}, not trained here",
            where=str(run.path),
            help="--set run.name=NAME starts another run",
            code="run-exists",
        )
    taken = find_taken(resume_from, run.name) if resume_from else None
    if not ((resume or taken) and run.exists()):
        refuse_existing(run)
    started = time.perf_counter()
    show.stage("train")
    with lock_run(run) if run.exists() else _locked_when_made(run):
        if run.exists() and run.stage("train") and not _rows_are_here(recipe, run):
            keep_trained(recipe, run)
            show.say("the adapter is trained already (its rows are no longer where they were)")
            return run
        begun = taken.manifest if taken else None
        prepared = prepare(recipe, run, show.say, force=force, begun=begun)
        if taken:
            bring_in(run, taken, show.say)
        trained = run.stage("train")
        if trained and prepared.plan.num_steps <= trained["steps"]:
            show.say("the adapter is trained already")
            return run
        if trained:
            aside = reopen(run)
            show.say(f"the run becomes longer: what was made of its {trained['steps']} steps is in {aside}")
        for sentence in (*prepared.plan.sentences(), *unused_settings(prepared.recipe, prepared.plan)):
            show.say(sentence)
        ready = make_ready(prepared, show.say, force=force)
        with (
            catch_signals() as stop_asked
        ):  # until here a signal ends the process at once: there is nothing to save
            for report in train_on(ready, stop_asked):
                show.step(report)
            number = stop_asked()
        run.finish_stage(
            "train",
            _as_trained(run, prepared.plan.num_steps, ready.progress, time.perf_counter() - started),
            [run.adapter_dir, run.metrics_path],
        )
        if number is not None:
            raise Interrupted(
                "stopped; the adapter is trained",
                signal_number=number,
                where=str(run.path),
                help="the same command with --resume goes on",
            )
    del ready
    forget_models()
    return run


def _as_trained(run: Run, num_steps: int, progress: Progress, seconds: float) -> dict[str, Any]:
    """What run.json keeps of training: `seconds` of this process, and of all of them what the steps came to."""
    lines = read_metrics(run.metrics_path)
    return {
        "seconds": round(seconds, 1),
        "steps": num_steps,
        "step_seconds": round(progress.seconds, 1),
        "tokens": progress.tokens,
        "target_tokens": sum(line["target_tokens"] for line in lines),
        "best_step": progress.best_step,
        "best_validation_loss": progress.best_loss,
        "trainable_parameters": _num_parameters(run),
        "adapter_sha256": file_sha256(run.adapter_dir / "adapter_model.safetensors"),
    }


def reopen(run: Run) -> Path:
    """Makes a trained run one that is being trained; what was made from its adapter is set aside, and stays.

    Returns the folder that it is in: before-longer, or with a number where there is one.
    """
    names = [f"before-longer{'' if number == 1 else f'-{number}'}" for number in range(1, 1000)]
    aside = next(run.path / name for name in names if not (run.path / name).exists())
    aside.mkdir()
    made = (
        run.adapter_dir,
        run.merged_dir,
        run.gguf_dir,
        run.parity_path,
        run.evaluation_path,
        run.report_path,
    )
    for path in made:
        if path.exists():
            path.rename(aside / path.name)
    run.forget_stages([*made, run.metrics_path])
    return aside


def outcome(run: Run) -> dict[str, Any]:
    """What `run` and `demo` end with, from the run's files."""
    info = run.info()
    seconds = {name: stage["seconds"] for name, stage in info["stages"].items()}
    results = read_json(run.evaluation_path)["results"] if run.evaluation_path.is_file() else {}
    parity = read_json(run.parity_path) if run.parity_path.is_file() else {}
    keys = ("exact_match", "interval", "field_f1", "token_f1", "mb", "tokens_per_s", "num_rows")
    files = {t: str(run.path / entry["path"]) for t, entry in run_files(run).items()}
    measured = {t: parity["files"][t] for t in files if t in parity.get("files", {})}
    no_merge = (
        run.stage("merge") is None
    )  # a model that was given whole, or files straight from base + adapter
    proven = ("merged" in parity or no_merge) and all(
        measured.get(t, {}).get("verdict") == "pass" for t in files
    )
    return {
        "run": str(run.path),
        "seconds": {**seconds, "total": round(sum(seconds.values()), 1)},
        "evaluation": {name: {key: result[key] for key in keys} for name, result in results.items()},
        "parity": {
            "verdict": ("pass" if proven else "fail") if parity else None,
            "merged": parity.get("merged"),
            **measured,
        },
        "files": {
            **{path.name: str(path) for path in (run.adapter_dir, run.merged_dir) if path.is_dir()},
            **files,
            "report": str(run.report_path),
        },
    }


@contextmanager
def _locked_when_made(run: Run) -> Iterator[None]:
    """Locks a run that is about to be made; where nothing came of it, the empty folder goes again."""
    was_there = run.path.is_dir() and not (run.path / ".lock").exists()
    with lock_run(run):
        try:
            yield
        except BaseException as error:
            # a new run that was refused before it began would only stand in the way of the corrected one
            refused = isinstance(error, MynaError) and not isinstance(error, Interrupted)
            if refused and not run.metrics_path.exists():
                shutil.rmtree(run.path, ignore_errors=True)
                if was_there:
                    run.path.mkdir()  # an empty folder of the user's stays one
            elif not run.exists() and {p.name for p in run.path.glob("*")} <= {".lock"}:
                (run.path / ".lock").unlink(missing_ok=True)
                run.path.rmdir()
            raise


def _num_parameters(run: Run) -> int:
    from safetensors import safe_open

    with safe_open(run.adapter_dir / "adapter_model.safetensors", framework="np") as tensors:
        shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118 - not a dict
    return sum(int(rows) * int(columns) for rows, columns in shapes)


def _rows_are_here(recipe: Recipe, run: Run) -> bool:
    known = run.info().get("data", {})
    files = row_files(recipe.data).items()
    located = (rows_on_disk(path, known.get(name)) for name, (path, _) in files)
    return all(one is not None and is_there(one.path) for one in located)
