"""Which base an adapter goes on: the one that is named, else the one in its config, found on this disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from myna.adapters.files import CONFIG, read_adapter_config, trained_on
from myna.errors import ModelError
from myna.model.hub import PREFIX, cached_repository
from myna.model.sources import PACKAGED, BaseFiles, Say, model_folder, packaged_name, resolve_base


def adapter_base(folder: Path, base: str | None, say: Say) -> tuple[str, BaseFiles]:
    """(how to name it again, the base) of an adapter folder: `base` if given, else where its config says.

    The config's name is tried as a path (from the adapter's folder, then from here), as a packaged name and in
    huggingface_hub's cache; it is never fetched unasked. ModelError where none is found, or where Myna wrote down
    that the adapter was trained on other weights.
    """
    spec, found = (_spelled(base), resolve_base(base, say)) if base else _recorded(folder, say)
    if found.commit:
        spec = f"{spec.partition('@')[0]}@{found.commit}"
    expected = trained_on(folder)
    if expected not in (None, found.sha256):
        raise ModelError(
            f"the adapter was trained on other weights than those of {found.name} "
            f"(SHA-256 {(expected or '')[:12]}…, not {found.sha256[:12]}…)",
            where=str(folder),
            help="--base SPEC names the base it was trained on",
        )
    say(f"{folder.name} goes on {found.name}")
    return spec, found


def _spelled(base: str) -> str:
    """A path that holds wherever it is read from; names as they are."""
    return base if base in PACKAGED or base.startswith(PREFIX) else str(Path(base).expanduser().resolve())


def _recorded(folder: Path, say: Say) -> tuple[str, BaseFiles]:
    config = read_adapter_config(folder)
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(name, str) or not name:
        raise ModelError(
            f"its {CONFIG} names no base model",
            where=str(folder),
            help="--base SPEC: a packaged name, a folder, a .gguf file or hf:org/name",
        )
    for path in (folder / name, Path(name).expanduser()):
        packaged = packaged_name(path)
        if packaged:  # unpacked in the cache: known by the digest of the file that it came from
            return packaged, resolve_base(packaged, say)
        if (path / "config.json").is_file() or (path.suffix == ".gguf" and path.is_file()):
            return str(path.resolve()), resolve_base(str(path), say)
    if name in PACKAGED:
        return name, resolve_base(name, say)
    repository, _, given = name.removeprefix(PREFIX).partition("@")
    wanted = given or (revision if isinstance(revision, str) and revision else None)
    cached = cached_repository(repository, wanted)
    if cached is not None:
        base = replace(model_folder(cached.folder), name=f"{PREFIX}{repository}", commit=cached.commit)
        return cached.pinned, base
    at = f"@{wanted}" if wanted else ""
    is_path = name.startswith((".", "/", "~")) or repository.count("/") != 1
    raise ModelError(
        f"its base, {name}{at if not given else ''}, is not on this disk: no folder, no packaged name, "
        "and not in huggingface_hub's cache",
        where=str(folder),
        help="--base SPEC: a packaged name, a folder, a .gguf file or hf:org/name"
        if is_path
        else f"--base {PREFIX}{repository}{at} fetches it",
    )
