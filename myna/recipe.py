"""The Recipe: all that a run is told, in one typed place. Unknown keys are refused with line and nearest name."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError
from pydantic_core import PydanticCustomError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from myna.errors import RecipeError, UsageError
from myna.recipe_faults import recipe_error

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
PathText = Annotated[str, Field(min_length=1)]
DEFAULT_MAX_LENGTH = 2048  # tokens, where the base reads as many
CHECKPOINTING = ("auto", "none", "all")


def _checkpointing(value: Any) -> str | int:
    is_number = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if not is_number and value not in CHECKPOINTING:
        raise PydanticCustomError("checkpointing", "is one of auto, none, all, or a number of layers from 1")
    found: str | int = value
    return found


class Section(BaseModel):
    """One block of the recipe: frozen, and closed to keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class RunSettings(Section):
    name: str | None = Field(
        None, description="the run's folder under ./runs; default: the stem of data.train"
    )


class ModelSettings(Section):
    base: str = Field(
        "smollm2-135m", description="packaged name · hf:org/name@revision · ./folder · ./file.gguf"
    )
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="what the frozen base computes in; auto: bf16 where this machine is fast at it, else fp16 on a GPU "
        "and fp32 on a CPU, which is slow at fp16",
    )
    quantize: Literal["none", "int8"] = Field(
        "none", description="storage of the frozen base: none · int8 (one byte a weight, and faster)"
    )


class MixedRows(Section):
    """Rows of another file, beside those of data.train; what is not said here holds for all files."""

    train: PathText
    weight: Annotated[float, Field(gt=0, le=100)] = 1.0
    format: str = "auto"
    columns: dict[str, str] = Field(default_factory=dict)
    system: str | None = None
    group_by: PathText | None = None


class DataSettings(Section):
    train: PathText = Field(
        description="rows to learn: a file, a folder of files, a pattern of names, or hf:org/name:split (docs/data.md)"
    )
    test: str | None = Field(None, description="held-out rows; default: a part of data.train")
    test_fraction: Fraction = Field(0.1, description="the part of data.train held out where no test is given")
    mix: list[MixedRows] = Field(
        default_factory=list,
        description="rows of other files too, {train: FILE, weight: 0.5} has half of them an epoch (docs/data.md)",
    )
    validation: PathText | None = Field(
        None, description="rows whose loss is taken at every checkpoint; default: a part of data.train"
    )
    validation_fraction: Fraction = Field(
        0.0, description="the part of data.train held out for that where no validation is given"
    )
    group_by: PathText | None = Field(
        None,
        description="a key of the rows: rows with the same value there (a customer, a text) stay on one side",
    )
    stratify: bool = Field(False, description="hold out the same part of each label (text/label rows)")
    format: str = Field(
        "auto", description="auto, or a shape by its name (docs/data.md): messages · alpaca · squad …"
    )
    columns: dict[str, str] = Field(default_factory=dict, description="our key: your key, where they differ")
    system: str | None = Field(None, description="system text for conversations that have none")
    on_bad_row: Literal["fail", "skip", "quarantine"] = Field(
        "fail",
        description="rows that cannot be used: fail · skip · quarantine (skip, and keep them in the run)",
    )
    train_on: Literal["all", "last"] = Field(
        "all", description="the assistant turns that are learnt: all · last (earlier ones are context)"
    )
    no_answer: PathText = Field(
        "unanswerable", description="the answer to a question that its text does not answer (SQuAD v2)"
    )
    paths: Literal["best", "all"] = Field(
        "best", description="of a tree of replies: the best ranked path · all"
    )
    language: str | None = Field(
        None, description="of trees of replies, those in this language alone: en, de, fa"
    )
    assistant: str | None = Field(None, description="of logs of chats: the speaker who is the assistant")
    max_length: Annotated[int, Field(ge=8)] | None = Field(
        None, description="longest row in tokens; default: the model's context, at most 2048"
    )
    cut_long: bool = Field(False, description="cut longer rows even where that is more than 1 % of them")


class AdapterSettings(Section):
    method: Literal["lora", "rslora"] = Field("lora", description="lora · rslora")
    r: Annotated[int, Field(ge=1)] = Field(16, description="rank")
    alpha: Annotated[float, Field(gt=0)] = Field(16, description="scale of the adapter: alpha / r")
    dropout: Fraction = Field(0.0, description="dropout before the adapter, a mask for each target module")
    target_modules: str | list[str] = Field("all-linear", description="all-linear, or names of layers")


class TrainSettings(Section):
    epochs: Annotated[int, Field(ge=1)] = Field(1, description="times through the rows")
    max_steps: Annotated[int, Field(ge=1)] | None = Field(
        None, description="stop after so many steps, where the epochs have more"
    )
    max_rows: Annotated[int, Field(ge=1)] | None = Field(
        None, description="read so many rows of data.train, and of each file of data.mix"
    )
    batch_size: Annotated[int, Field(ge=1)] = Field(8, description="rows a step")
    order: Literal["shuffled", "length", "file"] = Field(
        "shuffled",
        description="of the rows of an epoch: shuffled · length (short ones first) · file (as there)",
    )
    learning_rate: Annotated[float, Field(gt=0)] | None = Field(
        None, description="peak; default: by method and width"
    )
    schedule: Literal["linear", "cosine", "constant", "wsd"] = Field(
        "linear", description="after the warm-up: linear · cosine · constant · wsd (falls in the last 20 %)"
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(5, description="steps from 0 to the peak")
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.01, description="of AdamW, on the adapter's matrices"
    )
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = Field(
        default_factory=lambda: [0.9, 0.999], description="of AdamW: how long its two averages remember"
    )
    max_grad_norm: Annotated[float, Field(ge=0)] = Field(
        1.0, description="gradients are scaled to it; 0: off"
    )
    save_every_steps: Annotated[int, Field(ge=1)] = Field(25, description="steps between checkpoints")
    keep_checkpoints: Annotated[int, Field(ge=1)] = Field(3, description="the newest n stay")
    packed: bool = Field(True, description="rows side by side; false takes the reference path")
    pack_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="tokens computed at once; default: 1024"
    )
    gradient_checkpointing: Annotated[str | int, PlainValidator(_checkpointing)] = Field(
        "auto",
        description="run layers again in the backward: none · all · N (every N layers); auto: where memory asks for it",
    )
    checkpoint_to: Literal["device", "cpu", "disk"] = Field(
        "device",
        description="where gradient checkpointing keeps layers' inputs: device · cpu (memory, from a GPU) · disk",
    )
    seed: Annotated[int, Field(ge=0)] = Field(42, description="of order, split and adapter")


class EvaluateSettings(Section):
    max_rows: Annotated[int, Field(ge=1)] = Field(200, description="held-out rows that are answered")
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="longest answer; default: the longest expected one and a quarter more, at most 512"
    )


class ExportSettings(Section):
    quantize: list[str] = Field(
        default_factory=lambda: ["Q4_K_M", "Q8_0"], description="GGUF files to write, as upstream spells them"
    )
    dtype: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="of merged/")
    importance: bool = Field(
        False, description="weigh columns by what training rows put into them; worth it below 4 bits"
    )


class Recipe(Section):
    run: RunSettings = Field(default_factory=RunSettings)
    model: ModelSettings = Field(default_factory=ModelSettings)
    data: DataSettings
    adapter: AdapterSettings = Field(default_factory=AdapterSettings)
    train: TrainSettings = Field(default_factory=TrainSettings)
    evaluate: EvaluateSettings = Field(default_factory=EvaluateSettings)
    export: ExportSettings = Field(default_factory=ExportSettings)


# Settings that are paths: the recipe's are read from its own folder, those of --set from the current one.
PATH_KEYS = (("data", "train"), ("data", "test"), ("data", "validation"))


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
