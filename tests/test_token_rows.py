"""Rendered rows kept as tokens: the same rows again from memory and from a folder, also where writing was interrupted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from myna.data.conversation import Place
from myna.data.render import IGNORE, Example
from myna.data.token_rows import DONE, PROGRESS, TokenRows, TokenWriter, read_tokens

ROWS = [
    ([1, 2, 3], b"\0\1\1", 0, Place("a.jsonl", 1)),
    ([4], b"\1", 7, Place("b.jsonl", 3, "line", "question 5")),
    ([5, 6], b"\0\0", 0, None),
    ([65_535, 7], b"\1\0", 0, Place("a.jsonl", 9)),
]


def write(writer: TokenWriter, rows: Sequence[tuple[list[int], bytes, int, Place | None]]) -> None:
    for ids, trained, num_cut, place in rows:
        writer.add(ids, trained, num_cut=num_cut, place=place)


def require_rows(found: TokenRows) -> None:
    assert found.lengths.tolist() == [len(ids) for ids, _, _, _ in ROWS] and len(found) == len(ROWS)
    for example, (ids, trained, num_cut, place) in zip(found, ROWS, strict=True):
        assert example.input_ids_T.tolist() == ids and example.input_ids_T.dtype == np.int64
        assert example.labels_T.tolist() == [i if t else IGNORE for i, t in zip(ids, trained, strict=True)]
        assert (example.num_cut, example.place) == (num_cut, place)
    assert isinstance(found[-1], Example) and [e.place for e in found[1:3]] == [ROWS[1][3], None]


@pytest.mark.parametrize("vocab_size", [1 << 16, 1 << 17])
def test_rows_are_what_was_written(tmp_path: Path, vocab_size: int) -> None:
    for folder in (None, tmp_path / "a"):
        writer = TokenWriter(vocab_size, folder)
        write(writer, ROWS)
        require_rows(writer.finish({"n": 1}))
    found = read_tokens(tmp_path / "a")
    assert found and found[1] == {"n": 1}
    require_rows(found[0])


def test_an_interrupted_writer_goes_on_behind_what_it_had_committed(tmp_path: Path) -> None:
    first = TokenWriter(100_000, tmp_path)
    write(first, ROWS[:2])
    first.commit({"done": 2})
    write(first, ROWS[2:3])  # written to memory alone: lost
    with (tmp_path / "ids.bin").open("ab") as file:
        file.write(b"half a row")
    assert read_tokens(tmp_path) is None
    again = TokenWriter(100_000, tmp_path)
    assert again.facts == {"done": 2}
    write(again, ROWS[2:])
    require_rows(again.finish({"done": 4}))


@pytest.mark.parametrize("name", ["ids.bin", "trained.bin", "rows.bin", DONE])
@pytest.mark.parametrize("harm", ["cut", "flip", "gone"])
def test_what_is_damaged_is_not_used(tmp_path: Path, name: str, harm: str) -> None:
    writer = TokenWriter(100_000, tmp_path)
    write(writer, ROWS)
    writer.finish({})
    path = tmp_path / name
    content = path.read_bytes()
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes(
            content[: len(content) // 2] if harm == "cut" else bytes([content[0] ^ 1]) + content[1:]
        )
    assert read_tokens(tmp_path) is None
    (tmp_path / PROGRESS).unlink()
    again = TokenWriter(100_000, tmp_path)
    assert again.facts == {}
    write(again, ROWS)
    require_rows(again.finish({}))


def test_progress_that_promises_more_than_is_there_is_not_believed(tmp_path: Path) -> None:
    writer = TokenWriter(100_000, tmp_path)
    write(writer, ROWS[:2])
    writer.commit({"done": 2})
    state = json.loads((tmp_path / PROGRESS).read_text())
    (tmp_path / PROGRESS).write_text(json.dumps(state | {"tokens": state["tokens"] + 1}))
    assert TokenWriter(100_000, tmp_path).facts == {}
    (tmp_path / PROGRESS).write_text("{")
    assert TokenWriter(100_000, tmp_path).facts == {}


@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=5), min_size=1, max_size=8))
@settings(max_examples=50, deadline=None)
def test_any_rows(rows: list[list[int]]) -> None:
    writer = TokenWriter(100)
    for ids in rows:
        writer.add(ids, bytes(i % 2 for i in ids))
    found = writer.finish({})
    assert [e.input_ids_T.tolist() for e in found] == rows
    assert [e.num_targets for e in found] == [sum(i % 2 for i in ids[1:]) for ids in rows]
