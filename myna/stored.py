"""What a run keeps, read back: its recipe, its held-out rows, its base; and which folders are runs to be made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from myna.data.conversation import Conversation
from myna.data.rows import load_conversations, load_rows
from myna.data.sources import WILD
from myna.errors import RecipeError, UsageError
from myna.model.hub import PREFIX
from myna.model.hub_rows import is_hub, locate_rows
from myna.model.hub_splits import parse_rows
from myna.model.sources import BaseFiles, Say, known_sha256, resolve_base
from myna.recipe import GivenRecipe, Recipe, load_recipe
from myna.run import Run, folder_files, run_path


def run_of(recipe: Recipe) -> Run:
    """The run a recipe names: run.name, else the stem of its training file or folder, under ./runs."""
    train = recipe.data.train
    path = Path(parse_rows(train).repository if is_hub(train) else train)
    while not path.exists() and any(c in path.name for c in WILD):  # of a pattern the folder that it looks in
        path = path.parent
    name = recipe.run.name or path.name.partition(".")[0]
    if not name:
        raise RecipeError("run.name is missing and data.train gives none", help="--set run.name=NAME")
    return Run(run_path(name))


def stored_recipe(run: Run) -> Recipe:
    """The resolved recipe that a run was made from."""
    return load_recipe(run.recipe_path, kind=GivenRecipe if is_adopted(run) else Recipe)


def is_adopted(run: Run) -> bool:
    """Whether the run was made from an adapter or a model that Myna did not train (`myna.adopt`)."""
    return "source" in run.info()


def is_whole(run: Run) -> bool:
    """Whether what the run was made from is a whole model: there is no adapter, and nothing to merge."""
    return is_adopted(run) and run.info()["source"]["kind"] != "adapter"


def run_base(run: Run, say: Say = lambda _: None) -> BaseFiles:
    """The base a run was trained on. RecipeError where what its name leads to now is another one."""
    base = resolve_base(pinned_base(run, stored_recipe(run).model.base), say)
    other = base.differs_from(run.info()["base"])
    if other:
        raise RecipeError(
            f"{other} of {base.name} are not those the run was made with",
            where=str(run.path),
            help="put the old ones back, or make a new run under another name",
            code="changed",
        )
    return base


def pinned_base(run: Run, base: str) -> str:
    """`base` at the commit that the run found its branch or tag to mean; as it stands where it is from no hub."""
    known = run.info()["base"] if run.exists() else {}
    repository = base.partition("@")[0]
    if known.get("commit") and base.startswith(PREFIX) and known["name"].partition("@")[0] == repository:
        return f"{repository}@{known['commit']}"
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
    ours = {".lock", "recipe.yaml", "plan.json", "tokenizer", "rows", "adapter"}
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


def held_out(run: Run) -> Sequence[Conversation]:
    """The run's held-out rows, with its system text where they have none."""
    return _kept(run.test_path)


def validation_rows(run: Run) -> Sequence[Conversation]:
    """The rows that the validation loss was of, as held_out has the others."""
    return _kept(run.validation_path)


def _kept(path: Path) -> Sequence[Conversation]:
    if not path.is_file():
        return ()
    with path.open(encoding="utf-8") as file:
        shape = "text" if file.readline().startswith('{"text"') else "messages"
    return load_conversations(path, format_name=shape).conversations


def training_rows(run: Run, max_rows: int) -> tuple[Conversation, ...]:
    """The first rows of the run's training file, with its system text and without those that were held out.

    None where Myna did not train it.
    """
    data = stored_recipe(run).data
    if not data.train:
        return ()
    known = run.info()["data"].get("train")
    rows_path = locate_rows(data.train, known=known).path
    loaded = load_rows(rows_path, data, max_rows=max_rows, known=known)
    tested = {(row.messages, row.tools) for row in (*held_out(run), *validation_rows(run))}
    rows = (row.with_system(data.system) for row in loaded.conversations)
    return tuple(row for row in rows if (row.messages, row.tools) not in tested)


def require_model(run: Run) -> None:
    """UsageError naming the command where the whole model of a run is not made yet."""
    if not is_whole(run):
        run.require_stage("merge", f"myna merge {run.path}")


def model_dir(run: Run) -> Path:
    """The whole model that a run exports: merged/, or where nothing was to be merged the folder it was made from.

    RecipeError where that folder has other weights now.
    """
    return run_base(run).folder if is_whole(run) else run.merged_dir


def require_unchanged(run: Run, folder: Path) -> None:
    """RecipeError where adapter/, merged/ or tokenizer/ is not what the stage that wrote it left, by run.json's digests.

    A file that is gone or has come counts too. A run made before digests were kept has that of its adapter's weights.
    """
    name = folder.relative_to(run.path).as_posix()
    recorded = recorded_digests(run, name)
    there = {file.relative_to(run.path).as_posix() for file in folder_files(folder)}
    for file in sorted(recorded.keys() | (there if is_recorded_whole(run, name) else set())):
        if file not in there or file not in recorded:
            fault = "is gone" if file in recorded else "was not there when the run wrote that folder"
        elif known_sha256(run.path / file) != recorded[file]:
            fault = "is not what the run left there: its SHA-256 is another one"
        else:
            continue
        again = f"delete {folder}, then `myna merge {run.path}` writes it again"
        anew = "make the run again: --name NAME" if is_adopted(run) else "train again: --set run.name=NAME"
        cure = again if folder == run.merged_dir else f"{anew} starts another"
        raise RecipeError(
            f"{file} {fault}", where=str(run.path), help=f"put back what was there, or {cure}", code="changed"
        )


def is_recorded_whole(run: Run, folder: str) -> bool:
    """Whether the files of a folder were entered when they were written: runs made before that have none."""
    return any(name.startswith(f"{folder}/") for name in run.info().get("digests", {}))


def recorded_digests(run: Run, folder: str) -> dict[str, str]:
    """SHA-256 by path of the files of a folder of the run, as far as run.json has them."""
    info = run.info()
    found = {n: d for n, d in info.get("digests", {}).items() if n.startswith(f"{folder}/")}
    of_weights = info["stages"].get("train", {}).get("adapter_sha256")
    if not found and of_weights and folder == run.adapter_dir.name:
        return {f"{folder}/adapter_model.safetensors": of_weights}
    return found
