"""Where a benchmark ran: machine, versions, checkout, command; and where its pages are kept."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
from _children import ROOT, run_child

from myna.engine.threads import usable_cores

RESULTS_DIR = ROOT / "benchmarks" / "results"
# what decides how fast a CPU trains
FLAGS = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "avx_vnni",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "bf16",
    "i8mm",
)
LIBRARIES = ("torch", "transformers", "peft", "trl")


def machine() -> str:
    """One line: processor, cores, flags, memory, system."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.is_file() else ""
    fields = dict(line.split("\t:", 1) for line in _tidy(text))
    model = fields.get("model name", platform.processor() or platform.machine()).strip()
    present = set(fields.get("flags", fields.get("Features", "")).split())
    flags = " ".join(flag for flag in FLAGS if flag in present)
    memory = f"{psutil.virtual_memory().total / 1e9:.0f} GB"
    return f"{model}, {usable_cores()} cores ({flags}), {memory} · {platform.system()}, Python {platform.python_version()}"


def _tidy(text: str) -> list[str]:
    """Lines `name TAB… : value` with one tab before the colon, as /proc/cpuinfo has them by name's length."""
    named = [line.partition(":") for line in text.splitlines() if ":" in line]
    return [f"{name.strip()}\t:{value}" for name, _, value in named]


def versions(python: str | Path) -> dict[str, str]:
    """Of the libraries that are installed for that interpreter."""
    program = (
        "import importlib.metadata as m, json\n"
        f"found = {{d.metadata['Name']: d.version for d in m.distributions() if d.metadata['Name'] in {LIBRARIES!r}}}\n"
        "print(json.dumps(found))"
    )
    found: dict[str, str] = json.loads(run_child([python, "-c", program], cwd=ROOT).stdout)
    return {name: found[name] for name in LIBRARIES if name in found}


def commit() -> str:
    """The checkout, `+changes` where it has some (results aside); "no git checkout" where it is none."""
    status = ["git", "status", "--porcelain", "--", ".", ":!benchmarks/results"]
    try:
        head = _git(["git", "rev-parse", "--short=12", "HEAD"])
        return head + ("+changes" if _git(status) else "")
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "no git checkout"


def _git(command: Sequence[str]) -> str:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def shown_command(words: Sequence[str]) -> str:
    """The command line without this machine's paths: a path by its last name, the peer's interpreter as PYTHON."""
    shown = [
        "PYTHON" if before == "--peer-python" else Path(word).name if os.sep in word else word
        for before, word in zip(["", *words], words, strict=False)
    ]
    return " ".join(["python", f"benchmarks/{shown[0]}", *shown[1:]])


def load_average() -> str:
    """Processes that wanted a core in the last 1, 5 and 15 minutes."""
    return " ".join(f"{load:.2f}" for load in os.getloadavg())


def today() -> str:
    return datetime.datetime.now(tz=datetime.UTC).date().isoformat()


def workload_of(data_path: Path) -> str:
    """The stem of the rows' file, or its folder's name where the file is called train."""
    return data_path.resolve().parent.name if data_path.stem == "train" else data_path.stem


def say(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)
