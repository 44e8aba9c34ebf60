"""Threads and number formats: how many cores this process may use, and what they are fast at."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

# How long a thread spins at a barrier before it sleeps (GNU OpenMP, which torch and llama.cpp have on Linux). The default,
# spin on, made a step several times slower beside one busy process; not to spin at all made it a quarter slower on a
# quiet machine and llama.cpp half as fast. It is read when torch is loaded, so the command line sets it first of all.
BRIEF_SPIN = {"GOMP_SPINCOUNT": "1000"}
INT8_FLAGS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})
OPENMP_NAMES = ("libgomp", "libomp", "libiomp")


def usable_cores() -> int:
    """Physical or virtual cores this process may use: its affinity, cut to a container's quota (Linux cgroup v2)."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else (os.cpu_count() or 1)
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        limit, period = quota.read_text().split()[:2]
        if limit != "max":
            cores = min(cores, max(1, int(limit) // int(period)))
    return cores


def fast_in_bfloat16(cpuinfo: str | None = None) -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32, by what /proc/cpuinfo (Linux) says of it.

    AMX does; so does AVX512-BF16 on AMD's, twice as fast (measured). Intel's are half as fast with it as in float32
    (measured on one whose AMX the hypervisor hides).
    """
    cpuinfo = _cpuinfo() if cpuinfo is None else cpuinfo
    return "amx_bf16" in cpuinfo or ("avx512_bf16" in cpuinfo and "GenuineIntel" not in cpuinfo)


def fast_in_int8(cpuinfo: str | None = None) -> bool:
    """Whether torch multiplies int8 faster than float32 on this CPU, by what /proc/cpuinfo (Linux) says of it.

    With instructions for sums of int8 products (`INT8_FLAGS`) it does, several times as fast (measured on Intel's and AMD's
    servers with AVX512-VNNI). Without any it is many times slower (1 GFLOP/s against 43 in float32, measured on a busy AMD
    server with AVX2). What was not measured, ARM and AVX-512 without VNNI among it, counts as slow: float32 is slow nowhere.
    """
    flags = (_cpuinfo() if cpuinfo is None else cpuinfo).split()
    return not INT8_FLAGS.isdisjoint(flags)


def _cpuinfo() -> str:
    """What Linux tells of the CPU; nothing elsewhere."""
    info = Path("/proc/cpuinfo")
    return info.read_text(encoding="utf-8", errors="replace") if info.is_file() else ""


def gomp_parallel() -> int | None:
    """The address of GOMP_parallel in the OpenMP library that torch has loaded into this process, if it has one."""
    import torch

    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return None
    paths = {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines() if "/" in line}
    candidates = sorted(p for p in paths if Path(p).name.startswith(OPENMP_NAMES))
    ours = Path(torch.__file__).parent
    for path in sorted(candidates, key=lambda p: not Path(p).is_relative_to(ours)):
        function = getattr(ctypes.CDLL(path), "GOMP_parallel", None)
        if function is not None:
            return ctypes.cast(function, ctypes.c_void_p).value
    return None
