"""A file as a whole: what is loaded, what is said, and every fault told at once."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from myna.data.check import CODES, gathered, nearest
from myna.data.conversation import Conversation, Message
from myna.data.rows import as_row, load_conversations
from myna.errors import DataError


def write(path: Path, rows: list[Any]) -> Path:
    """One row a line; a text is written as it is."""
    lines = [one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_loaded_rows(tmp_path: Path) -> None:
    rows = [{"id": n, "prompt": f"q{n}", "completion": f"a{n}", "source": "x"} for n in range(4)]
    path = write(tmp_path / "orders.jsonl", rows)
    loaded = load_conversations(path)
    assert loaded.said == (
        "orders.jsonl: 4 rows, prompt/answer (keys prompt, completion); ignored: id, source",
    )
    assert (loaded.format_name, loaded.confidence, loaded.num_rows) == ("prompt_answer", 1.0, 4)
    assert loaded.ignored_keys == ("id", "source")
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    third = loaded.conversations[2]
    assert third.messages == (Message("user", "q2"), Message("assistant", "a2"))
    assert str(third.place) == f"{path}:3"


def test_the_first_rows_alone(tmp_path: Path) -> None:
    good = {"prompt": "q", "completion": "a"}
    path = write(tmp_path / "a.jsonl", [good, good, "broken"])
    loaded = load_conversations(path, max_rows=2)
    assert loaded.num_rows == len(loaded.conversations) == 2
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert load_conversations(path, max_rows=1).said[0].startswith("a.jsonl: 1 row, ")


def test_columns_and_format_are_passed_on(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"ticket": "q", "reply": "a"}])
    loaded = load_conversations(path, columns={"prompt": "ticket", "completion": "reply"})
    assert loaded.said == ("a.jsonl: 1 row, prompt/answer (keys ticket, reply)",)
    with pytest.raises(DataError):
        load_conversations(path, format_name="messages")


def test_all_faults_at_once_grouped_counted_and_placed(tmp_path: Path) -> None:
    good = {"prompt": "q", "completion": "a"}
    empty = {"prompt": "q", "completion": ""}
    path = write(
        tmp_path / "a.jsonl",
        [good, "{broken", empty, empty, good, empty, empty, empty, [], {"prompt": "q", "anser": "a"}],
    )
    with pytest.raises(DataError) as caught:
        load_conversations(path)
    assert (caught.value.where, caught.value.exit_code) == (str(path), 3)
    assert caught.value.message.splitlines() == [
        "8 faults",
        f"error[D001] {path}:2: broken JSON at column 2: Expecting property name enclosed in double quotes",
        '  help: every row is one object on one line: {"prompt": "...", "completion": "..."}',
        f"error[D003] {path}:9: a row must be an object with keys; this is a list",
        '  help: every row is one object on one line: {"prompt": "...", "completion": "..."}',
        f"error[D012] {path}:10: `completion` is missing; the keys are: prompt, anser",
        "  help: rename it in this row or, if all have it so, --set data.columns.completion=anser",
        f"error[D013] {path}:3: `completion` is empty",
        f"error[D013] {path}:4: `completion` is empty",
        f"error[D013] {path}:6: `completion` is empty",
        "  and 2 more",
        "  help: fill it in, or take the row out",
    ]


def test_faults_of_one_kind_keep_their_code_and_cure(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["{", "{", {"prompt": "q", "completion": "a"}])
    with pytest.raises(DataError) as caught:
        load_conversations(path)
    assert caught.value.code == "D001"
    assert str(caught.value.help).startswith("every row is one object on one line")
    assert "help" not in caught.value.message


def test_one_fault_is_told_as_it_is(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "q", "anser": "a"}] * 3)
    with pytest.raises(DataError) as caught:
        load_conversations(path)
    assert str(caught.value) == (
        f"{path}:1: `completion` is missing; the keys are: prompt, anser\n"
        "  help: --set data.columns.completion=anser"
    )
    assert caught.value.code == "D012"


def test_broken_lines_are_told_even_where_the_shape_cannot_be(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["{broken", {"x": 1, "y": 2}])
    with pytest.raises(DataError) as caught:
        load_conversations(path)
    assert "error[D001]" in caught.value.message and "error[D010]" in caught.value.message


def test_mixed_shapes_name_the_first_row_that_differs(tmp_path: Path) -> None:
    pair, alpaca = {"prompt": "q", "completion": "a"}, {"instruction": "q", "output": "a"}
    path = write(tmp_path / "a.jsonl", [pair, pair, alpaca, pair, alpaca])
    with pytest.raises(DataError) as caught:
        load_conversations(path)
    assert caught.value.code == "D011"
    assert caught.value.message.splitlines()[1].startswith(f"error[D011] {path}:3: this row is Alpaca")


def test_conversations_come_back_as_they_were(tmp_path: Path) -> None:
    messages = (
        Message("system", "s \u2028"),
        Message("user", " سلام\r\n\t"),
        Message("assistant", '{"a": "b"}'),
        Message("user", "<|im_end|>\u0000"),
        Message("assistant", "👩🏽‍🚀"),
    )
    before = [Conversation(messages), Conversation(messages[1:3])]
    path = write(tmp_path / "test.jsonl", [as_row(one) for one in before])
    after = load_conversations(path, format_name="messages").conversations
    assert [one.messages for one in after] == [one.messages for one in before]


def test_codes_are_distinct_and_gathering_one_keeps_it(tmp_path: Path) -> None:
    assert len(set(CODES.values())) == len(CODES)
    one = DataError("x", code="D001", where="a")
    assert gathered([one], tmp_path) is one


def test_nearest() -> None:
    assert nearest(["completion", "answer"], ["prompt", "anser"]) == "anser"
    assert nearest(["output"], ["OUTPUT", "outputs"]) == "OUTPUT"
    assert nearest(["completion"], ["id", "source"]) is None


def test_reading_rows_loads_nothing_heavy(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "q", "completion": "a"}])
    code = (
        "import sys; from pathlib import Path; from myna.data.rows import load_conversations; "
        "import myna.data.split; load_conversations(Path(sys.argv[1])); "
        "print([m for m in ('torch', 'transformers', 'pyarrow', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
