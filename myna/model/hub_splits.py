"""Which files of a data set on the hub are rows of a config and a split: by README.md, else by names, as the hub does."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from myna.data.check import fault, named
from myna.data.opened import row_suffix
from myna.data.sources import SOURCES, TEXTS

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
GLOB = re.compile(r"(\*\*/?|\*|\?|\[[^\]/]+\])")
Splits = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class HubSpec:
    """What hf:… names; `config` and `revision` may be left open."""

    repository: str
    config: str | None
    split: str
    revision: str | None


def parse_rows(spec: str) -> HubSpec:
    """DataError where that is no name the hub could have."""
    found = SPEC.fullmatch(spec)
    if found is None:
        raise fault("D007", "is no name of rows on the hub", where=spec, help=SHAPE)
    split = found["split"] or "train"
    return HubSpec(found["repository"], found["config"], ALIASES.get(split, split), found["revision"])


def is_read(name: str) -> bool:
    hidden = any(part.startswith((".", "_")) or not part for part in name.split("/"))
    suffix = row_suffix(Path(name))
    return (
        not hidden and suffix in SOURCES and suffix not in TEXTS and Path(name).name != "dataset_infos.json"
    )


def split_of(spec: str, wanted: HubSpec, configs: Mapping[str, Splits]) -> list[str]:
    """The files of the wanted split; DataError that names the configs or splits that there are."""
    config = wanted.config or (
        DEFAULT if DEFAULT in configs else next(iter(configs)) if len(configs) == 1 else None
    )
    if config is None or config not in configs:
        what = f"has no config `{config}`" if config else "has several configs"
        cure = f"hf:{wanted.repository}/{next(iter(configs))}:{wanted.split}"
        raise fault("D007", f"{what}; there are: {named(configs)}", where=spec, help=cure)
    splits = {name: files for name, files in configs[config].items() if files}
    if not splits:
        what = f"its README.md names files for the config `{config}` that are not there"
        cure = "download its files and give them as paths: myna data check FILE"
        raise fault("D007", what, where=spec, help=cure)
    if wanted.split not in splits:
        message = f"has no split `{wanted.split}`; there are: {named(splits)}"
        cure = f"hf:{wanted.repository}{'/' + wanted.config if wanted.config else ''}:{next(iter(splits), 'train')}"
        raise fault("D007", message, where=spec, help=cure)
    return sorted(set(splits[wanted.split]))  # several patterns may fit a file


def told_configs(page: str, names: Sequence[str]) -> dict[str, Splits]:
    """`configs` of a README.md: config → split → files; empty where it says nothing of files."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    head = re.match(r"\s*---\s*\n(.*?)\n---", page, re.DOTALL)
    try:
        told = YAML(typ="safe").load(head[1]) if head else None
    except (YAMLError, ValueError, RecursionError):  # of a date or number that is none, of lists in lists
        return {}
    configs = told.get("configs") if isinstance(told, dict) else None
    found: dict[str, Splits] = {}
    for config in configs if isinstance(configs, list) else []:
        folder = config.get("data_dir") if isinstance(config, dict) else None
        inside = folder.removeprefix("./").strip("/") if isinstance(folder, str) else ""
        prefix = f"{inside}/" if inside not in ("", ".") else ""
        if isinstance(config, dict) and (config.get("data_files") or isinstance(folder, str)):
            name = str(config.get("config_name") or DEFAULT)
            files = config.get("data_files")
            found[name] = told_splits(files, prefix, names) if files else _splits_in(prefix, names)
            if config.get("default") is True:
                found.setdefault(DEFAULT, found[name])
    return found


def told_splits(files: Any, prefix: str, names: Sequence[str]) -> Splits:
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
        chosen = [name for name in names if any(fits(name, pattern) for pattern in patterns)]
        if chosen:
            splits.setdefault(ALIASES.get(str(split), str(split)), []).extend(chosen)
    return splits


def _splits_in(prefix: str, names: Sequence[str]) -> Splits:
    """The files of a folder, told by their names within it, as the hub does where a config names a folder alone."""
    inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    return {split: [prefix + name for name in files] for split, files in _by_words(inside).items()}


def fits(name: str, pattern: str) -> bool:
    """`*` within a folder, `**` over folders, `[0-9]` one of some, as the hub reads them.

    By the places that each part may reach: a regular expression of many stars would take for ever.
    """
    reached = {0}
    for part in filter(None, GLOB.split(pattern.removeprefix("./"))):
        reached = set(_reached(name, part, reached))
    return len(name) in reached


def _reached(name: str, part: str, starts: set[int]) -> Iterator[int]:
    """Where a part of a pattern may end in the name, begun at any of `starts`."""
    if part in ("**", "**/"):
        yield from starts
        first = min(starts, default=len(name))
        yield from (n + 1 for n in range(first, len(name)) if part == "**" or name[n] == "/")
    elif part == "*":
        yield from starts
        is_on = False
        for n, character in enumerate(name):
            is_on = (is_on or n in starts) and character != "/"
            if is_on:
                yield n + 1
    elif part == "?" or GLOB.fullmatch(part):
        yield from (n + 1 for n in starts if name[n : n + 1] not in ("", "/") and fnmatchcase(name[n], part))
    else:
        yield from (n + len(part) for n in starts if name.startswith(part, n))


def configs_by_name(names: Sequence[str]) -> dict[str, Splits]:
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
