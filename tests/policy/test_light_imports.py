"""`myna --help` and everything left of `model` start without the heavy packages."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from source_tree import NAMES, ROOT

HEAVY = (
    "torch",
    "transformers",
    "peft",
    "pyarrow",
    "gguf",
    "xllamacpp",
    "accelerate",
    "huggingface_hub",
    "openpyxl",
)
# Left of `model`, and what a light command imports.
LIGHT_TREES = ("", "errors", "recipe", "run", "show", "data")
LIGHT_MODULES = (
    "chat",
    "chat_command",
    "doctor",
    "engine.compiler",
    "evaluate.report",
    "evaluate.scorers",
    "first_recipe",
    "machine",
    "talk",
    "terminal",
)
LIGHT = sorted(
    name
    for name in NAMES
    if (name.split(".")[0] in LIGHT_TREES or name in LIGHT_MODULES) and name != "data.packing"
)


def heavy_after(code: str) -> list[str]:
    """Which heavy packages a fresh interpreter has loaded after running `code`."""
    script = (
        f"import json, sys\n{code}\n"
        f"print('loaded:' + json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout.rpartition("loaded:")[2])
    assert isinstance(loaded, list)
    return loaded


def test_the_probe_sees_a_heavy_package() -> None:
    assert heavy_after("import gguf") == ["gguf"]


def test_light_modules_load_nothing_heavy() -> None:
    lines = [f"import {'.'.join(filter(None, ('myna', name)))}" for name in LIGHT]
    loaded = heavy_after("\n".join(lines))
    if loaded:  # one by one, to name the culprit
        culprits = {line: heavy_after(line) for line in lines}
        pytest.fail(str({line: names for line, names in culprits.items() if names}))


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import contextlib, io, runpy\n"
        "sys.argv = ['myna', '--help']\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as told:\n"
        "    runpy.run_module('myna.cli', run_name='__main__')\n"
        "assert 'Usage' in told.getvalue(), told.getvalue()"
    )
    assert heavy_after(code) == []
