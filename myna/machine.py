"""The machine as `myna doctor` finds it: cores, what they can do, compiler, memory, disks, GPUs. Imports nothing heavy."""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from myna.engine.compiler import NotNative, compile_cure, find_compiler
from myna.engine.threads import fast_in_bfloat16, fast_in_int8, usable_cores
from myna.model.sources import cache_dir

Status = Literal["ok", "warn", "missing"]

# What `myna demo` takes on the packaged base, rounded up: the largest process, the cache, the run.
DEMO_MEMORY: Final = 2_500_000_000
DEMO_CACHE: Final = 1_000_000_000
DEMO_RUN: Final = 1_500_000_000
ABILITIES: Final = {
    "avx2": ("avx2",),
    "avx512": ("avx512f",),
    "avx512_bf16": ("avx512_bf16",),
    "avx512_vnni": ("avx512_vnni", "avx_vnni"),
    "amx": ("amx_tile",),
    "neon": ("asimd",),
    "arm_bf16": ("bf16",),
    "arm_i8mm": ("i8mm",),
    "sve": ("sve",),
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `value` is the bare fact, for programs; `cure` says what to do where it is not ok."""

    name: str
    status: Status
    text: str
    value: Any = None
    cure: str | None = None
    is_core: bool = False


def look_at_machine() -> Iterator[Finding]:
    """What is here, in the order it is shown."""
    yield _system()
    yield from _cores()
    yield check_compiler()
    yield _memory()
    yield from _disks()
    yield from _gpus()


def _system() -> Finding:
    libc = " ".join(part for part in platform.libc_ver() if part)
    text = f"{platform.system()} {platform.release()}, {platform.machine()}{', ' + libc if libc else ''}"
    return Finding("system", "ok", text, {"platform": platform.platform(), "libc": libc or None})


def _cores() -> Iterator[Finding]:
    import psutil

    usable, present = usable_cores(), psutil.cpu_count() or 0
    text = f"{usable} of {present} cores may be used" if usable < present else f"{usable} cores"
    value = {"usable": usable, "present": present, "physical": psutil.cpu_count(logical=False)}
    yield Finding("cores", "ok", text, value)
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        yield Finding("abilities", "ok", "what the cores can do is not told by this system")
        return
    yield check_abilities(info.read_text(encoding="utf-8", errors="replace"))


def check_abilities(cpuinfo: str) -> Finding:
    """What /proc/cpuinfo (Linux) says the cores can do, by the names of `ABILITIES`."""
    lines = re.findall(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    flags = set(lines[0].split()) if lines else set()
    found = [name for name, any_of in ABILITIES.items() if flags & {*any_of}]
    if "avx2" not in found and "neon" not in found:
        cure = "a machine with AVX2 (x86 since 2013) or NEON trains and answers several times faster"
        return Finding("abilities", "warn", "the cores have neither AVX2 nor NEON", found, cure)
    dtype = "bf16" if fast_in_bfloat16(cpuinfo) else "fp32"
    why = " (they are slower in bf16)" if dtype == "fp32" and "avx512_bf16" in found else ""
    text = f"{', '.join(found)}; on these cores training computes in {dtype} by default{why}"
    if not fast_in_int8(cpuinfo):
        text += ", and multiplies int8 weights in fp32 (they are slow at integers)"
    return Finding("abilities", "ok", text, found)


def check_compiler() -> Finding:
    """Which compiler would make the C kernels of training; nothing is compiled to find out."""
    try:
        command = shlex.join(find_compiler())
    except NotNative as error:
        return no_kernels(error)
    text = (
        f"C kernels for training: compiled by {command} at their first use; `myna doctor --bench` tries them"
    )
    return Finding("kernels", "ok", text, command)


def no_kernels(why: NotNative) -> Finding:
    """Training goes on without them."""
    text = f"no C kernels: {why}; training runs on torch's own: the same answers, slower"
    return Finding("kernels", "warn", text, None, compile_cure())


def memory_room() -> tuple[int, int]:
    """(free, total) in bytes, of the container where it has a limit of its own."""
    import psutil

    free, total = psutil.virtual_memory().available, psutil.virtual_memory().total
    limit = _container_room()
    return (free, total) if limit is None else (min(free, limit[0]), min(total, limit[1]))


def _memory() -> Finding:
    free, total = memory_room()
    text = f"memory: {gigabytes(free)} of {gigabytes(total)} free"
    return _room_finding(
        "memory", text, free, DEMO_MEMORY, "close what uses memory, or lower train.pack_tokens"
    )


def _container_room() -> tuple[int, int] | None:
    """(free, limit) in bytes where a container (Linux cgroup v2) has a limit of its own."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
    except OSError:
        return None
    return None if limit == "max" else (max(0, int(limit) - used), int(limit))


def _disks() -> Iterator[Finding]:
    """Room where runs are written (here) and in the cache, each with what the demo takes of it."""
    cure = "free some room there, or run in a folder on another disk"
    yield check_disk("disk:here", Path.cwd(), DEMO_RUN, cure)
    yield check_disk("disk:cache", cache_dir(), DEMO_CACHE, "free some room there, or set MYNA_CACHE")


def check_disk(name: str, folder: Path, needed: int, cure: str) -> Finding:
    """Free room of the disk that holds `folder`, which need not be there yet, and whether it may be written."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        return Finding(name, "warn", f"{there} may not be written", 0, cure)
    free = shutil.disk_usage(there).free
    return _room_finding(name, f"disk of {folder}: {gigabytes(free)} free", free, needed, cure)


def _room_finding(name: str, text: str, free: int, needed: int, cure: str) -> Finding:
    if free >= needed:
        return Finding(name, "ok", text, free)
    return Finding(name, "warn", f"{text}; `myna demo` takes {gigabytes(needed)}", free, cure)


def gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.1f} GB"


def _gpus() -> Iterator[Finding]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        yield Finding("gpu", "ok", "no NVIDIA GPU: everything runs on the CPU", [])
        return
    query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (subprocess.SubprocessError, OSError) as error:
        yield Finding("gpu", "warn", f"nvidia-smi does not answer: {error}", [], "look at the driver")
        return
    found = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    yield Finding("gpu", "ok", f"GPU: {'; '.join(found) or 'none'}", found)
