"""From a recipe to a run that can be trained: rows read and rendered, base found, every choice frozen and written down."""

from __future__ import annotations

import platform
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import myna
from myna.changes import LENGTHS, Made, differences, made_from_json, note_forced, refuse
from myna.data.conversation import Conversation
from myna.data.epochs import Part
from myna.data.quarantine import quarantine_lines
from myna.data.render import ChatTokenizer, Example, load_chat_tokenizer
from myna.data.rows import LoadedRows, as_row
from myna.data.sides import SIDES_VERSION, absolute, read_sides, row_files
from myna.data.token_rows import lengths_of
from myna.engine.optim import default_learning_rate
from myna.errors import RecipeError
from myna.model.hub_rows import locate_data
from myna.model.load import read_config
from myna.model.sources import PACKAGED, BaseFiles, Say, resolve_base
from myna.pack_facts import PackFacts, first_packs
from myna.plan import FrozenPlan, freeze_plan, plan_of, planned_length, read_plan, this_machine
from myna.recipe import Recipe, recipe_yaml
from myna.rendering import render_parts, short_enough, validation_examples
from myna.run import Run, new_directory, timestamp, write_json, write_lines, write_text
from myna.settings import DEFAULT_MAX_LENGTH
from myna.stored import pinned_base, stored_recipe

DEFAULT_PACK_TOKENS = 1024  # on a CPU a larger pack is no faster and takes about 1.5 MB more a token
LIBRARIES = ("torch", "transformers", "peft", "tokenizers", "safetensors", "gguf", "xllamacpp", "numpy")


@dataclass(frozen=True)
class Prepared:
    """A run ready to train: the resolved recipe and everything that was read for it.

    `examples` are the training rows of all files, one after another, `parts` how many are of each.
    """

    run: Run
    recipe: Recipe
    base: BaseFiles
    examples: Sequence[Example]
    test: Sequence[Conversation]
    plan: FrozenPlan
    parts: tuple[Part, ...]
    validation: Sequence[Example] = ()


def prepare(
    recipe: Recipe, run: Run, say: Say, *, force: bool = False, begun: Mapping[str, Any] | None = None
) -> Prepared:
    """Makes a new run, or reads an existing one back and refuses one whose inputs changed, unless `force`.

    `begun` is the manifest of a checkpoint from elsewhere that the run is to go on from: a new run takes its plan.
    Raises DataError, ModelError, RecipeError or MachineError with nothing written but whole files.
    """
    known = run.info() if run.exists() else {}
    here, commits = locate_data(recipe.data, say, known.get("data"))
    sides = read_sides(recipe.model_copy(update={"data": here}), known or None, say)
    base = resolve_base(pinned_base(run, recipe.model.base), say)
    config = read_config(base.folder)
    resolved = _resolve(recipe, run, config)
    # a run keeps the tokenizer and template that it began with
    tokenizer = load_chat_tokenizer(run.tokenizer_dir if run.exists() else base.folder)
    if not tokenizer.has_own_template:
        say(
            "the base has no chat template: a plain one (### User / ### Assistant) is used and kept in the run"
        )
    examples, parts = render_parts(sides.train, tokenizer, resolved, say)
    test = short_enough(sides.test, tokenizer, resolved, say)
    validation = short_enough(sides.validation, tokenizer, resolved, say, what="validation rows")
    validated = validation_examples(validation, tokenizer, resolved)
    if resolved.checkpoint.adapter == "best" and not (validated and resolved.checkpoint.keep_best):
        raise RecipeError(
            "checkpoint.adapter: best is that of the validation loss: it needs validation rows and checkpoint.keep_best",
            help="--set data.validation_fraction=0.05, or --set checkpoint.adapter=last",
        )
    inputs = _inputs(resolved, base, sides.loaded, commits, len(test), len(validation))
    faults = [fault for rows in sides.loaded.values() for fault in rows.left_out]
    quarantined = "".join(quarantine_lines(faults)) if recipe.data.on_bad_row == "quarantine" else ""
    now = Made(resolved.model_dump(mode="json"), inputs["base"], inputs["data"])
    changed = differences(made_from_json(begun), now) if begun else []
    if run.exists():
        plan = read_plan(run.plan_path)
        before = stored_recipe(run).model_dump(mode="json")
        changed += differences(Made(before, known["base"], known["data"]), now)
    else:
        fresh = freeze_plan(resolved, config, lengths_of(examples), this_machine(), parts)
        plan = plan_of(begun["plan"]["entries"]) if begun else fresh
    num_rows, num_steps = planned_length(resolved.train, parts)
    if num_steps < plan.num_steps and not changed:
        changed.append(f"{plan.num_steps} steps → {num_steps}: a run that has begun may only become longer")
    if not force:
        refuse(run, changed)
    for sentence in changed:
        say(f"forced: {sentence}")
    if num_steps != plan.num_steps:
        say(
            f"{plan.num_steps} steps → {num_steps}: the learning rate follows the new length in the steps to come"
        )
        plan = replace(plan, num_rows=num_rows, num_steps=num_steps)
    if run.exists():
        _keep_up(run, resolved, plan, inputs, changed)
    else:
        packs = first_packs(examples, parts, resolved, plan)
        for sentence in packs.sentences():
            say(sentence)
        inputs["packs"] = packs.as_json()
        if begun:
            inputs["id"] = begun["run"]
        kept = {run.test_path: test, run.validation_path: validation}
        _write_run(run, resolved, base, plan, inputs, kept, tokenizer)
    if quarantined:
        write_text(run.quarantine_path, quarantined)
        run.record([run.quarantine_path])
    return Prepared(run, resolved, base, examples, test, plan, parts, validated)


def _keep_up(
    run: Run, recipe: Recipe, plan: FrozenPlan, inputs: Mapping[str, Any], forced: Sequence[str]
) -> None:
    """Writes down what may change in a run that goes on, and what was forced."""
    info = run.info()
    # an older process may have died between a file and its digest
    if recipe != stored_recipe(run) or forced:
        write_text(run.recipe_path, recipe_yaml(recipe))
    if plan != read_plan(run.plan_path):
        write_json(run.plan_path, asdict(plan))
    files = [run.recipe_path, run.plan_path]
    told = {"base": inputs["base"], "data": inputs["data"]} if forced else {"data": inputs["data"]}
    if any(info.get(key) != value for key, value in told.items()):
        write_json(run.path / "run.json", info | told)
    if forced:
        note_forced(run, forced)
    if run.digests(files).items() - info.get("digests", {}).items():
        run.record(files)


def made_of(prepared: Prepared) -> Made:
    """What a prepared run is made from, with its plan."""
    info = prepared.run.info()
    settings = prepared.recipe.model_dump(mode="json")
    return Made(settings, info["base"], info["data"], asdict(prepared.plan))


def plan_rows(recipe: Recipe, say: Say) -> PackFacts:
    """What packing makes of a recipe's rows, without making its run."""
    here, _ = locate_data(recipe.data, say)
    sides = read_sides(recipe.model_copy(update={"data": here}), None, say)
    base = resolve_base(recipe.model.base, say)
    config = read_config(base.folder)
    resolved = _resolve(recipe, Run(Path()), config)
    examples, parts = render_parts(sides.train, load_chat_tokenizer(base.folder), resolved, say)
    plan = freeze_plan(resolved, config, lengths_of(examples), this_machine(), parts)
    return first_packs(examples, parts, resolved, plan)


def keep_trained(recipe: Recipe, run: Run) -> None:
    """For a trained run whose rows are gone: refuses other settings, and keeps the free ones, as `prepare` does.

    What the recipe leaves open is as it was found when the run was made. RecipeError naming every difference.
    """
    before = stored_recipe(run)
    data, train, base = recipe.data, recipe.train, recipe.model.base
    is_path = base not in PACKAGED and not base.startswith("hf:")
    rate = train.learning_rate or before.train.learning_rate
    packs = train.pack_tokens or before.train.pack_tokens
    folder = str(Path(base).resolve()) if is_path else base
    resolved = recipe.model_copy(
        update={
            "run": recipe.run.model_copy(update={"name": before.run.name}),
            "model": recipe.model.model_copy(update={"base": folder}),
            "data": absolute(data).model_copy(
                update={"max_length": data.max_length or before.data.max_length}
            ),
            "train": train.model_copy(update={"learning_rate": rate, "pack_tokens": packs}),
        }
    )
    info = run.info()
    before_it, now = (recipe.model_dump(mode="json") for recipe in (before, resolved))
    changed = differences(Made(before_it, info["base"], None), Made(now, info["base"], None))
    changed += [
        f"{key}: {before_it['train'][name]} → {now['train'][name]}"
        for key in LENGTHS
        if before_it["train"][name := key.partition(".")[2]] != now["train"][name]
    ]
    refuse(run, changed)
    if resolved != before:
        write_text(run.recipe_path, recipe_yaml(resolved))
        run.record([run.recipe_path])


def _resolve(recipe: Recipe, run: Run, config: Any) -> Recipe:
    """The recipe with every default that depends on the base written out."""
    text = config.get_text_config()
    context = getattr(text, "max_position_embeddings", None) or DEFAULT_MAX_LENGTH
    max_length = recipe.data.max_length or min(context, DEFAULT_MAX_LENGTH)
    if max_length > context:
        raise RecipeError(
            f"data.max_length is {max_length}, the base reads at most {context} tokens",
            help=f"--set data.max_length={context}",
        )
    rate = recipe.train.learning_rate or default_learning_rate(text.hidden_size)
    data = absolute(recipe.data).model_copy(update={"max_length": max_length})
    packs = recipe.train.pack_tokens or DEFAULT_PACK_TOKENS
    train = recipe.train.model_copy(update={"learning_rate": rate, "pack_tokens": packs})
    names = recipe.run.model_copy(update={"name": run.name})
    base = recipe.model.base
    is_path = base not in PACKAGED and not base.startswith("hf:") and Path(base).exists()
    model = recipe.model.model_copy(update={"base": str(Path(base).resolve()) if is_path else base})
    return recipe.model_copy(update={"run": names, "data": data, "train": train, "model": model})


def _inputs(
    recipe: Recipe,
    base: BaseFiles,
    loaded: Mapping[str, LoadedRows],
    commits: Mapping[str, str],
    num_test: int,
    num_validation: int,
) -> dict[str, Any]:
    paths = row_files(recipe.data)
    files = {
        name: {
            "path": paths[name][0],
            "sha256": rows.sha256,
            "rows": rows.num_rows,
            "format": rows.format_name,
            **({"commit": commits[name]} if name in commits else {}),
        }
        for name, rows in loaded.items()
    }
    return {
        "base": base.as_json(),
        "data": files,
        "held_out_rows": num_test,
        "validation_rows": num_validation,
        "sides": SIDES_VERSION,
    }


def _write_run(
    run: Run,
    recipe: Recipe,
    base: BaseFiles,
    plan: FrozenPlan,
    inputs: Mapping[str, Any],
    kept: Mapping[Path, Sequence[Conversation]],
    tokenizer: ChatTokenizer,
) -> None:
    """Writes the run's first files; run.json last, since it is what makes the folder a run."""
    import json

    write_text(run.recipe_path, recipe_yaml(recipe))
    write_json(run.plan_path, asdict(plan))
    save_tokenizer(base.folder, run.tokenizer_dir, tokenizer)
    for path, rows in kept.items():
        if rows:
            write_lines(path, (json.dumps(as_row(row), ensure_ascii=False) + "\n" for row in rows))
    versions = versions_here()
    info = {"name": run.name, "id": uuid.uuid4().hex, "created": timestamp(), **inputs}
    machine = {"system": platform.system(), "processor": platform.machine(), "platform": sys.platform}
    digests = run.digests(
        [run.recipe_path, run.plan_path, run.tokenizer_dir, *(path for path, rows in kept.items() if rows)]
    )
    info |= {"versions": versions, "machine": machine, "stages": {}, "digests": digests}
    write_json(run.path / "run.json", info)


def versions_here() -> dict[str, str]:
    """Of Myna, Python and the libraries that a result may depend on."""
    versions = {"myna": myna.__version__, "python": platform.python_version()}
    return versions | {name: version(name) for name in LIBRARIES}


def save_tokenizer(source: Path, folder: Path, tokenizer: ChatTokenizer) -> None:
    """Copies the files of `tokenizer`, which was read from `source`, and writes the chat template in use beside them."""
    import shutil

    names = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model"]
    if tokenizer.exceeds_rows:
        names.append("config.json")  # it tells which of the tokens the model has an embedding for
    with new_directory(folder) as temporary:
        for name in names:
            if (source / name).is_file():
                shutil.copyfile(source / name, temporary / name)
        (temporary / "chat_template.jinja").write_text(tokenizer.template_text, encoding="utf-8")
