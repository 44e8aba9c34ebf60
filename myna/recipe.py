"""The Recipe: all that a run is told, in one typed place. Unknown keys are refused with line and nearest name."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from myna.errors import RecipeError, UsageError
from myna.recipe_faults import recipe_error
from myna.settings import (
    AdapterSettings,
    CheckpointSettings,
    DataSettings,
    EvaluateSettings,
    ExportSettings,
    MixedRows,
    ModelSettings,
    RunSettings,
    Section,
    TrainSettings,
)


class Recipe(Section):
    run: RunSettings = Field(default_factory=RunSettings)
    model: ModelSettings = Field(default_factory=ModelSettings)
    data: DataSettings
    adapter: AdapterSettings = Field(default_factory=AdapterSettings)
    train: TrainSettings = Field(default_factory=TrainSettings)
    checkpoint: CheckpointSettings = Field(default_factory=CheckpointSettings)
    evaluate: EvaluateSettings = Field(default_factory=EvaluateSettings)
    export: ExportSettings = Field(default_factory=ExportSettings)


# Settings that are paths: the recipe's are read from its own folder, those of --set from the current one.
PATH_KEYS = (
    ("data", "train"),
    ("data", "test"),
    ("data", "validation"),
    ("checkpoint", "mirror"),
)


class GivenData(DataSettings):
    """Of a run whose adapter or model Myna did not train: there are no rows that it learnt."""

    train: str = Field("", description="none")


class GivenRecipe(Recipe):
    """The settings of a run that was made from an adapter or a model somebody else trained."""

    data: GivenData = Field(default_factory=GivenData)


def load_recipe(path: Path, overrides: Sequence[str] = (), *, kind: type[Recipe] = Recipe) -> Recipe:
    """Reads and checks a recipe file; `overrides` are `key.path=value` texts (`--set`), values in YAML.

    Relative paths in the file count from the file's folder, those in `overrides` from the current one.
    Raises RecipeError with every fault at once, each with its line and the nearest name.
    """
    tree = _read_yaml(path)
    _resolve_paths(tree, path.resolve().parent)
    return build_recipe(tree, overrides, where=path.name, kind=kind)


def build_recipe(
    tree: Mapping[str, Any],
    overrides: Sequence[str] = (),
    where: str = "recipe",
    *,
    kind: type[Recipe] = Recipe,
) -> Recipe:
    """Checks a tree of settings (as loaded from YAML, or made in Python)."""
    merged: dict[str, Any] = {k: dict(v) if isinstance(v, Mapping) else v for k, v in tree.items()}
    set_here = {_apply_override(merged, text): text for text in overrides}
    try:
        return kind.model_validate(merged)
    except ValidationError as error:
        known = [key for key, _, _ in setting_lines()]
        known += [f"data.mix.{key}" for key in MixedRows.model_fields]
        raise recipe_error(error, tree, where, set_here, known) from None


def recipe_yaml(recipe: Recipe, *, without: Any = None) -> str:
    """The recipe with every default written out, as YAML that `load_recipe` reads back equal.

    `without` names blocks and settings to leave out, as pydantic's `exclude` does.
    """
    import io

    stream = io.StringIO()
    yaml = YAML(typ="safe")
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.dump(recipe.model_dump(mode="json", exclude=without), stream)
    return stream.getvalue()


def setting_lines() -> Iterator[tuple[str, str, str]]:
    """(key, default, description) of every setting: what the reference page and `myna init` are made of."""
    for block, field in Recipe.model_fields.items():
        section = field.annotation
        assert isinstance(section, type) and issubclass(section, Section)
        for key, setting in section.model_fields.items():
            default = "required" if setting.is_required() else setting.get_default(call_default_factory=True)
            yield f"{block}.{key}", "" if default is None else str(default), setting.description or ""


def _read_yaml(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise RecipeError("is a folder; a recipe is a file", where=str(path))
    if path.suffix in (".jsonl", ".json", ".csv", ".tsv", ".parquet"):
        raise RecipeError(
            "is a file of rows, no recipe", where=str(path), help=f"myna init {path} writes its recipe"
        )
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
        cure = f"did you mean {path.parent / near[0]}?" if near else "`myna init ROWS.jsonl` writes one"
        raise RecipeError("there is no such recipe file", where=str(path), help=cure)
    try:
        tree = YAML().load(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RecipeError(f"is not UTF-8 (byte {error.start})", where=str(path)) from None
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"is not YAML: {error.problem}", where=f"{path.name}:{line}") from None
    except YAMLError as error:
        raise RecipeError(f"is not YAML: {error}", where=path.name) from None
    if not isinstance(tree, CommentedMap):
        raise RecipeError(
            "a recipe is a mapping of settings",
            where=f"{path.name}:1",
            help="`myna init ROWS.jsonl` writes a commented one",
        )
    return tree


def is_path(rows: str) -> bool:
    """Whether data.train or data.test names files; rows on the hub and standard input have no folder."""
    return bool(rows) and rows != "-" and not rows.startswith("hf:")


def _resolve_paths(tree: dict[str, Any], folder: Path) -> None:
    for block, key in PATH_KEYS:
        section = tree.get(block)
        if isinstance(section, dict) and isinstance(section.get(key), str) and is_path(section[key]):
            section[key] = str(folder / Path(section[key]).expanduser())
    _resolve_mixed(tree, folder)
    model = tree.get("model")
    if isinstance(model, dict) and isinstance(model.get("base"), str):
        base = model["base"]
        if base.startswith((".", "~")) or base.endswith(".gguf"):
            model["base"] = str((folder / Path(base).expanduser()).resolve())


def _resolve_mixed(tree: Mapping[str, Any], folder: Path) -> None:
    data = tree.get("data")
    mix = data.get("mix") if isinstance(data, dict) else None
    for entry in mix if isinstance(mix, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("train"), str) and entry["train"]:
            entry["train"] = str(folder / Path(entry["train"]).expanduser())


def _apply_override(tree: dict[str, Any], text: str) -> str:
    """Puts a `key=value` into the tree; returns the key."""
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UsageError(f"--set {text}: expected key=value", help="--set train.learning_rate=1e-4")
    node = tree
    for part in parts[:-1]:
        below = node.setdefault(part, {})
        if not isinstance(below, dict):
            raise UsageError(f"--set {text}: {part} is no block of settings")
        node = below
    try:
        parsed = YAML(typ="safe").load(value) if value.strip() else None
    except YAMLError as error:
        raise UsageError(f"--set {text}: the value is not YAML: {error}") from None
    if tuple(parts) in PATH_KEYS and isinstance(parsed, str) and is_path(parsed):
        parsed = str(Path(parsed).expanduser().resolve())
    if parts == ["data", "mix"]:
        _resolve_mixed({"data": {"mix": parsed}}, Path.cwd())
    node[parts[-1]] = parsed
    return ".".join(parts)
