"""Where llama.cpp's encoder is: prebuilt libraries that packages bring, tried in order until one passes its test.

Nothing is imported from these packages (importing one starts a backend); their files are loaded through ctypes.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from myna.errors import MachineError

# The release whose encoder was tried; `pyproject.toml` pins the same.
XLLAMACPP = "xllamacpp==2026.10.11549"


@dataclass(frozen=True)
class Package:
    """A package that brings the encoder: what pip installs, the folder it makes, and its files that may hold it."""

    requirement: str
    folder: str
    files: tuple[str, ...]


# In the order they are tried. The second is built against glibc 2.38 on Linux; it has what the first lacks on Windows.
PACKAGES = (
    Package(XLLAMACPP, "xllamacpp", ("xllamacpp*.so", "xllamacpp*.pyd")),
    Package(
        "llama-cpp-py-sync==0.11739",
        "llama_cpp_py_sync",
        ("libggml-base.so*", "libggml-base*.dylib", "*ggml-base*.dll"),
    ),
)


@dataclass(frozen=True)
class Found:
    """A library that encodes, and where it is."""

    package: Package
    path: Path
    library: ctypes.CDLL


def find_library(test: Callable[[ctypes.CDLL], None]) -> Found:
    """The first library of PACKAGES that loads and passes `test`; MachineError with each one's reason where none does."""
    refused = []
    for package in PACKAGES:
        try:
            path = _library_path(package)
            library = load_library(path)
            test(library)
        except MachineError as error:
            refused.append(f"{package.requirement}: {error.message}")
        else:
            return Found(package, path, library)
    raise MachineError(
        f"no library here can quantize ({'; '.join(refused)})",
        help=f"{' or '.join(_install(package) for package in PACKAGES)}; F32, F16 and BF16 need no library",
    )


def load_library(path: Path) -> ctypes.CDLL:
    """A llama.cpp library with what `encode` calls declared; MachineError where it does not load or lacks a function."""
    try:
        library = ctypes.CDLL(str(path))
        quantize, row_size, validate = (
            getattr(library, name)
            for name in ("ggml_quantize_chunk", "ggml_row_size", "ggml_validate_row_data")
        )
    except (OSError, AttributeError) as error:
        raise MachineError(f"it does not load as an encoder: {error}", where=str(path)) from error
    whole, pointer = ctypes.c_int64, ctypes.c_void_p
    quantize.restype, row_size.restype, validate.restype = ctypes.c_size_t, ctypes.c_size_t, ctypes.c_bool
    quantize.argtypes = [ctypes.c_int, pointer, pointer, whole, whole, whole, pointer]
    row_size.argtypes = [ctypes.c_int, whole]
    validate.argtypes = [ctypes.c_int, pointer, ctypes.c_size_t]
    return library


def _library_path(package: Package) -> Path:
    files = [file for pattern in package.files for file in _matches(package.folder, pattern)]
    if not files:
        raise MachineError("it is not installed")
    return files[0]


def _matches(folder: str, pattern: str) -> Iterator[Path]:
    spec = importlib.machinery.PathFinder.find_spec(folder, sys.path)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        yield from sorted(Path(place).glob(pattern))


def _install(package: Package) -> str:
    return f"pip install --force-reinstall --no-deps {package.requirement}"
