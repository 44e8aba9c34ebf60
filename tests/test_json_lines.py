"""The quick way through a line of JSON: never another answer than the slow one that tells what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from myna.data import json_rows
from myna.data.conversation import Row
from myna.data.sources import scan_rows
from myna.errors import DataError

# what a key or a text is made of here: whatever could be taken for the end of a key
TEXTS = st.text(alphabet='ab":\\{} ,\t', max_size=6)
Pairs = list[tuple[str, Any]]


class _Object:
    """An object of JSON as its pairs, so that a key may stand in it twice."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs


VALUES = st.recursive(
    TEXTS | st.integers() | st.floats() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.lists(st.tuples(TEXTS, inner), max_size=4).map(_Object),
    max_leaves=8,
)
SPACES = st.sampled_from([":", ": ", " :", "\t: "])


def written(value: Any, colon: str) -> str:
    if isinstance(value, _Object):
        return "{" + ",".join(json.dumps(k) + colon + written(v, colon) for k, v in value.pairs) + "}"
    if isinstance(value, list):
        return "[" + ",".join(written(one, colon) for one in value) + "]"
    return json.dumps(value)


@given(st.lists(st.tuples(TEXTS, VALUES), max_size=4), SPACES)
@settings(max_examples=400, deadline=None)
@example([("a", 1), ("a", 2)], ":")
@example([("a", _Object([("b", 1), ("b", 2)]))], ": ")
@example([("a\\", 1), ("b", 2), ("b", 3)], ":")
@example([("b", 1), ("b", 2), ("a", 3)], " :")
def test_what_is_read_at_once_is_what_the_slow_way_reads(pairs: Pairs, colon: str) -> None:
    text = written(_Object(pairs), colon)
    slow, twice = json_rows._decode(text)
    quick = json_rows._read_line(text.encode())
    if quick is not None:
        assert not twice
        assert repr(quick) == repr(slow)


# what stands between two objects of a file, or in the place of one
BETWEEN = st.sampled_from(
    ["\n", "\n", "\n", "\r\n", "\r", "", " ", "\n\n", " \n", "\n ", "\n{}\n", "\nnull\n", "\n[{}\n{}]\n"]
)


@given(st.lists(st.tuples(st.lists(st.tuples(TEXTS, VALUES), max_size=3), SPACES, BETWEEN), max_size=6))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example([([("a", 1)], ":", ""), ([("a", 2)], ":", "\n"), ([("a", _Object([("a", 1)]))], "\n:", "\n")])
@example([([("a", 1), ("a", 2)], "\r:", "\n"), ([("a", 1)], ":", "\n")])
@example([([("a", 1)], "\r:", "\n")])
def test_many_lines_at_once_are_what_single_ones_are(
    tmp_path: Path, rows: list[tuple[Pairs, str, str]]
) -> None:
    path = tmp_path / "a.jsonl"
    text = "".join(written(_Object(pairs), colon) + end for pairs, colon, end in rows)
    path.write_bytes(b'{"a":0}\n' + text.encode())  # the first line says that it is no document
    with pytest.MonkeyPatch.context() as patched:
        at_once = [told(one) for one in scan_rows(path)]
        patched.setattr(json_rows, "_read_block", lambda block: None)
        assert [told(one) for one in scan_rows(path)] == at_once


def told(one: Row | DataError) -> str:
    return repr(one) if isinstance(one, Row) else str(one)


def test_ordinary_rows_take_the_quick_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"prompt": "q", "completion": "a", "id": 1, "score": 0.5, "none": None},
        {"messages": [{"role": "user", "content": "سلام"}, {"role": "assistant", "content": '{"a": "b"}'}]},
        {"prompt": 'say "yes": or not', "completion": "line\nbreak"},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    monkeypatch.setattr(json_rows, "_row_of_line", None)
    monkeypatch.setattr(json_rows, "_read_line", None)
    assert [row.values for row in scan_rows(path) if isinstance(row, Row)] == rows


@pytest.mark.parametrize(
    "content", [b'{"a": 1}\r\n\r\n{"a": 2}\r{"a": 3}', b'{"a": 1}\r\n\xc2\xa0\n{"a": 2}\n{"a": 3}']
)
def test_lines_end_and_are_blank_as_text_has_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    found = list(scan_rows(path))
    with path.open(encoding="utf-8") as file:
        numbers = [number for number, line in enumerate(file, start=1) if line.strip()]
    assert not any(isinstance(row, DataError) for row in found)
    assert [(row.place.line, row.values["a"]) for row in found if isinstance(row, Row)] == [
        (number, n) for n, number in enumerate(numbers, start=1)
    ]
