"""No file of the project names a path of the machine it was written on."""

from __future__ import annotations

import re
import subprocess

import pytest
from source_tree import ROOT

# Written in pieces, so that this file does not name them.
FOREIGN = re.compile("|".join(["/" + "work/", r"\.\./" + "shared"]))
MAY_LOOK_BESIDE = {".ci/run", "tests/conftest.py"}


def project_files() -> list[str]:
    """Tracked files, and new ones that git does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("this is no git checkout")
    return [name for name in done.stdout.split("\0") if name]


def test_no_file_names_a_place_outside() -> None:
    names = project_files()
    assert "tests/policy/test_no_machine_paths.py" in names
    wrong = []
    for name in sorted({*names} - MAY_LOOK_BESIDE):
        path = ROOT / name
        if path.is_file() and not path.is_symlink():
            lines = path.read_bytes().decode("utf-8", "replace").splitlines()
            wrong += [
                f"{name}:{n}: {line.strip()[:80]}" for n, line in enumerate(lines, 1) if FOREIGN.search(line)
            ]
    assert not wrong, "\n".join(wrong)


def test_the_pattern_sees_what_it_should() -> None:
    assert FOREIGN.search("cd /" + "work/main")
    assert FOREIGN.search("open('../" + "shared/x')")
    assert not FOREIGN.search("docs/network/ and ./shared/x")
