"""Pages whose commands are run: `python tests/shell_pages.py docs/PAGE.md` writes what they say into the page.

Each block of `sh` is run by bash in one folder, in order; a block of `text` right after it is what it says, on both streams.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"```sh\n(?P<code>.*?)^```\n(?P<said>\n```text\n.*?^```\n)?", re.S | re.M)
NOT_RUN = ("myna run ",)  # downloads and trains
PRELUDE = f'set -o pipefail; myna() {{ "{sys.executable}" -m myna.cli "$@"; }}\n'


def run_page(page: str, folder: Path) -> str:
    """The page with what its commands say now."""
    return BLOCK.sub(lambda block: _with_output(block, folder), page)


def _with_output(block: re.Match[str], folder: Path) -> str:
    code = block["code"]
    if code.startswith(NOT_RUN):
        return block[0]
    said, head = run(code, folder), f"```sh\n{code}```\n"
    assert block["said"] or not said, f"a block without output says: {said}"
    return f"{head}\n```text\n{said}```\n" if block["said"] else head


def run(code: str, folder: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "LC_ALL": "C.UTF-8", "COLUMNS": "120"}
    done = subprocess.run(
        ["bash", "-c", PRELUDE + code],
        check=False,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
    )
    assert "Traceback" not in done.stdout, done.stdout
    return done.stdout


if __name__ == "__main__":
    for name in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as place:
            text = run_page(Path(name).read_text(encoding="utf-8"), Path(place))
        Path(name).write_text(text, encoding="utf-8")
