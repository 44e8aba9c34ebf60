"""Memory: what this machine has, what this process holds and held at most, and giving back what it no longer holds."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

MOST_EXCESS = 1.2  # growth over what a step needs, at which freed memory is given back
LEAST_NEED_MB = 50.0  # of a step: less is not worth giving back


def total_memory_mb(device: str = "cpu") -> float:
    """All memory of the device in MB (10⁶ bytes), cut to a container's limit (Linux cgroup v2); never what is free now."""
    if device == "cuda":
        import torch

        return float(torch.cuda.get_device_properties(0).total_memory) / 1e6
    total = int(psutil.virtual_memory().total)
    limit = Path("/sys/fs/cgroup/memory.max")
    told = limit.read_text().strip() if limit.is_file() else "max"
    return (total if told == "max" else min(total, int(told))) / 1e6


def memory_mb() -> float:
    """What this process holds now, in MB (10⁶ bytes)."""
    return float(psutil.Process().memory_info().rss) / 1e6


def peak_memory_mb() -> float:
    """The most memory this process ever held, in MB (10⁶ bytes); the present one where the OS does not say."""
    if sys.platform == "win32":
        return float(psutil.Process().memory_info().peak_wset) / 1e6
    status = Path("/proc/self/status")
    if status.is_file():
        # getrusage's peak is handed on by the process that started this one, however large that was
        found = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024 / 1e6
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def give_back_memory() -> None:
    """Returns freed memory to the OS (glibc's malloc_trim; elsewhere nothing)."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


class FreedMemory:
    """Freed memory, which goes back to the OS once it is more than the next step will ask for again.

    What a step leaves is what the next one uses, and to give it back each time would cost several percent. But between
    what steps free and ask for again lies ever more that lives on (oneDNN's kernels of new shapes), so that pieces no longer
    fit and more is asked of the OS than any step needs.
    """

    def __init__(self) -> None:
        self._base_mb, self._need_mb, self._is_first = memory_mb(), LEAST_NEED_MB, True

    def give_back_excess(self) -> None:
        """To be called after each step. The steps that come first after memory was given back tell what a step needs."""
        grown_mb = memory_mb() - self._base_mb
        if self._is_first:
            self._need_mb, self._is_first = max(self._need_mb, grown_mb), False
        elif grown_mb > MOST_EXCESS * self._need_mb:
            give_back_memory()
            self._base_mb, self._is_first = memory_mb(), True


@contextlib.contextmanager
def collector_at_rest() -> Iterator[None]:
    """Inside, Python's garbage collector runs when it is called and not by itself.

    Left alone it looks through every object of torch and transformers many times a step, and finds nothing. What is there at
    the beginning is never looked at again (gc.freeze); afterwards all is as it was.
    """
    was_on, is_first = gc.isenabled(), not gc.get_freeze_count()
    gc.collect()
    if is_first:
        gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        if is_first:
            gc.unfreeze()
        if was_on:
            gc.enable()


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
