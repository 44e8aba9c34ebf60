"""What a name on the command line is as something to talk to: a run, a .gguf file, or a base model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from myna.adapters.its_base import adapter_base
from myna.adopt import adapter_tokenizer, find_given, kind_of, named_run
from myna.backends.llama_cpp import LlamaCppBackend
from myna.backends.text import TextModel
from myna.data.render import load_chat_tokenizer
from myna.errors import ModelError, UsageError
from myna.model.headers import check_gguf_file
from myna.model.sources import Say, cache_dir
from myna.recipe import Recipe
from myna.run import Run, file_sha256, new_directory, run_files
from myna.stored import is_whole, require_unchanged, run_base, stored_recipe

CHAT_CONTEXT = 4096  # tokens of a conversation that llama.cpp keeps; a model that reads fewer keeps fewer


@contextmanager
def open_text_model(
    target: str, say: Say, *, file_type: str | None = None, base: str | None = None
) -> Iterator[TextModel]:
    """Opens `target` and closes it at the end.

    A run answers by its exported file (`file_type`, else the first of its recipe that is there), and before any
    export by base + adapter through torch; so does an adapter folder, on `base` or on the one that its config names.
    UsageError where `target` is nothing of the kind.
    """
    run = named_run(target)
    if base is not None and (run is not None or kind_of(target) in ("model", "gguf")):
        raise UsageError(f"--base is for an adapter folder; {target} is {'a run' if run else 'none'}")
    if run is not None:
        with _open_run(run, say, file_type) as model:
            yield model
        return
    if file_type is not None:
        raise UsageError(f"--file {file_type}: {target} is no run")
    if target.endswith(".gguf"):
        with _open_file(Path(target)) as model:
            yield model
        return
    given = find_given(target, say, adapters_only=base is not None)
    if given.kind != "adapter":
        yield TextModel(_torch(given.folder, None, target), load_chat_tokenizer(given.folder))
        return
    _, found = adapter_base(given.folder, base, say)
    tokenizer = adapter_tokenizer(given.folder, found.folder)
    yield TextModel(_torch(found.folder, given.folder, given.name), tokenizer)


@contextmanager
def _open_run(run: Run, say: Say, file_type: str | None) -> Iterator[TextModel]:
    recipe = stored_recipe(run)
    tokenizer = load_chat_tokenizer(run.tokenizer_dir)
    chosen = _chosen_file(run, recipe, file_type)
    if chosen is not None:
        say(f"{run.name}: {chosen.name} through llama.cpp")
        with _llama(chosen) as backend:
            yield TextModel(backend, tokenizer, recipe.data.system)
        return
    if not is_whole(run) and run.stage("train") is None:
        raise UsageError(
            "the run is not trained yet",
            where=str(run.path),
            help="`myna train RECIPE --resume` goes on with it",
        )
    what = "the model it was made from" if is_whole(run) else "base + adapter"
    say(f"{run.name}: {what} through torch (no file is exported yet)")
    require_unchanged(run, run.tokenizer_dir)
    if not is_whole(run):
        require_unchanged(run, run.adapter_dir)
    base = run_base(run, say)
    adapter_dir = None if is_whole(run) else run.adapter_dir
    yield TextModel(_torch(base.folder, adapter_dir, run.name), tokenizer, recipe.data.system)


def _chosen_file(run: Run, recipe: Recipe, file_type: str | None) -> Path | None:
    files = {t: entry for t, entry in run_files(run).items() if (run.path / entry["path"]).is_file()}
    if file_type is not None and file_type not in files:
        raise UsageError(
            f"--file {file_type} is not exported; there are: {', '.join(files) or 'none'}",
            where=str(run.path),
            help=f"myna export {run.path} --quantize {file_type}",
        )
    wanted = [file_type] if file_type else [*recipe.export.quantize, *files]
    return next((run.path / files[t]["path"] for t in wanted if t in files), None)


@contextmanager
def _open_file(path: Path) -> Iterator[TextModel]:
    """A .gguf file; one that lies in a run speaks with that run's tokenizer and system text."""
    if not path.is_file():
        raise ModelError("there is no such file", where=str(path))
    check_gguf_file(path)
    run = Run(path.resolve().parent.parent)
    with _llama(path) as backend:
        if run.exists():
            system = stored_recipe(run).data.system
            yield TextModel(backend, load_chat_tokenizer(run.tokenizer_dir), system)
        else:
            yield TextModel(backend, load_chat_tokenizer(gguf_tokenizer_dir(path)))


def gguf_tokenizer_dir(path: Path) -> Path:
    """The tokenizer inside a .gguf file as a folder, made once and kept in the cache under the file's digest."""
    from myna.model.gguf_tokenizer import write_gguf_tokenizer

    folder = cache_dir() / "tokenizers" / file_sha256(path)[:16]
    if not folder.is_dir():
        with new_directory(folder) as temporary:
            write_gguf_tokenizer(path, temporary)
    return folder


@contextmanager
def _llama(path: Path) -> Iterator[LlamaCppBackend]:
    backend = LlamaCppBackend(path, context=CHAT_CONTEXT)
    try:
        yield backend
    finally:
        backend.close()


def _torch(folder: Path, adapter_dir: Path | None, name: str) -> Any:
    from myna.adapters.files import load_adapter
    from myna.backends.torch_backend import TorchBackend
    from myna.model.load import load_base

    model = load_base(folder, "fp32")
    return TorchBackend(load_adapter(model, adapter_dir) if adapter_dir else model, name)
