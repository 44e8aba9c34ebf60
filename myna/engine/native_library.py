"""The library that this machine's compiler made, loaded into this process."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from myna.engine.compiler import NotNative, compiled_kernels


@dataclass(frozen=True)
class NativeLibrary:
    """A compiled library and what it was compiled by."""

    path: Path
    compiler: str
    functions: Any


@functools.cache
def native_library() -> NativeLibrary:
    """The compiled library, loaded into this process."""
    made = compiled_kernels()
    return load_library(made.path, made.compiler)


def load_library(path: Path, compiler: str) -> NativeLibrary:
    """NotNative where the system refuses the file."""
    try:
        functions = ctypes.CDLL(str(path))
    except OSError as error:
        raise NotNative(f"{path} does not load: {error}") from error
    return NativeLibrary(path, compiler, functions)
