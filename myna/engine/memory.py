"""Memory: what this process has held at most, and giving back to the OS what it no longer holds."""

from __future__ import annotations

import ctypes
import functools
import gc
import sys
from collections.abc import Callable

import psutil


def peak_memory_mb() -> float:
    """The most memory this process ever held, in MB (10⁶ bytes); the present one where the OS does not say."""
    if sys.platform == "win32":
        return float(psutil.Process().memory_info().peak_wset) / 1e6
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def give_back_memory() -> None:
    """Returns freed memory to the OS (glibc's malloc_trim; elsewhere nothing).

    Packs differ from step to step, so what one step frees does not always fit the next.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


def forget_models() -> None:
    """Between stages: what is no longer referred to is collected, and its memory goes back to the OS."""
    gc.collect()
    give_back_memory()


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    if sys.platform != "linux":
        return None
    function = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if function is None:
        return None
    function.argtypes, function.restype = [ctypes.c_size_t], ctypes.c_int
    return lambda size: int(function(size))
