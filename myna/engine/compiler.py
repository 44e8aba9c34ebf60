"""This machine's C compiler, and the kernels it made, in the cache. Torch is not needed here: `myna doctor` looks too."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from myna.model.sources import cache_dir

SOURCES = ("native.c", "native_attention.h", "native_typed.h", "native_low_rank.h", "native_products.h")
SOURCE_FOLDER = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-std=gnu11")
COMPILERS = ("gcc", "clang", "cc")
COMPILE_SECONDS = 120


class NotNative(Exception):
    """Why there are no C kernels here, in words for the user."""


@dataclass(frozen=True)
class CompiledKernels:
    """A library in the cache, and the first line that its compiler says of itself."""

    path: Path
    compiler: str


def find_compiler() -> list[str]:
    """The command of a C compiler: $CC, or the first of gcc, clang, cc, or the package ziglang's. NotNative if none."""
    asked = _asked()
    if asked and shutil.which(asked[0]) is None:
        raise NotNative(f"CC is {asked[0]}, which is no program here")
    if asked:
        return asked
    found = next((name for name in COMPILERS if shutil.which(name)), None)
    if found:
        return [found]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "cc"]
    raise NotNative(f"there is no C compiler ({', '.join(COMPILERS)}, or pip install ziglang)")


def _asked() -> list[str]:
    return shlex.split(os.environ.get("CC", ""))


def compile_cure() -> str:
    """What gives this system a compiler."""
    asked = _asked()
    if asked and shutil.which(asked[0]) is None:
        return "unset CC"
    if sys.platform == "darwin":
        return "xcode-select --install"
    if sys.platform == "linux" and shutil.which("apt-get"):
        return "apt-get install gcc libc6-dev"
    return "pip install ziglang"


def compiled_kernels(folder: Path = SOURCE_FOLDER, flags: Sequence[str] = FLAGS) -> CompiledKernels:
    """The library of the sources in `folder`: from the cache, else compiled into it (about two seconds).

    One library for each text, compiler, flags and kind of CPU. Its digest lies beside it and is looked at first: to load
    half a library would end the process. NotNative where there is no compiler, it fails, or the cache may not be written.
    """
    command = find_compiler()
    version = _run([*command, "--version"]).partition("\n")[0]
    told = [*(str(flag) for flag in flags), version, _abilities()]
    text = b"\0".join([*((folder / name).read_bytes() for name in SOURCES), *map(str.encode, told)])
    path = cache_dir() / "native" / f"{hashlib.sha256(text).hexdigest()[:24]}.so"
    try:
        if not _is_whole(path):
            _compile([*command, *flags], folder, path)
    except OSError as error:
        raise NotNative(f"the kernels can't be kept in {path.parent}: {error}") from error
    return CompiledKernels(path, version)


def _compile(command: Sequence[str], folder: Path, path: Path) -> None:
    """Beside its name, then renamed: another process may be at the same work, or have the old file loaded."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        made, digest = Path(temporary) / path.name, Path(temporary) / _digest_path(path).name
        _run([*command, "-shared", "-fPIC", "-o", str(made), str(folder / SOURCES[0]), "-lm"])
        if not made.is_file():
            raise NotNative(f"{shlex.join(command)} made no library, and says nothing")
        digest.write_text(_digest(made), encoding="utf-8")
        os.replace(made, path)
        os.replace(digest, _digest_path(path))


def _is_whole(path: Path) -> bool:
    digest = _digest_path(path)
    return path.is_file() and digest.is_file() and digest.read_bytes().decode("latin-1") == _digest(path)


def _digest_path(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _run(command: Sequence[str]) -> str:
    """What the compiler says on standard output; NotNative with its first error line where it fails."""
    name = shlex.join(command[: 4 if "ziglang" in command else 1])
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=COMPILE_SECONDS, check=True
        )
    except subprocess.CalledProcessError as error:
        lines = [line.strip() for line in error.stderr.splitlines() if line.strip()]
        said = next((line for line in lines if "error" in line), lines[0] if lines else "it says nothing")
        raise NotNative(f"{name} failed with {error.returncode}: {said}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotNative(f"{name} could not be run: {error}") from error
    return done.stdout


def _abilities() -> str:
    """What the library is compiled for: another CPU on a shared cache compiles its own."""
    info = Path("/proc/cpuinfo")
    first = info.read_text(encoding="utf-8", errors="replace").split("\n\n")[0] if info.is_file() else ""
    pairs = (line.partition(":") for line in first.splitlines())
    lines = {name.strip(): value.strip() for name, _, value in pairs}
    told = lines.get("flags") or lines.get("Features") or platform.processor()
    return f"{platform.machine()} {lines.get('model name', '')} {told}"
