"""What Myna did not train, made a run: a PEFT adapter with its base, a model folder, a .gguf file, a hub repository.

    ADAPTER/, MODEL/, FILE.gguf, hf:org/name ─ find_given ─► Given ─ adopted ─► runs/NAME/

Such a run has what a trained one has, as far as there is anything: recipe.yaml, tokenizer/ with the template, and for
an adapter adapter/ and its base. run.json says under `source` what it was made from. Every later stage reads only that.
"""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import myna
from myna.adapters.files import CONFIG, WEIGHTS, adapter_sha256, read_adapter_config
from myna.adapters.its_base import adapter_base
from myna.data.render import ChatTokenizer, load_chat_tokenizer
from myna.errors import Interrupted, ModelError, MynaError, UsageError
from myna.given_rows import give_rows
from myna.lock import lock_run
from myna.model.hub import PREFIX, fetch_repository
from myna.model.load import read_config
from myna.model.sources import PACKAGED, BaseFiles, Say, model_folder, resolve_base
from myna.prepare import LIBRARIES, save_tokenizer
from myna.recipe import GivenData, GivenRecipe, Recipe, load_recipe, recipe_yaml
from myna.run import RUNS_DIR, Run, file_sha256, new_directory, run_path, timestamp, write_json, write_text
from myna.settings import DEFAULT_MAX_LENGTH, DataSettings, ModelSettings, RunSettings
from myna.show import Show
from myna.stored import is_adopted, is_whole, refuse_existing

Kind = Literal["adapter", "model", "gguf"]
# What a recipe says of training, which here nobody knows.
OF_TRAINING: Mapping[str, Any] = {
    "adapter": True,
    "train": True,
    "data": set(DataSettings.model_fields) - {"system", "max_length"},
}


@dataclass(frozen=True)
class Given:
    """Something to make a run of, on this disk. `spec` names it again, from anywhere; `base` is None for an adapter.

    `sha256` is of the weights, and for an adapter of its config too; `commit` is the hub's.
    """

    kind: Kind
    spec: str
    name: str
    folder: Path
    sha256: str
    base: BaseFiles | None = None
    commit: str | None = None


def kind_of(target: str) -> Kind | None:
    """What a text names by what lies there; None for a hub repository, which has to be looked at, and for nothing."""
    path = Path(target).expanduser()
    if target in PACKAGED or path.suffix == ".gguf":
        return "gguf"
    if (path / CONFIG).is_file():
        return "adapter"
    return "model" if (path / "config.json").is_file() else None


def find_given(target: str, say: Say, *, adapters_only: bool = False) -> Given:
    """What `target` names. UsageError where it is nothing of the kind, ModelError for what is refused."""
    kind = kind_of(target)
    if adapters_only and kind in ("model", "gguf"):
        raise _nothing_to_merge(target)
    if target.startswith(PREFIX):
        return _from_hub(target, say, adapters_only)
    path = Path(target).expanduser()
    if kind == "adapter":
        read_adapter_config(path)
        return Given(kind, str(path.resolve()), path.resolve().name, path.resolve(), adapter_sha256(path))
    if kind is not None:
        base = resolve_base(target, say)
        name = target if target in PACKAGED else path.resolve().name.removesuffix(".gguf")
        spec = target if target in PACKAGED else str(path.resolve())
        return Given(kind, spec, name, base.folder, base.sha256, base)
    if path.is_dir():
        raise ModelError(
            f"holds neither a model (config.json) nor an adapter ({CONFIG})",
            where=target,
            help="name the folder that the files themselves are in",
        )
    known = sorted(path.parent.name for path in RUNS_DIR.glob("*/run.json"))
    raise UsageError(
        f"{target} is no run, no adapter folder, no .gguf file and no base model",
        help=f"runs here: {', '.join(known) or 'none'}; base models: {', '.join(PACKAGED)}, hf:org/name",
    )


def _nothing_to_merge(target: str) -> UsageError:
    return UsageError(
        f"{target} is a whole model, not an adapter: there is nothing to merge",
        help=f"myna export {target} --quantize Q4_K_M",
    )


def _from_hub(target: str, say: Say, adapters_only: bool) -> Given:
    found = fetch_repository(target, say, adapters_only=adapters_only)
    name = found.repository.rpartition("/")[2]
    if (found.folder / CONFIG).is_file():
        read_adapter_config(found.folder)
        digest = adapter_sha256(found.folder)
        return Given("adapter", found.pinned, name, found.folder, digest, commit=found.commit)
    model = model_folder(found.folder)
    base = replace(model, name=f"{PREFIX}{found.repository}", commit=found.commit)
    return Given("model", found.pinned, name, base.folder, base.sha256, base, found.commit)


@contextmanager
def adopted(
    target: str,
    *,
    base: str | None = None,
    name: str | None = None,
    rows: Path | None = None,
    adapters_only: bool = False,
    show: Show,
) -> Iterator[Run]:
    """The run that `target` names, or the one that is made from it; with `rows` these are its held-out rows.

    Where the first stage refuses a run that was only made for it, the run goes again. Raises UsageError where a
    run of that name was made from something else.
    """
    run = named_run(target)
    if run is not None and adapters_only and is_whole(run):
        raise _nothing_to_merge(target)
    if run is None:
        given = find_given(target, show.say, adapters_only=adapters_only)
        run = Run(run_path(name or given.name))
        if run.exists():
            _require_same(run, given, base)
        else:
            with _gone_if_refused(run):
                _make(run, given, base, show.say)
                give_rows(run, rows, show.say)
                yield run
            return
    elif base or name:
        flag = "--base" if base else "--name"
        raise UsageError(f"{flag} is for adapters and models that are no run yet; {target} is one")
    give_rows(run, rows, show.say)
    yield run


def set_in_run(run: Run, overrides: Sequence[str], free: tuple[str, ...]) -> None:
    """Writes `key=value` texts (`--set`) into the recipe that a run keeps, as `--resume` with them would.

    `free` are settings, and blocks with a dot behind. UsageError for others, RecipeError for what is no setting or value.
    """
    if not overrides:
        return
    others = [text for text in overrides if not text.partition("=")[0].strip().startswith(free)]
    if others:
        raise UsageError(
            f"--set {others[0]}: this stage has settings of {', '.join(free)} alone",
            where=str(run.path),
            help="a new run has others: myna run RECIPE --set run.name=NAME "
            + " ".join(f"--set {text}" for text in others),
        )
    with lock_run(run):
        is_given = is_adopted(run)
        recipe = load_recipe(run.recipe_path, overrides, kind=GivenRecipe if is_given else Recipe)
        write_text(run.recipe_path, recipe_yaml(recipe, without=OF_TRAINING if is_given else None))
        run.record([run.recipe_path])


def named_run(target: str) -> Run | None:
    """A run by its path or name. A folder or file that lies here under the name is meant before a run under ./runs."""
    if Run(Path(target)).exists():
        return Run(Path(target))
    is_here = target not in PACKAGED and kind_of(target) is not None
    return None if is_here or not Run(RUNS_DIR / target).exists() else Run(RUNS_DIR / target)


@contextmanager
def _gone_if_refused(run: Run) -> Iterator[None]:
    """Removes a run that was refused before any stage was done: it would stand in the way of the corrected one."""
    was_there = run.path.is_dir() and not (run.path / ".lock").exists()
    above = next(path for path in (run.path, *run.path.parents) if path.exists())
    if not above.is_dir():
        raise UsageError("is a file, or lies in one", where=str(run.path), help="--name NAME makes another")
    try:
        refuse_existing(run)
    except UsageError as error:
        raise UsageError(
            error.message, where=error.where, help="--name NAME makes another", code=error.code
        ) from None
    try:
        yield
    except MynaError as error:
        done = set(run.info()["stages"]) - {"train"} if run.exists() else set()
        if not done and not isinstance(error, Interrupted) and error.code != "locked":
            shutil.rmtree(run.path, ignore_errors=True)
            if was_there:
                run.path.mkdir()  # an empty folder of the user's stays one
        raise


def _require_same(run: Run, given: Given, base: str | None) -> None:
    """UsageError where the run of this name was trained here, or made from other weights or with another base."""
    info = run.info()
    source = info.get("source")
    if source is None:
        reason = f"the run {run.name} was trained here; it is not made from {given.spec}"
    elif source["sha256"] != given.sha256:
        reason = f"the run {run.name} was made from {source['path']} as it was before, or from another one"
    elif base is not None and resolve_base(base).differs_from(info["base"]):
        reason = f"the run {run.name} was made with the base {info['base']['name']}"
    else:
        return
    raise UsageError(reason, where=str(run.path), help="--name NAME makes another run", code="run-exists")


def _make(run: Run, given: Given, base: str | None, say: Say) -> None:
    """Writes the run's files; run.json last, since it is what makes the folder a run."""
    spec, found = (given.spec, given.base) if given.base else adapter_base(given.folder, base, say)
    if given.base and base:
        raise UsageError(f"--base is for adapters; {given.spec} is a whole model")
    config = read_config(found.folder).get_text_config()
    context = getattr(config, "max_position_embeddings", None) or DEFAULT_MAX_LENGTH
    recipe = GivenRecipe(
        run=RunSettings(name=run.name),
        model=ModelSettings(base=spec),
        data=GivenData(max_length=min(context, DEFAULT_MAX_LENGTH)),
    )
    with lock_run(run):
        stages: dict[str, Any] = {}
        if given.kind == "adapter":
            stages["train"] = _take_adapter(run, given)
        _take_tokenizer(run, given, found, say)
        write_text(run.recipe_path, recipe_yaml(recipe, without=OF_TRAINING))
        written = [run.recipe_path, run.tokenizer_dir, *([run.adapter_dir] if stages else [])]
        commit = {"commit": given.commit} if given.commit else {}
        info = {
            "name": run.name,
            "created": timestamp(),
            "base": found.as_json(),
            "source": {
                "kind": given.kind,
                "path": given.spec,
                "sha256": given.sha256,
                **commit,
                **_method(run),
            },
            "data": {},
            "held_out_rows": 0,
            "versions": {"myna": myna.__version__, "python": platform.python_version()}
            | {library: version(library) for library in LIBRARIES},
            "machine": {
                "system": platform.system(),
                "processor": platform.machine(),
                "platform": sys.platform,
            },
            "stages": stages,
            "digests": run.digests(written),
        }
        write_json(run.path / "run.json", info)
    say(f"{run.path} is made from {given.spec}")


def _take_adapter(run: Run, given: Given) -> dict[str, Any]:
    """Copies the two files; returns the entry that stands for the training, which was not done here."""
    with new_directory(run.adapter_dir) as temporary:
        for name in (CONFIG, WEIGHTS):
            shutil.copyfile(given.folder / name, temporary / name)
    digest = file_sha256(run.adapter_dir / WEIGHTS)
    return {"given": True, "seconds": 0.0, "adapter_sha256": digest, "done": timestamp()}


def _method(run: Run) -> Mapping[str, Any]:
    """What the adapter is, in the words of its config, for the report and the card."""
    if not run.adapter_dir.is_dir():
        return {}
    config = read_adapter_config(run.adapter_dir)
    known = {
        key: config[key]
        for key in ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora")
        if key in config
    }
    return {"adapter": known}


def adapter_tokenizer(folder: Path, base_dir: Path, say: Say = lambda _: None) -> ChatTokenizer:
    """The tokenizer that lies with an adapter, else the base's; the template is that of the one that has some."""
    base = load_chat_tokenizer(base_dir) if (base_dir / "tokenizer.json").is_file() else None
    own = load_chat_tokenizer(folder) if base is None or (folder / "tokenizer.json").is_file() else base
    if own.has_own_template:
        return own
    if base is not None and base.has_own_template:
        say("the adapter's tokenizer has no chat template: the base's is used")
        return replace(own, template_text=base.template_text)
    say("there is no chat template: a plain one (### User / ### Assistant) is used and kept in the run")
    return own


def _take_tokenizer(run: Run, given: Given, base: BaseFiles, say: Say) -> None:
    tokenizer = adapter_tokenizer(given.folder, base.folder, say)
    source = given.folder if (given.folder / "tokenizer.json").is_file() else base.folder
    save_tokenizer(source, run.tokenizer_dir, tokenizer)
