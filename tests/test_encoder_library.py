"""Which library encodes: the first that loads and passes its test, and what is said where none does."""

from __future__ import annotations

import _ctypes
import ctypes
import os
import sys
import tomllib
from pathlib import Path

import pytest

from myna.doctor import examine
from myna.errors import MachineError
from myna.export.encoder import found_library, self_test
from myna.export.encoder_library import PACKAGES, XLLAMACPP, find_library, load_library

FIRST, SECOND = PACKAGES
linux = pytest.mark.skipif(sys.platform != "linux", reason="the stand-ins carry Linux's file names")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder as the only place where packages are looked for; the real library goes on working by its path."""
    found_library()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    return tmp_path


def put(site: Path, package: str, file: str, library: Path) -> Path:
    """A package with one file, a link to `library`."""
    folder = site / package
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / file).symlink_to(library)
    return folder / file


def test_xllamacpp_is_the_first() -> None:
    found = find_library(self_test)
    assert found.package == FIRST and found.path.parent.name == "xllamacpp"
    assert found_library() is found_library()


def test_the_release_named_in_errors_is_the_one_installed() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert XLLAMACPP in project["dependencies"] and FIRST.requirement == XLLAMACPP


@linux
@pytest.mark.parametrize("file", ["libggml-base.so.0", "libggml-base.so"])
def test_the_second_package_is_used_where_the_first_is_missing(site: Path, file: str) -> None:
    path = put(site, SECOND.folder, file, find_real())
    found = find_library(self_test)
    assert (found.package, found.path) == (SECOND, path)


@linux
def test_the_second_package_is_used_where_the_first_has_no_encoder(site: Path) -> None:
    """As xllamacpp's file on Windows, which does not export it."""
    put(site, FIRST.folder, "xllamacpp.abi3.so", Path(_ctypes.__file__))
    put(site, SECOND.folder, "libggml-base.so.0", find_real())
    assert find_library(self_test).package == SECOND


@linux
def test_the_first_is_passed_over_where_its_answers_are_wrong(site: Path) -> None:
    put(site, FIRST.folder, "xllamacpp.abi3.so", find_real())
    put(site, SECOND.folder, "libggml-base.so.0", find_real())
    asked: list[ctypes.CDLL] = []

    def test(library: ctypes.CDLL) -> None:
        asked.append(library)
        if len(asked) == 1:
            raise MachineError("other bytes for the known row")

    assert find_library(test).package == SECOND and len(asked) == 2


def test_where_there_is_none_each_is_named_with_its_reason(site: Path) -> None:
    (site / SECOND.folder).mkdir()
    (site / SECOND.folder / "__init__.py").touch()
    for name in ("libggml-base.so.0", "ggml-base.dll", "libggml-base.dylib"):
        (site / SECOND.folder / name).write_bytes(b"\x7fELF, but built for a system that is not this one")
    with pytest.raises(MachineError) as refused:
        find_library(self_test)
    assert f"{FIRST.requirement}: it is not installed" in refused.value.message
    assert f"{SECOND.requirement}: it does not load" in refused.value.message
    assert refused.value.help and refused.value.exit_code == 4
    assert all(
        f"pip install --force-reinstall --no-deps {p.requirement}" in refused.value.help for p in PACKAGES
    )
    assert "F16" in refused.value.help


def test_a_folder_of_that_name_is_not_the_package(site: Path) -> None:
    (site / FIRST.folder).mkdir()
    with pytest.raises(MachineError, match=r"xllamacpp==.*: it is not installed"):
        find_library(self_test)


def test_a_library_without_the_encoder_is_refused() -> None:
    with pytest.raises(MachineError, match="does not load as an encoder") as refused:
        load_library(Path(_ctypes.__file__))
    assert refused.value.where == os.fspath(_ctypes.__file__)


def test_doctor_names_the_library_in_use() -> None:
    finding = next(finding for finding in examine().findings if finding.name == "encoder")
    assert finding.status == "ok" and finding.value == str(found_library().path)
    assert FIRST.requirement in finding.text


def test_doctor_says_why_there_is_none(site: Path) -> None:
    found_library.cache_clear()
    try:
        finding = next(finding for finding in examine().findings if finding.name == "encoder")
    finally:
        found_library.cache_clear()
    assert finding.status == "missing" and "is not installed" in finding.text
    assert finding.cure and FIRST.requirement in finding.cure


def find_real() -> Path:
    return found_library().path
