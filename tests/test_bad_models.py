"""The corpus of bad models through the command line: each ends in one line and its exit code, soon and small."""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path

import bad_models
import pytest
from bad_models import CORPUS, Kit
from conftest import Command

SECONDS, BYTES = 5.0, 300_000_000


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    return bad_models.write_kit(tmp_path_factory.mktemp("sound"))


def command(path: Path) -> list[str]:
    """What a user would run on it: anything that opens a model for talking opens it for everything."""
    return ["chat", str(path), "--once", "Hello", "--max-tokens", "1"]


def test_the_corpus_is_as_large_as_promised() -> None:
    assert len(CORPUS) >= 60


@pytest.mark.parametrize("kind", ["base", "gguf", "adapter"])
def test_what_the_bad_ones_are_made_from_is_sound(
    kind: str, kit: Kit, tmp_path: Path, myna: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MYNA_CACHE", str(tmp_path / "cache"))
    done = myna(*command(getattr(kit, kind)), *(["--base", str(kit.base)] if kind == "adapter" else []))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", CORPUS)
def test_a_bad_model_is_refused_in_one_line(
    name: str, kit: Kit, tmp_path: Path, myna: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "pipe" in name and not hasattr(os, "mkfifo"):
        pytest.skip("this system has no pipes in folders")
    monkeypatch.setenv("MYNA_CACHE", str(tmp_path / "cache"))
    bad = CORPUS[name]
    path = bad.make(Kit(kit.base, kit.gguf, kit.adapter, tmp_path))
    before, started = peak_bytes(), time.process_time()
    done = myna(*command(path))
    seconds, grown = time.process_time() - started, peak_bytes() - before
    assert done.returncode == bad.exit_code, done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(told) == 1 and re.search(bad.says, " ".join(done.stderr.split())), done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr) < 2000
    assert seconds < SECONDS and grown < BYTES, (seconds, grown)
    assert not list((tmp_path / "cache").rglob(".tmp-*"))


def peak_bytes() -> int:
    """The most memory this process ever held; 0 where the system does not say."""
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
