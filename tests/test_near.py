"""Conversations that are nearly the same are found, others are not, and the numbers say which."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest

from myna.data import near
from myna.data.review import review_rows

WORDS = [f"word{n}" for n in range(400)]


def texts(count: int, length: int, seed: int = 0) -> list[list[str]]:
    drawn = random.Random(seed)
    return [drawn.choices(WORDS, k=length) for _ in range(count)]


def write(path: Path, rows: list[list[str]], beginning: str = "") -> Path:
    lines = (
        json.dumps({"prompt": beginning + " ".join(words[:-3]), "completion": " ".join(words[-3:])})
        for words in rows
    )
    path.write_text("\n".join(lines) + "\n")
    return path


def found(path: Path, **settings: bool) -> dict[str, tuple[int, tuple[tuple[str, str], ...]]]:
    return {f.code: (f.count, f.places) for f in review_rows(path, **settings).findings}


def test_one_word_in_a_hundred_is_nearly_the_same(tmp_path: Path) -> None:
    rows = texts(50, 100)
    changed = [list(rows[7]), list(rows[30])]
    for words in changed:
        words[20] = "other"
    path = write(tmp_path / "a.jsonl", [*rows, *changed, rows[3]])
    told = found(path)
    assert told["D038"] == (
        2,
        ((f"{path}:51", "nearly the same words as 8"), (f"{path}:52", "nearly the same words as 31")),
    )
    assert told["D030"][0] == 1, "the copy to the letter is told of as one"
    assert "D038" not in found(path, near=False)


@pytest.mark.parametrize("num_changed", [20, 60])
def test_other_texts_are_not(tmp_path: Path, num_changed: int) -> None:
    rows = texts(60, 60)
    drawn = random.Random(1)
    for words in rows[1:20]:
        words[:] = rows[0]
        for place in drawn.sample(range(60), num_changed):
            words[place] = f"own{drawn.random()}"
    assert found(write(tmp_path / "a.jsonl", rows)) == {}


def test_an_instruction_above_every_row_makes_none_alike(tmp_path: Path) -> None:
    beginning = "Name the intent of this sentence and nothing else, in one word of those that you know: "
    rows = texts(60, 12)
    assert found(write(tmp_path / "a.jsonl", rows, beginning)) == {}
    rows[40][:] = rows[12]
    rows[40][4] = "other"
    assert found(write(tmp_path / "b.jsonl", rows, beginning)) == {}, (
        "a word of twelve is in three of ten runs"
    )


def test_rows_past_the_limit_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near, "MOST_ROWS", 10)
    review = review_rows(write(tmp_path / "a.jsonl", texts(12, 20)))
    assert any("near duplicates past" in one for one in review.not_checked)


def test_without_the_library_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rensa", None)
    review = review_rows(write(tmp_path / "a.jsonl", texts(3, 20)))
    assert "near duplicates: pip install rensa" in review.not_checked and not review.findings


def test_rows_with_most_words_in_common_are_compared_with_some_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (shared,) = texts(1, 150, seed=3)
    own = texts(30, 12, seed=4)
    rows = [[f"ticket{n}", *shared, *words] for n, words in enumerate(own)]
    rows.append(["again", *rows[2][1:]])
    path = write(tmp_path / "a.jsonl", rows)
    assert review_rows(path).not_checked == ()
    monkeypatch.setattr(near, "MOST_RELATED", 5)
    review = review_rows(path)
    assert {f.code: f.count for f in review.findings} == {"D038": 1}
    (sentence,) = review.not_checked
    assert sentence.startswith("near duplicates of 2")
