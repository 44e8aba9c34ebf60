"""Questions about a text (SQuAD v1 and v2, and sets in their shape): nested by article, or flat.

{"title", "paragraphs": [{"context", "qas": [{"id", "question", "answers": [{"text", "answer_start"}], "is_impossible"}]}]}
{"id", "context", "question", "answers": {"text": [...], "answer_start": [...]}}, or a text under answer

The user's turn is the text, a blank line, the question; the answer is the first that is given. Rajpurkar et al. 2016, 2018.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from msgspec.structs import replace

from myna.data.check import fault, shown
from myna.data.conversation import Conversation, Message, Place, Row
from myna.data.json_rows import kind_of
from myna.data.shapes import Keys, Made, Reading, is_objects, text_of
from myna.data.turns import is_true, read_text
from myna.errors import DataError


def read_articles(row: Row, keys: Keys, reading: Reading) -> Made:
    """Every question of an article; a fault names the question."""
    key = keys["paragraphs"]
    paragraphs = row.values[key]
    if not is_objects(paragraphs):
        what = "empty" if paragraphs == [] else f"{kind_of(paragraphs)}, not a list of objects"
        yield fault("D014", f"`{key}` is {what}", where=row.place)
        return
    for number, paragraph in enumerate(paragraphs, start=1):
        place = replace(row.place, part=f"paragraph {number}")
        questions = paragraph.get("qas")
        if not isinstance(questions, list):
            yield fault("D012", "`qas`, the list of questions, is missing", where=place)
            continue
        for count, question in enumerate(questions, start=1):
            if not isinstance(question, dict):
                yield fault("D014", f"question {count} is {kind_of(question)}, not an object", where=place)
                continue
            named = question.get("id", f"{number}.{count}")
            own = replace(row.place, part=f"question {shown(str(named))}")
            yield from _read_question(paragraph.get("context"), question, own, reading)


def read_question(row: Row, keys: Keys, reading: Reading) -> Made:
    """One question a row."""
    try:
        context, question = text_of(row, keys["context"]), text_of(row, keys["question"])
        answer = _answer_of(row.values[keys["answers"]], row.values, row.place, reading)
        yield _asked(context, question, answer, row.place)
    except DataError as error:
        yield error


def _read_question(context: Any, question: Mapping[str, Any], place: Place, reading: Reading) -> Made:
    try:
        asked = read_text(question.get("question"), "`question`", place)
        answer = _answer_of(question.get("answers"), question, place, reading)
        yield _asked(read_text(context, "`context`", place), asked, answer, place)
    except DataError as error:
        yield error


def _asked(context: str, question: str, answer: str, place: Place) -> Conversation:
    return Conversation((Message("user", f"{context}\n\n{question}"), Message("assistant", answer)), place)


def _answer_of(answers: Any, values: Mapping[str, Any], place: Place, reading: Reading) -> str:
    """The first answer that is not empty; `no_answer` where there is none and none is meant to be."""
    if isinstance(answers, dict) and "text" not in answers:
        raise fault("D012", "`answers` has no `text`", where=place)
    texts = list(_texts(answers))
    given = next((text for text in texts if isinstance(text, str) and text.strip()), None)
    impossible = is_true(values.get("is_impossible"))
    if impossible or (given is None and not texts):
        if answers is None and not impossible:
            raise fault("D012", "`answers` is missing", where=place)
        return reading.no_answer
    return read_text(given if given is not None else texts[0], "the answer", place)


def _texts(answers: Any) -> Iterator[Any]:
    """The texts of [{"text": ...}], of {"text": [...]}, of [...], of one text."""
    if isinstance(answers, dict):
        answers = answers.get("text")
    if isinstance(answers, str | int | float):
        answers = [answers]
    for answer in answers if isinstance(answers, list) else []:
        yield answer.get("text") if isinstance(answer, dict) else answer
