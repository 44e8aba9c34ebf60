"""Every line of FORMATS: its example is found out as it, reads to the same conversation, and is refused when broken."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from myna.data.check import CODES
from myna.data.conversation import Message
from myna.data.formats import FORMATS, Format
from myna.data.rows import ReadRows, read_conversations

ASKED, ANSWERED = Message("user", "q"), Message("assistant", "a")
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
REPLY = {"text": "a", "role": "assistant", "replies": []}
QUESTION = {"question": "q", "answers": [{"text": "a"}]}


def node(parent: str | None, role: str, text: str) -> dict[str, Any]:
    """A message of ChatGPT's export."""
    content = {"content_type": "text", "parts": [text]}
    return {"parent": parent, "message": {"author": {"role": role}, "content": content}}


# The rows of one conversation, under our own names for the columns that are required; a new line needs its rows here.
ROWS: Mapping[str, list[dict[str, Any]]] = {
    "preference": [{"chosen": TURNS, "rejected": [TURNS[0], {"role": "assistant", "content": "b"}]}],
    "kto_messages": [{"messages": TURNS, "label": True}],
    "kto": [{"prompt": "q", "completion": "a", "label": False}],
    "messages": [{"messages": TURNS}],
    "sharegpt": [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}],
    "tree": [{"prompt": {"text": "q", "role": "prompter", "replies": [REPLY]}}],
    "flat_tree": [
        {"message_id": "1", "parent_id": None, "role": "prompter", "text": "q"},
        {"message_id": "2", "parent_id": "1", "role": "assistant", "text": "a"},
    ],
    "squad": [{"paragraphs": [{"context": "c", "qas": [QUESTION]}]}],
    "squad_flat": [{"context": "c", "question": "q", "answers": ["a"]}],
    "alpaca": [{"instruction": "q", "output": "a"}],
    "prompt_answer": [{"prompt": "q", "completion": "a"}],
    "classification": [{"text": "q", "label": "a"}],
    "chatgpt": [
        {"mapping": {"1": node(None, "user", "q"), "2": node("1", "assistant", "a")}, "current_node": "2"}
    ],
    "claude": [{"chat_messages": [{"sender": "human", "text": "q"}, {"sender": "assistant", "text": "a"}]}],
    "chat_log": [{"sender": "user", "text": "q"}, {"sender": "assistant", "text": "a"}],
    "transcript": [{"text": "User: q\nAssistant: a"}],
    "text": [{"text": "a"}],
}
ABOUT_A_TEXT = ("squad", "squad_flat")
MAY_BE_NULL = {("flat_tree", "parent_id")}
every_format = pytest.mark.parametrize("shape", FORMATS, ids=lambda shape: shape.name)


def wanted(shape: Format) -> tuple[Message, ...]:
    if shape.name == "text":
        return (ANSWERED,)
    return (Message("user", "c\n\nq") if shape.name in ABOUT_A_TEXT else ASKED, ANSWERED)


def read(folder: Path, rows: list[dict[str, Any]], **settings: Any) -> ReadRows:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_conversations(path, **settings)


def require_wanted(found: ReadRows, shape: Format, *first: Message) -> None:
    assert not found.faults, found.faults
    assert found.detected and found.detected.name == shape.name
    assert [one.messages for one in found.conversations] == [(*first, *wanted(shape))]


def renamed(shape: Format, names: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{names.get(key, key): value for key, value in row.items()} for row in ROWS[shape.name]]


def test_every_line_has_its_rows() -> None:
    assert set(ROWS) == {shape.name for shape in FORMATS}
    for shape in FORMATS:
        assert set(ROWS[shape.name][0]) == {column.name for column in shape.columns if column.required}


@every_format
def test_its_columns_are_found_out_as_it(shape: Format, tmp_path: Path) -> None:
    found = read(tmp_path, ROWS[shape.name])
    require_wanted(found, shape)
    assert found.detected and (found.detected.confidence, found.detected.ignored) == (1.0, ())


@every_format
def test_each_of_its_keys_is_read(shape: Format, tmp_path: Path) -> None:
    for column in shape.columns:
        for key in column.keys if column.required else ():
            found = read(tmp_path, renamed(shape, {column.name: key}), format_name=shape.name)
            require_wanted(found, shape)


@every_format
def test_its_columns_can_be_renamed(shape: Format, tmp_path: Path) -> None:
    names = {key: f"my {key}" for key in ROWS[shape.name][0]}
    found = read(tmp_path, renamed(shape, names), columns=names, format_name=shape.name)
    require_wanted(found, shape)


@every_format
def test_a_system_text_is_put_first(shape: Format, tmp_path: Path) -> None:
    if all(column.name != "system" for column in shape.columns):
        pytest.skip("this shape has no system text")
    if shape.name == "preference":
        rows = [{"prompt": "q", "chosen": "a", "rejected": "b", "system": "s"}]
    else:
        rows = [{**row, "system": "s"} for row in ROWS[shape.name]]
    require_wanted(read(tmp_path, rows), shape, Message("system", "s"))


@every_format
def test_a_required_column_left_out_or_empty_is_refused(shape: Format, tmp_path: Path) -> None:
    for name in ROWS[shape.name][0]:
        without = [{key: value for key, value in row.items() if key != name} for row in ROWS[shape.name]]
        found = read(tmp_path, without, format_name=shape.name)
        assert {error.code for error in found.faults} <= {"D012", "D010"} and found.faults, name
        if (shape.name, name) in MAY_BE_NULL:
            continue
        empty = [{**row, name: None} for row in ROWS[shape.name]]
        found = read(tmp_path, empty, format_name=shape.name)
        assert found.faults and not found.conversations, name
        assert "rows.jsonl" in str(found.faults[0].where)


@every_format
def test_it_is_read_from_every_kind_of_file(shape: Format, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = ROWS[shape.name]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with (
        pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as sink,
        pyarrow.ipc.new_file(sink, table.schema) as writer,
    ):
        writer.write_table(table)
    for path in sorted(tmp_path.iterdir()):
        require_wanted(read_conversations(path), shape)


def test_every_code_stands_in_the_docs() -> None:
    docs = Path(__file__).parents[2] / "docs"
    page = (docs / "data.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| (D\d+) \| (.+) \|$", page, re.MULTILINE) == list(CODES.items())
    faults = (docs / "data-faults.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (D\d+) (.+)$", faults, re.MULTILINE) == list(CODES.items())


def test_names_are_distinct_and_stand_in_the_docs() -> None:
    assert len({shape.name for shape in FORMATS}) == len(FORMATS)
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    for shape in FORMATS:
        (line,) = re.findall(rf"^\| `{shape.name}` \|.*$", page, re.MULTILINE)
        for column in shape.columns:
            missing = [key for key in column.keys if f"`{key}`" not in line]
            assert not missing or column.name == "system", (shape.name, missing)
