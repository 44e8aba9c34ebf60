"""hf:org/name/config:split@revision: rows of a data set of the Hugging Face Hub, as files on this disk.

    hf:org/name:test@main ─ listing ─► commit, files of the split ─► huggingface_hub's cache ◄─ links ─ myna's cache/rows/…

Only files of rows are fetched, and read as any others are; the script of a data set is never run. Which files are a split's
is told by `configs` of README.md, else by the names of files and folders, as the hub does. A commit whose links lie here is
not asked for again.
"""

from __future__ import annotations

import glob
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from myna.data.check import fault, named
from myna.data.opened import row_suffix
from myna.data.sides import row_files
from myna.data.sources import SOURCES, TEXTS
from myna.errors import DataError, MachineError, ModelError, MynaError, UsageError
from myna.model.hub import PREFIX, Say, _network_errors, _quiet, _refusal
from myna.model.sources import cache_dir
from myna.recipe import DataSettings
from myna.run import file_sha256, new_directory, require_room, write_text

CONVERTED = "refs/convert/parquet"  # where the hub keeps what it made of other files
DEFAULT = "default"
SHAPE = "hf:org/name/config:split@revision, where config, split and revision may be left out"
SPEC = re.compile(
    r"hf:(?P<repository>[\w.-]+(?:/[\w.-]+)?)(?:/(?P<config>[\w.+-]+))?(?::(?P<split>[\w.-]+))?(?:@(?P<revision>[\w./-]+))?"
)
ALIASES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
WORD = re.compile(rf"(?:^|[^a-zA-Z0-9])({'|'.join(ALIASES)})(?:[^a-zA-Z0-9]|\d*(?:[^a-zA-Z0-9]|$)|$)")
SHARD = re.compile(r"(?P<split>[\w.-]+?)-\d{5}-of-\d{5}(?:-[0-9a-f]+)?\.\w+")
Splits = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class HubSpec:
    """What hf:… names; `config` and `revision` may be left open."""

    repository: str
    config: str | None
    split: str
    revision: str | None


@dataclass(frozen=True)
class Located:
    """Rows on this disk: the file or folder to read, and the commit where they are from the hub."""

    path: Path
    commit: str | None = None


def parse_rows(spec: str) -> HubSpec:
    """DataError where that is no name the hub could have."""
    found = SPEC.fullmatch(spec)
    if found is None:
        raise fault("D007", "is no name of rows on the hub", where=spec, help=SHAPE)
    split = found["split"] or "train"
    return HubSpec(found["repository"], found["config"], ALIASES.get(split, split), found["revision"])


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
        chosen = _split_of(spec, wanted, _by_folder(list(sizes)))
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


# Which files are a split's


def _chosen(spec: str, wanted: HubSpec, commit: str, sizes: Mapping[str, int]) -> list[str] | None:
    """The files of the split; None where the repository has no files of rows."""
    names = [name for name in sizes if _is_read(name)]
    if not names:
        return None
    configs = _told_configs(spec, wanted.repository, commit, names) if "README.md" in sizes else {}
    return _split_of(spec, wanted, configs or _by_folder(names))


def _is_read(name: str) -> bool:
    hidden = any(part.startswith((".", "_")) for part in name.split("/"))
    suffix = row_suffix(Path(name))
    return (
        not hidden and suffix in SOURCES and suffix not in TEXTS and Path(name).name != "dataset_infos.json"
    )


def _split_of(spec: str, wanted: HubSpec, configs: Mapping[str, Splits]) -> list[str]:
    """The files of the wanted split; DataError that names the configs or splits that there are."""
    config = wanted.config or (
        DEFAULT if DEFAULT in configs else next(iter(configs)) if len(configs) == 1 else None
    )
    if config is None or config not in configs:
        what = f"has no config `{config}`" if config else "has several configs"
        cure = f"hf:{wanted.repository}/{next(iter(configs))}:{wanted.split}"
        raise fault("D007", f"{what}; there are: {named(configs)}", where=spec, help=cure)
    splits = configs[config]
    if wanted.split not in splits:
        message = f"has no split `{wanted.split}`; there are: {named(splits)}"
        cure = f"hf:{wanted.repository}{'/' + wanted.config if wanted.config else ''}:{next(iter(splits), 'train')}"
        raise fault("D007", message, where=spec, help=cure)
    return sorted(splits[wanted.split])


def _told_configs(spec: str, repository: str, commit: str, names: Sequence[str]) -> dict[str, Splits]:
    """`configs` of README.md: config → split → files; empty where it says nothing of files."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    page = (_download(spec, repository, commit, ["README.md"], 0) / "README.md").read_text(errors="replace")
    head = re.match(r"\s*---\s*\n(.*?)\n---", page, re.DOTALL)
    try:
        told = YAML(typ="safe").load(head[1]) if head else None
    except YAMLError:
        return {}
    configs = told.get("configs") if isinstance(told, dict) else None
    found: dict[str, Splits] = {}
    for config in configs if isinstance(configs, list) else []:
        if isinstance(config, dict) and config.get("data_files"):
            prefix = f"{config['data_dir'].strip('/')}/" if isinstance(config.get("data_dir"), str) else ""
            name = str(config.get("config_name") or DEFAULT)
            found[name] = _told_splits(config["data_files"], prefix, names)
            if config.get("default") is True:
                found.setdefault(DEFAULT, found[name])
    return found


def _told_splits(files: Any, prefix: str, names: Sequence[str]) -> Splits:
    """A text or a list of patterns is train; a mapping, or a list of split and path, is by split."""
    if isinstance(files, dict):
        pairs = list(files.items())
    elif isinstance(files, list) and all(isinstance(one, dict) for one in files):
        pairs = [(one.get("split", "train"), one.get("path")) for one in files]
    else:
        pairs = [("train", files)]
    splits: dict[str, list[str]] = {}
    for split, paths in pairs:
        patterns = [prefix + str(path) for path in (paths if isinstance(paths, list) else [paths])]
        chosen = [name for name in names if any(_fits(name, pattern) for pattern in patterns)]
        if chosen:
            splits.setdefault(ALIASES.get(str(split), str(split)), []).extend(chosen)
    return splits


def _fits(name: str, pattern: str) -> bool:
    """`*` within a folder, `**` over folders, as the hub reads them."""
    parts = re.split(r"(\*\*/?|\*|\?)", pattern.removeprefix("./"))
    ways = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.fullmatch("".join(ways.get(part, re.escape(part)) for part in parts), name) is not None


def _by_folder(names: Sequence[str]) -> dict[str, Splits]:
    """Told by names alone: splits by words in them; where folders at the top have splits of their own, each is a config."""
    tops = {name.split("/")[0] for name in names if "/" in name}
    is_configs = bool(tops) and all("/" in name for name in names)
    is_configs = is_configs and not any(top == "data" or _word(top) for top in tops)
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.split("/")[0] if is_configs else DEFAULT, []).append(name)
    return {config: _by_words(group) for config, group in sorted(groups.items())}


def _by_words(names: Sequence[str]) -> Splits:
    splits: dict[str, list[str]] = {}
    for name in names:
        splits.setdefault(_split_in(name) or "", []).append(name)
    rest = splits.pop("", [])
    if rest and not splits:
        splits = {"train": rest}
    return {split: _of_one_kind(group) for split, group in sorted(splits.items())}


def _split_in(name: str) -> str | None:
    """The split that a file belongs to: by its shard's name, a word in its name, or a folder's."""
    shard = SHARD.fullmatch(Path(name).name)
    if shard:
        return ALIASES.get(shard["split"], shard["split"])
    return next(filter(None, map(_word, reversed(name.split("/")))), None)


def _word(text: str) -> str | None:
    found = WORD.search(text.lower())
    return ALIASES[found[1]] if found else None


def _of_one_kind(names: Sequence[str]) -> list[str]:
    """The files of the most common ending: some repositories keep the same rows twice."""
    common = Counter(row_suffix(Path(name)) for name in names).most_common(1)[0][0]
    return [name for name in names if row_suffix(Path(name)) == common]


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
