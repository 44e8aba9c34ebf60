"""Threads and number formats: how many cores this process may use, and what they are fast at."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# OpenMP's default is to spin at barriers: with one busy neighbour on two cores that made a step seven times slower.
# It is read when torch is first loaded, so the command line sets it before anything else.
PASSIVE_WAIT = {"OMP_WAIT_POLICY": "PASSIVE"}


def usable_cores() -> int:
    """Physical or virtual cores this process may use: its affinity, cut to a container's quota (Linux cgroup v2)."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else (os.cpu_count() or 1)
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        limit, period = quota.read_text().split()[:2]
        if limit != "max":
            cores = min(cores, max(1, int(limit) // int(period)))
    return cores


def fast_in_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX)."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text() if info.is_file() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags
