"""Compiling the kernels into the cache: once, whole, by whoever comes first, and said where it can't be done."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from myna.engine import compiler
from myna.engine.compiler import (
    FLAGS,
    SOURCE_FOLDER,
    SOURCES,
    NotNative,
    compile_cure,
    compiled_kernels,
    find_compiler,
)

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="the stand-ins for a compiler are shell scripts"
)
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("MYNA_CACHE", str(folder))
    return folder / "native"


class StandIn:
    """A compiler that notes each time it compiles, and makes a library of `text`."""

    def __init__(self, folder: Path, text: str = "a library", wait: str = "0") -> None:
        self.path, self._calls = folder / "stand-in-cc", folder / "calls"
        self._calls.write_text("")
        self.set(f'sleep {wait}; while [ "$1" != -o ]; do shift; done; echo "{text}" > "$2"')

    def set(self, work: str, version: str = "stand-in 1.0") -> None:
        self.path.write_text(
            f'#!/bin/sh\n[ "$1" = --version ] && echo "{version}" && exit 0\necho x >> {self._calls}\n{work}\n'
        )
        self.path.chmod(0o755)

    @property
    def num_calls(self) -> int:
        return len(self._calls.read_text().split())


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    made = StandIn(tmp_path)
    monkeypatch.setenv("CC", str(made.path))
    return made


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("ziglang"):
        pytest.skip("the package ziglang is a compiler")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))


def test_compiled_once_and_found_again(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = next((name for name in compiler.COMPILERS if shutil.which(name)), None)
    if real is None:
        pytest.skip("there is no C compiler here")
    wrapper = StandIn(tmp_path)
    wrapper.set(f'exec {real} "$@"')
    monkeypatch.setenv("CC", str(wrapper.path))
    made = compiled_kernels()
    assert (made.compiler, wrapper.num_calls) == ("stand-in 1.0", 1)
    assert made.path.parent == cache
    assert sorted(path.suffix for path in cache.iterdir()) == [".sha256", ".so"]
    loads = f"import ctypes; ctypes.CDLL({str(made.path)!r}).myna_norm_bf16"
    subprocess.run([sys.executable, "-c", loads], check=True)
    wrapper.set("exit 1")
    assert compiled_kernels() == made
    assert wrapper.num_calls == 1


def test_another_text_compiler_or_flag_is_another_library(
    cache: Path, stand_in: StandIn, tmp_path: Path
) -> None:
    first = compiled_kernels().path
    other = tmp_path / "sources"
    other.mkdir()
    for name in SOURCES:
        (other / name).write_text((SOURCE_FOLDER / name).read_text() + "\n")
    found = {first, compiled_kernels(other).path, compiled_kernels(flags=(*FLAGS, "-g")).path}
    stand_in.set(stand_in.path.read_text().splitlines()[-1], version="stand-in 2.0")
    found.add(compiled_kernels().path)
    assert (len(found), stand_in.num_calls) == (4, 4)
    assert first.is_file()


def test_no_compiler_at_all(cache: Path, no_compiler: None) -> None:
    with pytest.raises(NotNative, match="there is no C compiler"):
        compiled_kernels()
    assert compile_cure()
    assert not cache.exists()


def test_a_compiler_that_is_asked_for_and_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler -m64")
    with pytest.raises(NotNative, match="CC is no-such-compiler, which is no program here"):
        find_compiler()
    assert compile_cure() == "unset CC"
    monkeypatch.setenv("CC", f"'{sys.executable}' -m somecc")
    assert find_compiler() == [sys.executable, "-m", "somecc"]


@pytest.mark.parametrize(
    ("work", "said"),
    [
        ("echo 'In file x:' >&2; echo 'n.c:3:1: fatal error: math.h: no' >&2; echo 'n.c:9: error: b' >&2; exit 1",
         "failed with 1: n.c:3:1: fatal error: math.h: no$"),
        ("echo 'cannot do this' >&2; exit 4", "failed with 4: cannot do this$"),
        ("exit 3", "failed with 3: it says nothing$"),
        ("kill -9 $$", "failed with -9"),
        ("exit 0", "made no library"),
    ],
)  # fmt: skip
def test_a_compiler_that_fails_is_told_by_its_first_error(
    cache: Path, stand_in: StandIn, work: str, said: str
) -> None:
    stand_in.set(work)
    with pytest.raises(NotNative, match=said):
        compiled_kernels()
    assert list(cache.iterdir()) == []


def test_a_compiler_that_cannot_be_run(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cc").write_text("#!/no/such/interpreter\n")
    (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    with pytest.raises(NotNative, match="could not be run"):
        compiled_kernels()


def test_sources_that_do_not_compile(cache: Path, tmp_path: Path) -> None:
    if shutil.which("gcc") is None and shutil.which("cc") is None:
        pytest.skip("there is no C compiler here")
    for name in SOURCES:
        (tmp_path / name).write_text("int x = ;\n" * 2)
    with pytest.raises(NotNative, match=r"failed with 1: .*native\.c:1:9: error: "):
        compiled_kernels(tmp_path)


@pytest.mark.parametrize("spoil", ["truncate", "change", "digest"])
def test_a_damaged_library_is_made_again(cache: Path, stand_in: StandIn, spoil: str) -> None:
    path = compiled_kernels().path
    whole = path.read_bytes()
    if spoil == "truncate":
        path.write_bytes(whole[: len(whole) // 2])
    elif spoil == "change":
        path.write_bytes(bytes([whole[0] ^ 1, *whole[1:]]))
    else:
        path.with_suffix(".sha256").unlink()
    assert compiled_kernels().path == path
    assert path.read_bytes() == whole
    assert stand_in.num_calls == 2
    path.write_bytes(b"")
    stand_in.set("exit 1")
    with pytest.raises(NotNative, match="failed with 1"):
        compiled_kernels()


def test_a_cache_that_is_no_folder(cache: Path, stand_in: StandIn) -> None:
    cache.parent.mkdir()
    cache.write_text("a file")
    with pytest.raises(NotNative, match="can't be kept in"):
        compiled_kernels()


def test_several_processes_at_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = StandIn(tmp_path, wait="0.7")
    monkeypatch.setenv("CC", str(slow.path))
    code = (
        "import sys, time; from myna.engine.compiler import compiled_kernels; made = compiled_kernels().path\n"
        "assert 'torch' not in sys.modules; print(made); until = time.monotonic() + 0.8\n"
        "while time.monotonic() < until: assert made.read_text() == 'a library\\n'"  # while others come later
    )
    started = []
    for _ in range(3):
        started.append(subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE))
        time.sleep(0.2)
    said = [process.communicate(timeout=60)[0].decode().strip() for process in started]
    assert [process.returncode for process in started] == [0, 0, 0]
    assert slow.num_calls > 1  # they did meet
    path = compiled_kernels().path
    assert said == [str(path)] * 3
    assert sorted(cache.iterdir()) == [path.with_suffix(".sha256"), path]


def test_the_compiler_in_a_package(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ziglang")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert find_compiler()[1:] == ["-m", "ziglang", "cc"]
    assert compiled_kernels().path.is_file()
