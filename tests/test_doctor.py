from __future__ import annotations

import importlib.util
import json
import os
import platform
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from myna.doctor import Requirement, as_lines, check_package, examine, read_requirement
from myna.engine.threads import usable_cores
from myna.machine import ABILITIES, check_abilities, check_compiler, check_disk
from myna.model.sources import PACKAGED, packaged_gguf_path

METADATA = """\
Metadata-Version: 2.4
Name: myna
Version: 9.9
Provides-Extra: serve
Provides-Extra: dev
Provides-Extra: nothing
Requires-Dist: numpy>=1
Requires-Dist: no-such-package-at-all>=2.5
Requires-Dist: pydantic<1
Requires-Dist: not-for-this-one; python_version < "3"
Requires-Dist: no-such-web-package>=1; extra == "serve"
Requires-Dist: pytest>=2; extra == 'dev'
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Myna that is installed, as far as its metadata says."""
    folder = tmp_path / "site" / "myna-9.9.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(METADATA)
    monkeypatch.syspath_prepend(str(folder.parent))
    return folder


def test_the_report_is_data(tmp_path: Path) -> None:
    report = examine()
    names = [finding.name for finding in report.findings]
    assert len(names) == len(set(names))
    for name in ("python", "myna", "package:torch", "package:xllamacpp", "system", "cores", "abilities"):
        assert name in names
    assert {"kernels", "memory", "disk:here", "disk:cache", "base:smollm2-135m", "gpu", "settings"} <= {
        *names
    }
    found = json.loads(json.dumps(report.to_json()))
    assert found["findings"]["python"]["value"] == platform.python_version()
    assert found["findings"]["cores"]["value"]["usable"] == usable_cores()
    assert found["findings"]["memory"]["value"] > 0
    for status, text, cure in as_lines(report):
        assert status in ("ok", "warn", "missing")
        assert text and "\n" not in text
        assert (cure is None) == (status == "ok")


def test_looking_loads_nothing_heavy() -> None:
    code = (
        "import sys; from myna.doctor import examine; examine();"
        "print([n for n in ('torch', 'transformers', 'peft', 'gguf', 'xllamacpp') if n in sys.modules])"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_missing_core_package_is_a_problem_and_an_extra_is_not(installed: Path) -> None:
    report = examine()
    assert [finding.name for finding in report.problems] == ["package:no-such-package-at-all"]
    assert report.problems[0].cure == 'pip install "no-such-package-at-all>=2.5"'
    found = report.to_json()
    assert found["ok"] is False
    assert found["problems"] == ["package:no-such-package-at-all"]
    packages = {name: entry["status"] for name, entry in found["findings"].items() if "package:" in name}
    assert packages == {
        "package:numpy": "ok",
        "package:no-such-package-at-all": "missing",
        "package:pydantic": "warn",
    }


def test_extras_are_read_from_what_is_installed(installed: Path) -> None:
    found = examine().to_json()["findings"]
    assert found["extra:serve"]["status"] == "missing"
    assert found["extra:serve"]["cure"] == 'pip install "myna[serve]"'
    assert "no-such-web-package" in found["extra:serve"]["text"]
    assert found["extra:dev"]["status"] == "ok"
    assert "pytest" in found["extra:dev"]["text"]
    assert found["extra:nothing"]["status"] == "ok"
    assert "extras" not in found


def test_requirements_and_their_markers() -> None:
    assert read_requirement("torch>=2.11") == Requirement("torch", ">=2.11", None)
    assert read_requirement('ruff>=0.14; extra == "dev"') == Requirement("ruff", ">=0.14", "dev")
    assert read_requirement('x; python_version < "3" and extra == "dev"') is None
    assert read_requirement('x; sys_platform == "no-such-system"') is None


def test_a_version_that_is_too_old_is_no_missing_package() -> None:
    finding = check_package(Requirement("pytest", ">=999", None))
    assert (finding.status, finding.cure) == ("warn", 'pip install "pytest>=999"')
    assert check_package(Requirement("pytest", ">=1", None)).status == "ok"
    assert check_package(Requirement("pytest", "", None)).status == "ok"


@pytest.mark.parametrize(
    ("cpuinfo", "status", "abilities", "words"),
    [
        ("flags\t: fpu sse2\n", "warn", [], "neither"),
        ("flags\t\t: fpu avx2 fma\nflags : sse2\n", "ok", ["avx2"], "in fp32 by default"),
        (
            "flags : avx2 avx512f avx512_bf16 avx512_vnni amx_bf16 amx_tile\n",
            "ok",
            ["avx2", "avx512", "avx512_bf16", "avx512_vnni", "amx"],
            "in bf16 by default",
        ),
        ("Features\t: fp asimd bf16 i8mm\n", "ok", ["neon", "arm_bf16", "arm_i8mm"], "in fp32 by default"),
        ("", "warn", [], "neither"),
        ("flags : avx2 avx_vnni\n", "ok", ["avx2", "avx512_vnni"], "in fp32 by default"),
        ("flags : avx2 avx512f\n", "ok", ["avx2", "avx512"], "int8 weights in fp32"),
    ],
)
def test_what_the_cores_can_do(cpuinfo: str, status: str, abilities: list[str], words: str) -> None:
    finding = check_abilities(cpuinfo)
    assert (finding.status, finding.value) == (status, abilities)
    assert words in finding.text
    told = "multiplies int8 weights in fp32" in finding.text
    assert told == (status == "ok" and "avx512_vnni" not in abilities)
    assert {*abilities} <= ABILITIES.keys()


def test_a_disk_with_too_little_room(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there" / "yet"
    assert check_disk("disk:x", folder, 1, "cure").status == "ok"
    full = check_disk("disk:x", folder, 10**18, "cure")
    assert (full.status, full.cure) == ("warn", "cure")
    assert "1,000,000,000.0 GB" in full.text
    assert not folder.exists()


@pytest.mark.skipif(
    sys.platform == "win32" or (hasattr(os, "geteuid") and os.geteuid() == 0),
    reason="root may write anywhere",
)
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        assert "may not be written" in check_disk("disk:x", tmp_path, 1, "cure").text
    finally:
        tmp_path.chmod(stat.S_IRWXU)


def test_the_packaged_base_is_looked_for_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MYNA_CACHE", str(tmp_path))
    assert examine().to_json()["findings"]["base:smollm2-135m"]["status"] == "missing"
    path = packaged_gguf_path("smollm2-135m")
    path.parent.mkdir(parents=True)
    for size, status in ((10, "missing"), (PACKAGED["smollm2-135m"].gguf_bytes, "ok")):
        with path.open("wb") as file:
            file.truncate(size)
        assert examine().to_json()["findings"]["base:smollm2-135m"]["status"] == status


def test_settings_that_slow_training_down_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.setenv("OMP_NUM_THREADS", "100000")
    found = examine().to_json()["findings"]
    assert found["settings"]["value"]["OMP_WAIT_POLICY"] == "active"
    assert found["settings:wait"]["cure"] == "unset OMP_WAIT_POLICY"
    assert found["settings:threads"]["cure"] == "unset OMP_NUM_THREADS"
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert {"settings:wait", "settings:threads"}.isdisjoint(examine().to_json()["findings"])


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for nvidia-smi is a shell script")
@pytest.mark.parametrize(
    ("script", "status", "words"),
    [
        ("echo 'NVIDIA H200, 143771 MiB, 570.1'", "ok", "GPU: NVIDIA H200, 143771 MiB, 570.1"),
        ("exit 9", "warn", "nvidia-smi does not answer"),
        (None, "ok", "no NVIDIA GPU"),
    ],
)
def test_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, status: str, words: str
) -> None:
    if script:
        tool = tmp_path / "nvidia-smi"
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    finding = examine().to_json()["findings"]["gpu"]
    assert finding["status"] == status
    assert words in finding["text"]


def test_the_compiler_that_would_be_used_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "my cc"
    compiler.write_text("#!/bin/sh\nexit 1\n")  # it is not run
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", f"'{compiler}' -m64")
    finding = check_compiler()
    assert (finding.status, finding.value) == ("ok", f"'{compiler}' -m64")
    assert "doctor --bench" in finding.text


def test_no_compiler_costs_speed_and_has_a_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    finding = check_compiler()
    assert (finding.status, finding.cure, finding.value) == ("warn", "unset CC", None)
    assert "no-such-compiler" in finding.text
    assert "slower" in finding.text
    if importlib.util.find_spec("ziglang"):
        pytest.skip("the package ziglang is a compiler")
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    cures = {"darwin": "xcode-select --install", "linux": "pip install ziglang"}
    assert check_compiler().cure == cures.get(sys.platform, "pip install ziglang")
    (tmp_path / "apt-get").write_text("#!/bin/sh\n")
    (tmp_path / "apt-get").chmod(0o755)
    if sys.platform == "linux":
        assert check_compiler().cure == "apt-get install gcc libc6-dev"
