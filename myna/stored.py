"""What a run keeps, read back: its recipe, its held-out rows, its base; and which folders are runs to be made."""

from __future__ import annotations

from pathlib import Path

from myna.data.conversation import Conversation
from myna.data.rows import load_conversations
from myna.errors import RecipeError, UsageError
from myna.model.sources import BaseFiles, Say, resolve_base
from myna.recipe import Recipe, load_recipe
from myna.run import Run, run_path


def run_of(recipe: Recipe) -> Run:
    """The run a recipe names: run.name, else the stem of its training file, under ./runs."""
    name = recipe.run.name or Path(recipe.data.train).name.partition(".")[0]
    if not name:
        raise RecipeError("run.name is missing and data.train gives none", help="--set run.name=NAME")
    return Run(run_path(name))


def stored_recipe(run: Run) -> Recipe:
    """The resolved recipe that a run was made from."""
    return load_recipe(run.recipe_path)


def run_base(run: Run, say: Say = lambda _: None) -> BaseFiles:
    """The base a run was trained on. RecipeError where what its name leads to now has other weights."""
    base = resolve_base(stored_recipe(run).model.base, say)
    if base.sha256 != run.info()["base"]["sha256"]:
        raise RecipeError(
            f"the weights of the base model {base.name} are not those the run was trained on",
            where=str(run.path),
            help="put the old ones back, or train a new run: --set run.name=NAME",
            code="changed",
        )
    return base


def refuse_existing(run: Run) -> None:
    """UsageError with the two cures where the run exists, or where its folder holds something else."""
    if run.exists():
        raise UsageError(
            f"the run {run.name} exists",
            where=str(run.path),
            help="--resume goes on with it; --set run.name=NAME starts another",
            code="run-exists",
        )
    ours = {".lock", "recipe.yaml", "plan.json", "tokenizer", "rows"}
    names = {path.name for path in run.path.glob("*")}
    # a lock is what a run begins with: without one the files are somebody else's, whatever their names
    others = (
        names - ours - {name for name in names if name.startswith(".tmp-")} if ".lock" in names else names
    )
    if others:
        raise UsageError(
            f"the folder is no run and is not empty ({', '.join(sorted(others)[:3])})",
            where=str(run.path),
            help="--set run.name=NAME names another",
            code="run-exists",
        )


def held_out(run: Run) -> tuple[Conversation, ...]:
    """The run's held-out rows, with its system text where they have none."""
    if not run.test_path.is_file():
        return ()
    return load_conversations(run.test_path, format_name="messages").conversations


def model_dir(run: Run) -> Path:
    """The whole model that a run exports: merged/, or the folder it was given where nothing was trained."""
    return run.merged_dir
