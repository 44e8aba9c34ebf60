"""Fixtures: one tiny base for the whole run, a private cache, and the shared test data where it is."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

# before torch is loaded by any test: two processes that spin at barriers make each other crawl
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parent))

import tiny

Command = Callable[..., "Done"]


def pytest_configure() -> None:
    """A shell's background jobs start with Ctrl-C ignored, those of nohup with a hang-up; some tests send both."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer llama with a ChatML tokenizer, as a folder."""
    return tiny.write_base(tmp_path_factory.mktemp("tiny") / "base")


@dataclass(frozen=True)
class Done:
    """What a command left: its exit code and what it said."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def myna(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs `myna` in a folder of its own, in this process: what torch costs to load is paid once."""
    from myna.cli import exit_code

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO())

    def run(*arguments: str) -> Done:
        capfd.readouterr()
        code = exit_code(list(arguments))
        said = capfd.readouterr()
        return Done(code, said.out, said.err)

    return run


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """A folder of public rows that a checkout may have beside it; tests that want it skip where it is not."""
    folder = os.environ.get("MYNA_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("MYNA_TEST_DATA names no folder of test rows")
    return Path(folder)
