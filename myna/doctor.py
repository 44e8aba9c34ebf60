"""What this machine has and what it can do: data for `myna doctor`. Nothing heavy is imported to find out."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution, version
from typing import Any, Final

import myna
from myna.engine.threads import usable_cores
from myna.machine import Finding, Status, look_at_machine
from myna.model.sources import PACKAGED, packaged_gguf_path

# Where Myna is run from its sources there is no list of requirements to read: these are what nothing works without.
CORE: Final = ("torch", "transformers", "peft", "tokenizers", "safetensors", "gguf", "xllamacpp")
SETTINGS: Final = (
    "OMP_WAIT_POLICY",
    "OMP_NUM_THREADS",
    "MYNA_KERNELS",
    "MYNA_CACHE",
    "HF_HOME",
    "HF_HUB_OFFLINE",
)
KERNELS: Final = ("native", "torch", "flex")


@dataclass(frozen=True)
class Report:
    """All findings in the order they are shown."""

    findings: tuple[Finding, ...]

    @property
    def problems(self) -> tuple[Finding, ...]:
        """Core packages that are not there: nothing works without them, `myna doctor` exits 4."""
        return tuple(f for f in self.findings if f.is_core and f.status == "missing")

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": not self.problems,
            "problems": [finding.name for finding in self.problems],
            "findings": {finding.name: _without_name(finding) for finding in self.findings},
        }


def examine() -> Report:
    """Looks at everything; takes well under a second, and a few where a GPU's driver answers slowly."""
    return Report(
        (
            *_software(),
            _encoder(),
            *look_at_machine(),
            *_bases(),
            *_settings(),
            *_extras(),
        )
    )


def as_lines(report: Report) -> list[tuple[Status, str, str | None]]:
    """(status, text, cure) of each finding. Texts are plain: escape them before any markup."""
    return [(finding.status, finding.text, finding.cure) for finding in report.findings]


# Software


@dataclass(frozen=True)
class Requirement:
    """One line of Requires-Dist: a name, the versions it allows (PEP 440), and the extra it belongs to."""

    name: str
    specifier: str
    extra: str | None

    def __str__(self) -> str:
        return f"{self.name}{self.specifier}"


def read_requirement(line: str) -> Requirement | None:
    """A Requires-Dist line; None where its marker says that it is not for this Python or this system."""
    from packaging.requirements import Requirement as Parsed

    parsed = Parsed(line)
    named = re.search(r"""extra\s*==\s*["']([^"']+)["']""", str(parsed.marker or ""))
    extra = named[1] if named else None
    if parsed.marker and not parsed.marker.evaluate({"extra": extra or ""}):
        return None
    return Requirement(parsed.name, str(parsed.specifier), extra)


def _software() -> Iterator[Finding]:
    python = platform.python_version()
    yield Finding("python", "ok", f"Python {python} at {sys.executable}", python)
    yield Finding("myna", "ok", f"myna {myna.__version__}", myna.__version__)
    installed = _distribution()
    requirements = _requirements(installed, None) if installed else [Requirement(n, "", None) for n in CORE]
    first = {name: place for place, name in enumerate(CORE)}
    for requirement in sorted(requirements, key=lambda r: first.get(r.name, len(first))):
        yield check_package(requirement)


def check_package(requirement: Requirement) -> Finding:
    """Whether a package is there in a version that is allowed, by its metadata alone."""
    name, cure = f"package:{requirement.name}", f'pip install "{requirement}"'
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return Finding(name, "missing", f"{requirement.name} is not installed", None, cure, is_core=True)
    if not _allows(requirement.specifier, found):
        text = f"{requirement.name} {found} is not what Myna is tried with ({requirement.specifier})"
        return Finding(name, "warn", text, found, cure, is_core=True)
    return Finding(name, "ok", f"{requirement.name} {found}", found, is_core=True)


def _allows(specifier: str, found: str) -> bool:
    if not specifier:
        return True
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(specifier).contains(found, prereleases=True)


def _distribution() -> Distribution | None:
    """Myna's own metadata; None where it is run from its sources, or where what reads it is not installed."""
    try:
        version("packaging")
        return distribution("myna")
    except PackageNotFoundError:
        return None


def _requirements(installed: Distribution, extra: str | None) -> list[Requirement]:
    found = (read_requirement(line) for line in installed.requires or ())
    return [requirement for requirement in found if requirement and requirement.extra == extra]


def _extras() -> Iterator[Finding]:
    """Each extra that the installed Myna offers; read from its metadata, so that the list cannot go stale."""
    installed = _distribution()
    if installed is None:
        text = "requirements and extras are not known: myna runs from its sources, or packaging is missing"
        yield Finding("extras", "warn", text, None, "pip install packaging -e .")
        return
    for extra in installed.metadata.get_all("Provides-Extra") or ():
        packages = [check_package(r) for r in _requirements(installed, extra)]
        lacking = [package.text for package in packages if package.status != "ok"]
        if lacking:
            cure = f'pip install "myna[{extra}]"'
            yield Finding(f"extra:{extra}", "missing", f"extra {extra}: {'; '.join(lacking)}", False, cure)
        else:
            held = ", ".join(package.text for package in packages) or "it needs nothing more"
            yield Finding(f"extra:{extra}", "ok", f"extra {extra}: {held}", True)


def _encoder() -> Finding:
    """The library that quantizes: found, loaded and tested as it is before its first use."""
    from myna.errors import MachineError
    from myna.export.encoder import found_library

    try:
        found = found_library()
    except MachineError as error:
        return Finding("encoder", "missing", error.message, None, error.help)
    text = f"quantizing by {found.package.requirement}, which passes its test ({found.path})"
    return Finding("encoder", "ok", text, str(found.path))


# Bases and settings


def _bases() -> Iterator[Finding]:
    for name, packaged in PACKAGED.items():
        path = packaged_gguf_path(name)
        if path.is_file() and path.stat().st_size == packaged.gguf_bytes:
            yield Finding(f"base:{name}", "ok", f"{name}: in the cache, works offline", str(path))
        else:
            size = f"{packaged.gguf_bytes / 1e6:.0f} MB"
            text, cure = f"{name}: not in the cache yet", f"`myna demo` fetches it once ({size})"
            yield Finding(f"base:{name}", "missing", text, None, cure)


def _settings() -> Iterator[Finding]:
    """Variables that change what Myna does."""
    given = {name: os.environ[name] for name in SETTINGS if name in os.environ}
    text = ", ".join(f"{name}={value}" for name, value in given.items()) or "none is set"
    yield Finding("settings", "ok", f"environment: {text}", given)
    if given.get("OMP_WAIT_POLICY", "").lower() == "active":
        text = "OMP_WAIT_POLICY=ACTIVE: one busy neighbour makes a step several times slower"
        yield Finding("settings:wait", "warn", text, None, "unset OMP_WAIT_POLICY")
    kernels = given.get("MYNA_KERNELS", "")
    if kernels and kernels not in KERNELS:
        text = f"MYNA_KERNELS={kernels}: `myna train` refuses it; it is {', '.join(KERNELS)}, or not set"
        yield Finding("settings:kernels", "warn", text, None, "unset MYNA_KERNELS")
    threads = given.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and int(threads) > usable_cores():
        text = f"OMP_NUM_THREADS={threads} is more than the {usable_cores()} cores that may be used"
        yield Finding("settings:threads", "warn", text, None, "unset OMP_NUM_THREADS")


def _without_name(finding: Finding) -> dict[str, Any]:
    return {key: value for key, value in asdict(finding).items() if key not in ("name", "is_core")}
