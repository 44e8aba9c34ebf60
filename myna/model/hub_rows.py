"""hf:org/name/config:split@revision: rows of a data set of the Hugging Face Hub, as files on this disk.

    hf:org/name:test@main ─ listing ─► commit, files of the split ─► huggingface_hub's cache ◄─ links ─ myna's cache/rows/…

Only files of rows are fetched, and read as any others are; the script of a data set is never run. Which files are a split's
is told by `configs` of README.md, else by the names of files and folders, as the hub does. A commit whose links lie here is
not asked for again.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from myna.data.check import fault, named
from myna.data.sides import row_files
from myna.data.sources import SOURCES
from myna.errors import DataError, MachineError, ModelError, MynaError, UsageError
from myna.model.hub import PREFIX, Say, _network_errors, _quiet, _refusal
from myna.model.hub_splits import HubSpec, configs_by_name, is_read, parse_rows, split_of, told_configs
from myna.model.sources import cache_dir
from myna.run import file_sha256, new_directory, require_room, write_text
from myna.settings import DataSettings

CONVERTED = "refs/convert/parquet"  # where the hub keeps what it made of other files


@dataclass(frozen=True)
class Located:
    """Rows on this disk: the file or folder to read, and the commit where they are from the hub."""

    path: Path
    commit: str | None = None


def is_hub(spec: str | Path) -> bool:
    return str(spec).startswith(PREFIX)


def locate_rows(
    spec: str | Path, say: Say = lambda _: None, *, known: Mapping[str, Any] | None = None
) -> Located:
    """The rows that a recipe or a command names, brought onto this disk where they are on the hub.

    `known` is what a run's run.json says of them: its commit is what the branch means there. DataError for what there is
    not or may not be had, MachineError for a hub that cannot be reached, UsageError for standard input.
    """
    if str(spec) == "-":
        message = "standard input can be read once, and here rows have to be found again"
        raise UsageError(message, where="-", help="write it into a file first: … > rows.jsonl")
    if not is_hub(spec):
        return Located(Path(spec))
    wanted = parse_rows(str(spec))
    found = rows_on_disk(spec, known)
    if found is not None and _is_fixed(wanted, known, spec):
        return found
    try:
        return _fetch(str(spec), wanted, (known or {}).get("commit"), say)
    except MachineError as error:
        if found is None:
            raise
        assert found.commit
        say(f"{error.message}: {spec} is taken from the cache as it was at {found.commit[:12]}")
        return found


def rows_on_disk(spec: str | Path, known: Mapping[str, Any] | None = None) -> Located | None:
    """The rows as they are here already, with nothing fetched; None where they are not."""
    if not is_hub(spec):
        return Located(Path(spec))
    wanted = parse_rows(str(spec))
    commit = (known or {}).get("commit") or _commit_here(wanted)
    folder = _folder(wanted, str(commit)) if commit else None
    return None if folder is None or not _is_whole(folder) else Located(_single(folder), str(commit))


def _is_fixed(wanted: HubSpec, known: Mapping[str, Any] | None, spec: str | Path) -> bool:
    """Whether a commit is meant: by the name, or by the run that was made from it."""
    named_so = re.fullmatch("[0-9a-f]{40}", wanted.revision or "") is not None
    return named_so or bool(known and known.get("commit") and known.get("path") == str(spec))


# What lies in the cache: links to the files of a split, by commit


def _root(wanted: HubSpec) -> Path:
    return cache_dir() / "rows" / wanted.repository.replace("/", "--")


def _folder(wanted: HubSpec, commit: str) -> Path:
    name = wanted.repository.rpartition("/")[2]
    return _root(wanted) / commit / f"{name}-{wanted.config or 'any'}-{wanted.split}"


def _ref(wanted: HubSpec) -> Path:
    return _root(wanted) / "refs" / (wanted.revision or "main").replace("/", "--")


def _commit_here(wanted: HubSpec) -> str | None:
    if re.fullmatch("[0-9a-f]{40}", wanted.revision or ""):
        return wanted.revision
    return _ref(wanted).read_text(encoding="utf-8").strip() if _ref(wanted).is_file() else None


def _is_whole(folder: Path) -> bool:
    links = [path for path in folder.rglob("*") if path.is_symlink()]
    return bool(links) and all(link.is_file() for link in links)


def _single(folder: Path) -> Path:
    """The one file of a folder, else the folder."""
    links = [path for path in folder.rglob("*") if path.is_symlink()]
    return links[0] if len(links) == 1 else folder


# What is fetched


def _fetch(spec: str, wanted: HubSpec, commit: str | None, say: Say) -> Located:
    revision = commit or wanted.revision
    found_commit, sizes, digests = _listed(spec, wanted.repository, revision)
    chosen, at = _chosen(spec, wanted, found_commit, sizes), found_commit
    if chosen is None:
        say(f"{spec} has no files that are read: what the hub made of them ({CONVERTED}) is taken")
        at, sizes, digests = _converted(spec, wanted.repository, list(sizes))
        chosen = split_of(spec, wanted, configs_by_name(list(sizes)))
    num_bytes = sum(sizes[name] for name in chosen)
    say(f"{spec} is commit {found_commit[:12]}: {len(chosen)} files, {num_bytes / 1e6:,.1f} MB")
    snapshot = _download(spec, wanted.repository, at, chosen, num_bytes)
    for name in chosen:
        if digests.get(name) and file_sha256(snapshot / name) != digests[name]:
            cure = f"delete {(snapshot / name).resolve()} and run the same command again"
            raise fault(
                "D007",
                f"{name} is not the file that the hub lists: its SHA-256 is another one",
                where=spec,
                help=cure,
            )
    folder = _folder(wanted, found_commit)
    if not _is_whole(folder):
        with new_directory(folder) as temporary:
            for name in chosen:
                link = temporary / name
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to((snapshot / name).absolute())
    if commit is None:
        _ref(wanted).parent.mkdir(parents=True, exist_ok=True)
        write_text(_ref(wanted), found_commit + "\n")
    return Located(_single(folder), found_commit)


def _listed(spec: str, repository: str, revision: str | None) -> tuple[str, dict[str, int], dict[str, str]]:
    """(commit, file → bytes, file → SHA-256 where the hub has one)."""
    _quiet()
    from huggingface_hub import HfApi, constants

    try:
        info = HfApi().dataset_info(
            repository, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
    except _network_errors() as error:
        raise _refused(error, spec, revision) from None
    files = info.siblings or []
    digests = {file.rfilename: file.lfs.sha256 for file in files if file.lfs is not None}
    return str(info.sha), {file.rfilename: file.size or 0 for file in files}, digests


def _download(spec: str, repository: str, commit: str, names: Sequence[str], num_bytes: int) -> Path:
    from huggingface_hub import constants, snapshot_download

    require_room(Path(constants.HF_HUB_CACHE), num_bytes, f"{repository} in huggingface_hub's cache")
    try:
        folder = snapshot_download(
            repository,
            repo_type="dataset",
            revision=commit,
            allow_patterns=[glob.escape(name) for name in names],
        )
    except _network_errors() as error:
        raise _refused(error, spec, commit) from None
    return Path(folder)


def _converted(
    spec: str, repository: str, names: Sequence[str]
) -> tuple[str, dict[str, int], dict[str, str]]:
    """The listing of what the hub converted; where there is none, what there is instead."""
    try:
        return _listed(spec, repository, CONVERTED)
    except DataError:
        scripts = [name for name in names if name.endswith(".py")]
        if scripts:
            message = f"is made by a script ({scripts[0]}), which is never run"
            cure = "a data set with files of rows; or run the script elsewhere, save rows as .parquet, and name that file"
            raise fault("D017", message, where=spec, help=cure) from None
        endings = named(sorted({Path(name).suffix or name for name in names}))
        message = f"holds no file of rows; it has: {endings}"
        raise fault("D007", message, where=spec, help=f"files of rows end in {' '.join(SOURCES)}") from None


def _refused(error: Exception, spec: str, revision: str | None) -> MynaError:
    """What hub.py says of a model, of rows."""
    refusal = _refusal(error, spec, revision)
    cure = (refusal.help or "").replace(
        "put the model in a folder and name that folder", "name a file of the rows"
    )
    if isinstance(refusal, ModelError):
        return fault("D007", refusal.message, where=spec, help=cure)
    refusal.help = cure
    return refusal


def _chosen(spec: str, wanted: HubSpec, commit: str, sizes: Mapping[str, int]) -> list[str] | None:
    """The files of the split; None where the repository has no files of rows."""
    names = [name for name in sizes if is_read(name)]
    if not names:
        return None
    page = ""
    if "README.md" in sizes:
        folder = _download(spec, wanted.repository, commit, ["README.md"], 0)
        page = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    return split_of(spec, wanted, told_configs(page, names) or configs_by_name(names))


# The rows of a whole recipe


def locate_data(
    data: DataSettings, say: Say, known: Mapping[str, Any] | None = None
) -> tuple[DataSettings, dict[str, str]]:
    """The settings with paths on this disk in the place of names on the hub, and the commit of each by its setting.

    `known` is what run.json has under `data`.
    """
    found = {
        name: locate_rows(path, say, known=(known or {}).get(name))
        for name, (path, _) in row_files(data).items()
    }
    whole = {name: str(one.path) for name, one in found.items() if "." not in name}
    mix = [
        one.model_copy(update={"train": str(found[f"mix.{number}"].path)})
        for number, one in enumerate(data.mix, start=1)
    ]
    commits = {name: one.commit for name, one in found.items() if one.commit}
    return data.model_copy(update={**whole, "mix": mix}), commits
