"""Any bytes under any ending, any values under any keys: conversations or a clean error, never anything else."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from myna.data.formats import FORMATS
from myna.data.quarantine import quarantine_lines
from myna.data.review import review_rows
from myna.data.rows import as_row, read_conversations
from myna.data.sources import SOURCES
from myna.errors import MynaError

SIGNS = (
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b",",
    b":",
    b"\n",
    b"\r",
    b"\0",
    b"\xff",
    b"1e999",
    b"\\ud800",
    b'"open',
)
MAGIC = (b"\xff\xfe", b"\xef\xbb\xbf", b"\x1f\x8b", b"PAR1", b"BZh9", b"PK\x03\x04")
WHOLE = (b'{"prompt": "q", "completion": "a"}\n', b"prompt,completion\n", b"a;b\n")
PARTS = st.sampled_from((*SIGNS, *MAGIC, *WHOLE))
CONTENTS = st.lists(PARTS | st.binary(max_size=8), max_size=12).map(b"".join)
ENDINGS = st.sampled_from([*SOURCES, ".jsonl.gz", ".csv.zst", ".json.xz"])
KEYS = sorted({key for shape in FORMATS for column in shape.columns for key in column.keys})
INNER = [
    "role",
    "content",
    "from",
    "value",
    "text",
    "replies",
    "qas",
    "question",
    "answers",
    "context",
    "weight",
    "type",
    "id",
    "rank",
    "deleted",
]
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.sampled_from(["", " ", "q", "user", "assistant", "gpt", "prompter", "\ud800", "\0", "سلام"])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(INNER), inner, max_size=4),
    max_leaves=12,
)
ROWS = st.lists(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4), min_size=1, max_size=4)


def require_an_answer(path: Path) -> None:
    try:
        read = read_conversations(path)
    except MynaError as error:
        assert error.message and error.exit_code in (2, 3)
        return
    assert read.conversations or read.faults
    for fault in read.faults:
        assert fault.message and fault.where and "\n" not in str(fault.where)
    for conversation in read.conversations:
        assert conversation.messages[-1].role == "assistant"
        json.dumps(as_row(conversation)).encode()
    for line in quarantine_lines(read.faults):
        line.encode()
        assert json.loads(line)["code"]
    review_rows(path)


@given(CONTENTS, ENDINGS)
@settings(max_examples=200, deadline=None)
def test_any_bytes(content: bytes, ending: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rows{ending}"
        path.write_bytes(content)
        require_an_answer(path)


@given(ROWS)
@settings(max_examples=300, deadline=None)
def test_any_values(rows: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        require_an_answer(path)


def test_the_long_form_starts() -> None:
    """One example of each test, of a seed of its own, in a process of its own."""
    script = Path(__file__).resolve().parent.parent / "scripts/fuzz_rows.py"
    arguments = [sys.executable, str(script), "--minutes", "0.0001", "--seed", "7", "--examples", "1"]
    done = subprocess.run(arguments, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "seeds to 7: nothing but conversations and clean errors\n"
