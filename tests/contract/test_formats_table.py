"""Every line of FORMATS: its example is found out as it, reads to the same conversation, and is refused when broken."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from myna.data.check import CODES
from myna.data.conversation import Message, Place, Row
from myna.data.formats import FORMATS, Format, detect_format, to_conversation
from myna.data.rows import load_conversations
from myna.errors import DataError

WANTED = (Message("user", "q"), Message("assistant", "a"))
# One row a line of the table, by the name of its first column; a new line needs its row here.
VALUES: dict[str, Any] = {
    "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
    "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
    "instruction": "q",
    "output": "a",
    "prompt": "q",
    "completion": "a",
}
every_format = pytest.mark.parametrize("shape", FORMATS, ids=lambda shape: shape.name)


def required(shape: Format) -> dict[str, Any]:
    return {column.name: VALUES[column.name] for column in shape.columns if column.required}


@every_format
def test_its_columns_are_found_out_as_it(shape: Format) -> None:
    row = Row(required(shape), Place("t", 1))
    found = detect_format([row])
    assert (found.name, found.confidence, found.ignored) == (shape.name, 1.0, ())
    assert to_conversation(row, found.name, found.keys).messages == WANTED


@every_format
def test_each_of_its_keys_is_read(shape: Format) -> None:
    for column in shape.columns:
        for key in column.keys if column.required else ():
            values = {key if name == column.name else name: one for name, one in required(shape).items()}
            conversation = to_conversation(Row(values, Place("t", 1)), shape.name, {})
            assert conversation.messages == WANTED


@every_format
def test_its_columns_can_be_renamed(shape: Format) -> None:
    renamed = {f"my {name}": one for name, one in required(shape).items()}
    columns = {name: f"my {name}" for name in required(shape)}
    row = Row(renamed, Place("t", 1))
    found = detect_format([row], columns=columns)
    assert found.name == shape.name
    assert to_conversation(row, shape.name, columns).messages == WANTED


@every_format
def test_a_system_text_is_put_first(shape: Format) -> None:
    row = Row({**required(shape), "system": "s"}, Place("t", 1))
    assert to_conversation(row, shape.name, {}).messages == (Message("system", "s"), *WANTED)


@every_format
def test_a_required_column_left_out_or_empty_is_refused(shape: Format) -> None:
    for name in required(shape):
        without = {key: one for key, one in required(shape).items() if key != name}
        for values, code in ((without, "D012"), ({**without, name: None}, "D013")):
            with pytest.raises(DataError) as caught:
                to_conversation(Row(values, Place("t", 1)), shape.name, {})
            assert caught.value.code == code and caught.value.where == "t:1"


@every_format
def test_it_is_read_from_every_kind_of_file(shape: Format, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [required(shape)] * 2
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for path in sorted(tmp_path.iterdir()):
        loaded = load_conversations(path)
        assert [one.messages for one in loaded.conversations] == [WANTED] * 2
        assert loaded.format_name == shape.name


def test_every_code_stands_in_the_docs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| (D\d+) \| (.+) \|$", page, re.MULTILINE) == list(CODES.items())


def test_names_are_distinct_and_stand_in_the_docs() -> None:
    assert len({shape.name for shape in FORMATS}) == len(FORMATS)
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    for shape in FORMATS:
        assert re.search(rf"`{shape.name}`", page)
        for column in shape.columns:
            assert all(f"`{key}`" in page for key in column.keys), column
