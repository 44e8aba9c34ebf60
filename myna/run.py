"""Run: the directory contract. Everything a stage leaves for the next is a file in here, written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from myna.errors import DataError, MachineError, UsageError

RUNS_DIR = Path("runs")
OF_DESKTOPS = ("Thumbs.db", "desktop.ini")  # besides names with a dot in front: nothing of ours


@dataclass(frozen=True)
class Run:
    """The files of one run, by name. `path` is the folder runs/NAME."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def recipe_path(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def plan_path(self) -> Path:
        return self.path / "plan.json"

    @property
    def tokenizer_dir(self) -> Path:
        return self.path / "tokenizer"

    @property
    def test_path(self) -> Path:
        return self.path / "rows" / "test.jsonl"

    @property
    def validation_path(self) -> Path:
        return self.path / "rows" / "validation.jsonl"

    @property
    def quarantine_path(self) -> Path:
        return self.path / "rows" / "quarantine.jsonl"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints_dir(self) -> Path:
        return self.path / "checkpoints"

    @property
    def asked_path(self) -> Path:
        """A file that asks for a checkpoint: `touch RUN/checkpoint-now`."""
        return self.path / "checkpoint-now"

    @property
    def adapter_dir(self) -> Path:
        return self.path / "adapter"

    @property
    def merged_dir(self) -> Path:
        return self.path / "merged"

    @property
    def gguf_dir(self) -> Path:
        return self.path / "gguf"

    @property
    def parity_path(self) -> Path:
        return self.path / "parity.json"

    @property
    def evaluation_path(self) -> Path:
        return self.path / "evaluation.json"

    @property
    def report_path(self) -> Path:
        return self.path / "report.html"

    def gguf_path(self, file_type: str) -> Path:
        return self.gguf_dir / f"{self.name}-{file_type}.gguf"

    def exists(self) -> bool:
        return (self.path / "run.json").is_file()

    def info(self) -> dict[str, Any]:
        """run.json: name, base, data, versions, stages."""
        return read_json(self.path / "run.json")

    def stage(self, name: str) -> dict[str, Any] | None:
        """What a finished stage wrote about itself, or None where it is not done."""
        entry = self.info()["stages"].get(name)
        assert entry is None or isinstance(entry, dict)
        return entry

    def require_stage(self, name: str, command: str) -> dict[str, Any]:
        """The entry of a stage that another one needs; UsageError naming the command where it is not done."""
        entry = self.stage(name)
        if entry is None:
            raise UsageError(f"the stage {name} is not done in this run", where=str(self.path), help=command)
        return entry

    def finish_stage(self, name: str, entry: Mapping[str, Any], files: Sequence[Path] = ()) -> None:
        """Enters a finished stage into run.json, with the digests of the files (or whole folders) that it wrote."""
        info = self.info()
        info["stages"][name] = {**entry, "done": timestamp()}
        self._write_digests(info, files)

    def record(self, files: Sequence[Path]) -> None:
        """Enters digests of files that are no stage's own."""
        self._write_digests(self.info(), files)

    def _write_digests(self, info: dict[str, Any], files: Sequence[Path]) -> None:
        """A folder is entered as it is now: what it held before, and no longer does, is not missed."""
        within = tuple(f"{path.relative_to(self.path).as_posix()}/" for path in files)
        others = {n: d for n, d in info.get("digests", {}).items() if not n.startswith(within)}
        info["digests"] = others | self.digests(files)
        write_json(self.path / "run.json", info)

    def forget_stages(self, files: Sequence[Path]) -> None:
        """Drops all stages, and the digests of their files (or whole folders)."""
        info = self.info()
        names = tuple(path.relative_to(self.path).as_posix() for path in files)
        within = tuple(f"{name}/" for name in names)
        digests = {
            n: d for n, d in info.get("digests", {}).items() if n not in names and not n.startswith(within)
        }
        write_json(self.path / "run.json", info | {"stages": {}, "digests": digests})

    def digests(self, files: Sequence[Path]) -> dict[str, str]:
        """SHA-256 of files, and of all files in folders, by their path in the run."""
        found = [file for path in files for file in (folder_files(path) if path.is_dir() else [path])]
        return {file.relative_to(self.path).as_posix(): file_sha256(file) for file in found}


def find_run(text: str) -> Run:
    """The run that `text` names: a path, or a name under ./runs. UsageError where there is none."""
    for path in (Path(text), RUNS_DIR / text):
        if Run(path).exists():
            return Run(path)
    known = sorted(p.parent.name for p in RUNS_DIR.glob("*/run.json"))
    cure = f"runs here: {', '.join(known)}" if known else "`myna run recipe.yaml` makes one"
    raise UsageError(f"{text} is no run: neither a run directory nor a name under ./runs", help=cure)


def run_files(run: Run) -> dict[str, Any]:
    """The exported files of a run: file type → {path, bytes, sha256, types}."""
    files = (run.stage("export") or {}).get("files", {})
    assert isinstance(files, dict)
    return files


def folder_files(folder: Path) -> list[Path]:
    """All files in a folder and below it, without those that a desktop leaves everywhere."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".") and path.name not in OF_DESKTOPS
    )


def run_path(name: str) -> Path:
    """Where a run of this name lies: ./runs/NAME, or the path itself where the name is one."""
    if ".." in Path(name).parts:
        raise UsageError(
            f"{name}: a run.name has no .. in it", help="--set run.name=NAME, or a path without .."
        )
    return Path(name) if os.sep in name or "/" in name else RUNS_DIR / name


# Files


def timestamp() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; DataError naming the file where it is missing or broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError("there is no such file", where=str(path)) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"is not JSON: {error}", where=str(path)) from None
    if not isinstance(value, dict):
        raise DataError("is no JSON object", where=str(path))
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """As `write_lines`."""
    write_lines(path, [text])


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Writes beside the name, syncs, renames: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise disk_error(error, path) from error
    except BaseException:  # an interrupt
        temporary.unlink(missing_ok=True)
        raise
    sync_dir(path.parent)


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yields a folder beside `path` to fill; on success everything in it is synced and the folder takes the name.

    A folder that was there is replaced: it is .old-NAME until the new one has the name (`put_back` knows what to do with
    one that a kill left). On any failure nothing stands under the name that was not there before. MachineError where it
    cannot be written.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".tmp-{path.name}-", dir=path.parent))
        temporary.chmod(0o755)
        yield temporary
        sync_tree(temporary)
        old = path.with_name(f".old-{path.name}")
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        sync_dir(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        put_back(path)
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if type(error).__name__ == "SafetensorError":  # what safetensors makes of a full disk
            raise disk_error(OSError(str(error)), path) from error
        if isinstance(error, OSError):
            raise disk_error(error, path) from error
        raise


def put_back(path: Path) -> None:
    """Gives a folder its name again that it lost to a new one which then never came."""
    old = path.with_name(f".old-{path.name}")
    if old.is_dir() and not path.exists():
        with contextlib.suppress(OSError):
            os.replace(old, path)


def sync_tree(folder: Path) -> None:
    """Syncs every file and folder below `folder`, and itself last."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_file():
            sync_file(path)
        elif path.is_dir():
            sync_dir(path)
    sync_dir(folder)


def sync_file(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_dir(path: Path) -> None:
    """Syncs a directory entry; Windows cannot, and there a rename is as durable as it gets."""
    if sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def tree_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def require_room(path: Path, num_bytes: int, what: str) -> None:
    """MachineError where the disk that holds `path` has less than `num_bytes` free."""
    folder = path.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise MachineError(
            f"no room for {what}: it takes {_shown(num_bytes)} and {_shown(free)} are free",
            where=str(folder),
            help="free some room there, or run in a folder on another disk",
        )


def _shown(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.0f} MB" if num_bytes >= 1e6 else f"{num_bytes / 1e3:,.0f} KB"


def disk_error(error: OSError, path: Path) -> MachineError:
    """What a failed write is told as."""
    return MachineError(
        f"could not be written: {error.strerror or error}",
        where=str(path),
        help="look at the free room and the permissions of that folder, then run the same command again",
    )
