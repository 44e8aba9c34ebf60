"""Preference pairs and labelled answers: read, checked, and refused for training with a cure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from myna.data.rows import load_conversations, read_conversations
from myna.errors import DataError

USER = {"role": "user", "content": "q"}


def said(text: str, role: str = "assistant") -> dict[str, str]:
    return {"role": role, "content": text}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


GOOD: dict[str, dict[str, Any]] = {
    "texts": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "lists of one": {"prompt": "q", "chosen": ["a"], "rejected": ["b"]},
    "whole conversations": {"chosen": [USER, said("a")], "rejected": [USER, said("b")]},
    "messages for answers": {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "b"},
    },
    "an instruction": {"instruction": "q", "input": "", "output": "a", "chosen": "a", "rejected": "b"},
    "under longer names": {"chosen_messages": [USER, said("a")], "rejected_messages": [USER, said("b")]},
}  # fmt: skip


@pytest.mark.parametrize("what", GOOD)
def test_every_dress_of_a_pair_is_read(tmp_path: Path, what: str) -> None:
    read = read_conversations(write(tmp_path / "a.jsonl", GOOD[what]))
    assert not read.faults and read.detected and read.detected.name == "preference"
    assert [m.content for m in read.conversations[0].messages] == ["q", "a"]


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "D018"),
        ({"prompt": "q", "chosen": "", "rejected": "b"}, "D013"),
        ({"chosen": [USER, said("a")], "rejected": [said("other", "user"), said("b")]}, "D018"),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, "D012"),
        ({"prompt": "q", "chosen": said("a", "user"), "rejected": "b"}, "D016"),
        ({"prompt": "q", "chosen": "a"}, "D011"),
    ],
    ids=str,
)
def test_a_pair_that_is_none_is_refused(tmp_path: Path, row: Any, code: str) -> None:
    good = GOOD["texts"]
    read = read_conversations(write(tmp_path / "a.jsonl", good, row, good))
    if row.keys() == {"prompt", "chosen"}:
        code = "D012"
    assert [(error.code, str(error.where).rpartition(":")[2]) for error in read.faults] == [(code, "2")]


def test_labels_that_are_true_or_false_are_kto_and_others_are_not(tmp_path: Path) -> None:
    row = {"messages": [USER, said("a")], "label": True}
    names = []
    for label in (True, "yes"):
        read = read_conversations(write(tmp_path / "a.jsonl", row | {"label": label}))
        assert read.detected
        names.append(read.detected.name)
    pair = read_conversations(write(tmp_path / "a.jsonl", {"prompt": "q", "completion": "a", "label": False}))
    assert pair.detected and [*names, pair.detected.name] == ["kto_messages", "messages", "kto"]


def test_they_are_not_trained_on_and_the_cure_is_another_shape(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not trained on yet") as caught:
        load_conversations(write(tmp_path / "a.jsonl", GOOD["an instruction"]))
    assert caught.value.code == "D017" and "data.format=alpaca" in str(caught.value.help)
    path = write(tmp_path / "a.jsonl", GOOD["an instruction"])
    assert load_conversations(path, format_name="alpaca").conversations[0].answer() == "a"
    with pytest.raises(DataError) as caught:
        load_conversations(write(tmp_path / "b.jsonl", GOOD["texts"]))
    assert "prompt and completion" in str(caught.value.help)
