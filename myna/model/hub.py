"""hf:org/name@revision: a repository of the Hugging Face Hub as a folder, through huggingface_hub and its cache.

    hf:org/name@main ─ listing ─► commit, files ─ what is read, and safetensors alone ─► cache/snapshots/COMMIT/

A branch or tag means another commit tomorrow: what was found today is told by `HubFiles.commit`, and a run writes it
down. A commit that lies in the cache is not asked for again, so a run made once works offline.
"""

from __future__ import annotations

import errno
import glob
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from myna.errors import MachineError, ModelError, MynaError, UsageError
from myna.run import file_sha256, require_room

Say = Callable[[str], None]

PREFIX = "hf:"
CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
INDEX = "model.safetensors.index.json"
# What is read of a repository beside the weights. No code, no pickles, no folders below.
TEXT_FILES = (
    CONFIG,
    ADAPTER_CONFIG,
    INDEX,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
LOGIN = "`hf auth login`, or HF_TOKEN in the environment, says who you are"
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@dataclass(frozen=True)
class HubFiles:
    """A repository on this disk, at one commit (40 hexadecimal digits)."""

    repository: str
    commit: str
    folder: Path

    @property
    def pinned(self) -> str:
        """How to name exactly these files again."""
        return f"{PREFIX}{self.repository}@{self.commit}"


def parse_hub(spec: str) -> tuple[str, str | None]:
    """(repository, revision) of hf:org/name@revision; ModelError where that is no name the hub could have."""
    _quiet()
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    repository, at, revision = spec.removeprefix(PREFIX).partition("@")
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"is no repository name: {reason}", where=spec, help="hf:org/name@revision"
        ) from None
    if at and not re.fullmatch(r"[\w.\-/]+", revision):
        raise ModelError(
            f"is no revision: {revision!r}", where=spec, help="a branch, a tag or a commit after the @"
        )
    return repository, revision or None


def fetch_repository(spec: str, say: Say, *, adapters_only: bool = False) -> HubFiles:
    """Brings hf:org/name@revision into huggingface_hub's cache: what is read of it, and safetensors alone.

    Where the hub is out of reach, what the revision meant last is taken from the cache, and that is said. Raises
    ModelError for what there is not, may not be had or is refused, and with `adapters_only` UsageError for a whole model,
    before anything large is fetched; MachineError for a hub that cannot be reached and for a full disk.
    """
    repository, revision = parse_hub(spec)
    cached = cached_repository(repository, revision)
    if cached is not None and revision == cached.commit:
        _require_adapter(adapters_only, (cached.folder / ADAPTER_CONFIG).is_file(), spec)
        return cached
    try:
        commit, sizes, digests = _listing(repository, revision)
    except _network_errors() as error:
        refusal = _refusal(error, spec, revision)
        if cached is None or not isinstance(refusal, MachineError):
            raise refusal from None
        _require_adapter(adapters_only, (cached.folder / ADAPTER_CONFIG).is_file(), spec)
        say(f"{refusal.message}: {repository} is taken from the cache as it was at {cached.commit[:12]}")
        return cached
    _require_adapter(adapters_only, ADAPTER_CONFIG in sizes, spec)
    names = _wanted(sizes, spec)
    say(f"{spec} is commit {commit[:12]}: {len(names)} files, {sum(sizes[n] for n in names) / 1e6:,.1f} MB")
    found = _download(spec, repository, revision, names, sum(sizes[n] for n in names))
    for name in names:
        if digests.get(name) and file_sha256(found.folder / name) != digests[name]:
            raise ModelError(
                f"{name} is not the file that the hub lists: its SHA-256 is another one",
                where=spec,
                help=f"delete {(found.folder / name).resolve()} and run the same command again",
            )
    return found


def cached_repository(repository: str, revision: str | None) -> HubFiles | None:
    """The repository as the local cache has it, whole, at a commit or at what a branch meant last; else None."""
    _quiet()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(
                repository, revision=revision, local_files_only=True, allow_patterns=list(TEXT_FILES)
            )
        )
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return HubFiles(repository, folder.name, folder) if _is_whole(folder) else None


def _quiet() -> None:
    """No telemetry, progress bars or warnings of the library's, also where something imported it before."""
    for name in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "HF_HUB_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    from huggingface_hub import constants
    from huggingface_hub.utils import disable_progress_bars, logging  # type: ignore[attr-defined]

    constants.HF_HUB_DISABLE_TELEMETRY = True
    disable_progress_bars()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]


def _is_whole(folder: Path) -> bool:
    """Whether the weights that a snapshot's config needs are all there: a download may have been stopped."""
    import json

    if (folder / ADAPTER_CONFIG).is_file():
        return (folder / "adapter_model.safetensors").is_file()
    if (folder / INDEX).is_file():
        try:
            weights = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, LookupError, AttributeError):
            return False
        return all((folder / str(name)).is_file() for name in weights)
    return any(folder.glob("*.safetensors"))


def _require_adapter(adapters_only: bool, is_adapter: bool, spec: str) -> None:
    if adapters_only and not is_adapter:
        raise UsageError(
            "is a whole model, not an adapter: there is nothing to merge",
            where=spec,
            help=f"myna export {spec} --quantize Q4_K_M",
        )


# What is fetched


def _listing(repository: str, revision: str | None) -> tuple[str, dict[str, int], dict[str, str]]:
    """(commit, file → bytes, file → SHA-256 where the hub has one) of a revision, folders below left out."""
    from huggingface_hub import HfApi, constants

    info = HfApi().model_info(
        repository, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
    )
    files = [file for file in info.siblings or [] if "/" not in file.rfilename]
    digests = {file.rfilename: file.lfs.sha256 for file in files if file.lfs is not None}
    return str(info.sha), {file.rfilename: file.size or 0 for file in files}, digests


def _wanted(names: Mapping[str, int], spec: str) -> list[str]:
    """The files to fetch; ModelError, with what there is instead, where no safetensors are among them."""
    weights = _weights(list(names))
    if weights:
        return sorted({*weights, *(name for name in TEXT_FILES if name in names)})
    pickled = [name for name in names if name.endswith(PICKLED)]
    if pickled:
        raise ModelError(
            f"has pickled weights only ({pickled[0]}), which run code when they are read: they are never loaded",
            where=spec,
            help="a revision with *.safetensors (refs/pr/… often has them), or save it once elsewhere with "
            "save_pretrained(safe_serialization=True) and name that folder",
        )
    files = sorted(name for name in names if name.endswith(".gguf"))
    if files:
        repository = spec.removeprefix(PREFIX).partition("@")[0]
        raise ModelError(
            f"has GGUF files only ({files[0]})",
            where=spec,
            help=f"`hf download {repository} {files[0]} --local-dir .`, then name the file",
        )
    raise ModelError("has no *.safetensors: it is no model and no adapter", where=spec)


def _weights(names: Sequence[str]) -> list[str]:
    """One set of weights: some repositories keep the same ones twice, whole and under a maker's own names."""
    if ADAPTER_CONFIG in names:
        return [name for name in names if name == "adapter_model.safetensors"]
    if "model.safetensors" in names:
        return ["model.safetensors"]
    shards = [name for name in names if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)]
    return shards or [name for name in names if name.endswith(".safetensors")]


def _download(
    spec: str, repository: str, revision: str | None, names: Sequence[str], num_bytes: int
) -> HubFiles:
    from huggingface_hub import constants, snapshot_download

    require_room(Path(constants.HF_HUB_CACHE), num_bytes, f"{repository} in huggingface_hub's cache")
    try:
        folder = snapshot_download(
            repository, revision=revision, allow_patterns=[glob.escape(name) for name in names]
        )
    except _network_errors() as error:
        raise _refusal(error, spec, revision) from None
    found = HubFiles(repository, Path(folder).name, Path(folder))
    missing = [name for name in names if not (found.folder / name).is_file()]
    if missing:
        raise ModelError(
            f"changed while it was fetched: {missing[0]} is gone",
            where=spec,
            help="run the same command again",
        )
    return found


# What the hub says, in one line


def _network_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub lets through: its own, those of its HTTP client (httpx, or what it is called now), the disk's."""
    from huggingface_hub import errors

    client: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]
    return (client, errors.XetDownloadError, OSError)


def _refusal(error: Exception, spec: str, revision: str | None) -> MynaError:
    """A failure of the hub's or the network's as one of ours: ModelError for no, MachineError for not now."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        return _refusal(error.__cause__, spec, revision)
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return ModelError(
            f"is gated: its owner gives it to those who ask (HTTP {status})",
            where=spec,
            help=f"accept the terms on the repository's page; {LOGIN}",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelError(
            f"the repository has no revision {revision or 'main'}",
            where=spec,
            help="a branch, a tag or a whole commit; its page lists them",
        )
    if isinstance(error, errors.EntryNotFoundError):
        return ModelError("a file that the hub lists is not there", where=spec, help="another revision")
    if status is not None:
        return _status_refusal(int(status), getattr(error, "response", None), spec)
    return _broken(error, spec)


_NO = {
    401: ("the hub wants to know who asks (HTTP 401): it is private, or there is none of this name", LOGIN),
    403: ("the hub does not give it to you (HTTP 403): it is private or gated", LOGIN),
    404: (
        "the hub has no repository of this name (HTTP 404), or it is private",
        f"look at the spelling; {LOGIN}",
    ),
    429: (
        "the hub asks to wait (HTTP 429)",
        f"run the same command later; {LOGIN}: more requests are allowed then",
    ),
}


def _status_refusal(status: int, response: Any, spec: str) -> MynaError:
    what, cure = _NO.get(
        status,
        (f"the hub fails (HTTP {status})", "run the same command later; what was fetched whole is kept"),
    )
    if status == 429 or status >= 500:
        wait = response.headers.get("Retry-After") or ""
        asked = f": again in {wait} s" if wait.isdigit() else f": {wait}" if wait else ""
        return MachineError(what + asked, where=spec, help=cure)
    return ModelError(what, where=spec, help=cure)


def _broken(error: Exception, spec: str) -> MynaError:
    """No answer, or half of one."""
    kind = type(error).__name__
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return MachineError(
            f"the disk is full: {error.strerror}",
            where=error.filename or spec,
            help="free some room, or set HF_HOME to a folder on another disk; what was fetched whole is kept",
        )
    if kind == "OfflineModeIsEnabled":
        return MachineError(
            "HF_HUB_OFFLINE is set, and it is not in the local cache", where=spec, help="unset HF_HUB_OFFLINE"
        )
    if "Connect" in kind or ("Timeout" in kind and "Read" not in kind):
        return MachineError(
            "the hub cannot be reached, and it is not in the local cache",
            where=spec,
            help="connect once, or put the model in a folder and name that folder",
        )
    if "Timeout" in kind:
        return MachineError("the hub does not answer in time", where=spec, help="run the same command again")
    reason = str(error).strip().splitlines()[0] if str(error).strip() else kind
    return MachineError(
        f"the connection to the hub broke: {reason}",
        where=spec,
        help="the same command goes on: what was fetched whole is kept",
    )
