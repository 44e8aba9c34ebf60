"""Questions about a text, nested and flat, answered and not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from myna.data.rows import load_conversations, read_conversations
from myna.data.shapes import Reading
from myna.errors import DataError

ANSWERED = {
    "id": "1",
    "question": "Who?",
    "answers": [{"text": "سارا", "answer_start": 3}, {"text": "x", "answer_start": 0}],
}
UNANSWERED = {"id": "2", "question": "Why?", "answers": [], "is_impossible": True}


def article(*questions: Any, context: Any = "Sara was there.") -> dict[str, Any]:
    return {"title": "t", "paragraphs": [{"context": context, "qas": list(questions)}]}


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def turns(path: Path, **settings: Any) -> list[tuple[str, ...]]:
    return [tuple(m.content for m in c.messages) for c in load_conversations(path, **settings).conversations]


def test_articles_become_a_conversation_for_each_question(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.json", {"version": "v2", "data": [article(ANSWERED, UNANSWERED), article(ANSWERED)]}
    )
    loaded = load_conversations(path)
    assert loaded.format_name == "squad"
    assert turns(path) == [
        ("Sara was there.\n\nWho?", "سارا"),
        ("Sara was there.\n\nWhy?", "unanswerable"),
        ("Sara was there.\n\nWho?", "سارا"),
    ]
    assert [str(c.place) for c in loaded.conversations][1] == f"{path}: row 1, question 2"
    assert "2 rows, SQuAD, by article" in loaded.said[0] and "3 conversations" in loaded.said[0]


def test_what_is_said_where_the_text_does_not_answer(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", {"data": [article(UNANSWERED)]})
    assert turns(path, reading=Reading(no_answer="نامشخص"))[0][1] == "نامشخص"


@pytest.mark.parametrize(
    "answers", [{"text": ["b"], "answer_start": [0]}, [{"text": "b"}], ["b"], "b", ["", "b"]], ids=str
)
def test_flat_rows_in_every_dress_of_their_answers(tmp_path: Path, answers: Any) -> None:
    row = {"id": "1", "context": "c", "question": "q", "answers": answers}
    path = write(tmp_path / "a.json", [row])
    assert load_conversations(path).format_name == "squad_flat"
    assert turns(path) == [("c\n\nq", "b")]


def test_a_flat_row_without_an_answer_is_unanswerable(tmp_path: Path) -> None:
    rows = [{"context": "c", "question": "q", "answers": {"text": [], "answer_start": []}}]
    assert turns(write(tmp_path / "a.json", rows))[0][1] == "unanswerable"


def test_a_context_is_never_left_out_in_silence(tmp_path: Path) -> None:
    """prompt/answer would read question and answer, and ignore what the question is about."""
    assert turns(write(tmp_path / "a.json", [{"context": "c", "question": "q", "answer": "a"}])) == [
        ("c\n\nq", "a")
    ]


@pytest.mark.parametrize(
    ("bad", "code", "said"),
    [
        (article({"id": "9", "question": "", "answers": [{"text": "a"}]}), "D013", "question 9"),
        (article({"id": "9", "question": "q"}), "D012", "`answers` is missing"),
        (article({"id": "9", "question": "q", "answers": [{"text": " "}]}), "D013", "question 9"),
        (article(ANSWERED, context=None), "D013", "question 1"),
        (article("q"), "D014", "question 1 is a text"),
        ({"paragraphs": [{"context": "c"}]}, "D012", "`qas`"),
        ({"paragraphs": []}, "D014", "`paragraphs` is empty"),
        ({"paragraphs": "p"}, "D014", "`paragraphs` is a text"),
    ],
)
def test_a_faulty_question_is_named_and_the_others_are_read(
    tmp_path: Path, bad: Any, code: str, said: str
) -> None:
    read = read_conversations(write(tmp_path / "a.json", [article(ANSWERED), bad, article(UNANSWERED)]))
    (error,) = read.faults
    assert isinstance(error, DataError) and error.code == code and said in str(error)
    assert len(read.conversations) == 2 and ": row 2" in str(error.where)
