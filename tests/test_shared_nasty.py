"""Nasty public files that are half read, where a checkout has them: what of them is read, and what is said of the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Command
from test_shared_rows import there

from myna.data.conversation import Conversation, Place
from myna.data.render import load_chat_tokenizer, render_prompt
from myna.data.rows import ReadRows, read_conversations
from myna.data.sides import Learnt
from myna.errors import DataError
from myna.recipe import build_recipe
from myna.rendering import render_parts


def codes_at(read: ReadRows) -> dict[int, str]:
    """Code by line or row number."""
    return {
        int(str(error.where).replace(": row ", ":").rpartition(":")[2]): error.code for error in read.faults
    }


def test_numbers_are_texts_and_other_shapes_are_named(shared_data: Path) -> None:
    read = read_conversations(there(shared_data / "nasty", "wrong_types_mixed_schemas.jsonl"))
    assert read.detected and read.detected.name == "alpaca"
    assert [c.answer() for c in read.conversations] == ["b", "5", "b", "true"]
    assert codes_at(read) == {3: "D014", 4: "D014", 7: "D012", 8: "D011", 9: "D011"}
    told = {error.where.rpartition(":")[2]: error for error in read.faults if error.where}
    assert "Instruction, Output" in told["7"].message and "data.columns.instruction=Instruction" in str(
        told["7"].help
    )
    assert "prompt/answer (question, answer)" in told["9"].message


def test_odd_characters_come_through_and_half_ones_can_be_kept(
    myna: Command, shared_data: Path, tmp_path: Path
) -> None:
    path = there(shared_data / "nasty", "unicode_and_special_tokens.jsonl")
    read = read_conversations(path)
    assert codes_at(read) == {6: "D014"}
    given = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").split("\n") if line]
    assert [c.as_dicts() for c in read.conversations] == [turns for n, turns in enumerate(given) if n != 5]
    assert "\u2028" in read.conversations[7].messages[0].content and read.conversations[7].place == Place(
        str(path), 9
    )

    done = myna("data", "convert", str(path), "-o", "out.jsonl", "--on-bad-row", "quarantine")
    assert done.returncode == 0, done.stderr
    written = read_conversations(tmp_path / "out.jsonl").conversations
    assert [c.messages for c in written] == [c.messages for c in read.conversations]
    (kept,) = (tmp_path / "out.quarantine.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(kept)["row"] == path.read_bytes().split(b"\n")[5].decode() + "\n"


def test_cells_of_several_lines_and_records_that_break(shared_data: Path) -> None:
    read = read_conversations(there(shared_data / "nasty", "quotes_newlines.csv"))
    assert [(c.messages[0].content, c.answer()) for c in read.conversations] == [
        ("multi\nline", "a,b"),
        ('quote " here', "its"),
        ("=SUM(A1)", "formula"),
    ]
    assert codes_at(read) == {6: "D013", 7: "D013", 8: "D005", 9: "D005"}
    assert [c.place.line for c in read.conversations if c.place] == [2, 4, 5]


def test_one_conversation_alone_in_a_document_is_one_row(shared_data: Path) -> None:
    long = read_conversations(there(shared_data / "nasty", "real_conversation_long.json"))
    assert [len(c.messages) for c in long.conversations] == [12] and not long.faults
    missing = read_conversations(there(shared_data / "nasty", "real_conversation_missing_turns.json"))
    (error,) = missing.faults
    assert not missing.conversations and error.code == "D013" and "message 2 (assistant)" in error.message


def first_question(row: Conversation) -> Conversation:
    answers = (n for n, message in enumerate(row.messages) if message.role == "assistant")
    return Conversation(row.messages[: next(answers)])


def test_rows_that_are_far_too_long_are_counted_and_never_trained_without_an_answer(
    shared_data: Path, tiny_base: Path
) -> None:
    tokenizer = load_chat_tokenizer(tiny_base)
    rows = read_conversations(there(shared_data / "nasty", "very_long_rows.jsonl")).conversations
    settings = {"data": {"train": "rows.jsonl", "max_length": 512, "cut_long": True}}
    said: list[str] = []
    sources = [Learnt("rows.jsonl", rows)]
    examples, _ = render_parts(sources, tokenizer, build_recipe(settings), said.append)
    answered = [row for row in rows if len(render_prompt(first_question(row), tokenizer)) < 512]
    assert f"4 cut, {len(rows) - len(answered)} wholly masked and left out" in said[0]
    assert rows[0] not in answered and [one.place for one in examples] == [row.place for row in answered]
    assert all(one.num_targets for one in examples)
    with pytest.raises(DataError, match="4 of 5 rows are longer than 512 tokens") as caught:
        uncut = build_recipe({"data": settings["data"] | {"cut_long": False}})
        render_parts(sources, tokenizer, uncut, said.append)
    assert "data.max_length=" in str(caught.value.help)
