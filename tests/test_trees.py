"""Trees of replies: the best path, every path, one language; and messages that name their parent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from myna.data.rows import load_conversations, read_conversations
from myna.data.shapes import Reading


def node(text: str, role: str, *replies: Any, **more: Any) -> dict[str, Any]:
    return {"message_id": text, "text": text, "role": role, "replies": list(replies), **more}


#          ┌ a1 (rank 1) ─ u2 ─ a2
#   root ──┼ a0 (rank 0) ─ u3            u3 has no answer
#          └ gone (deleted, rank -1)
TREE = node(
    "root",
    "prompter",
    node("a1", "assistant", node("u2", "prompter", node("a2", "assistant")), rank=1),
    node("a0", "assistant", node("u3", "prompter"), rank=0),
    node("gone", "assistant", rank=-1, deleted=True),
    lang="en",
)


def paths(path: Path, **reading: Any) -> list[str]:
    loaded = load_conversations(path, reading=Reading(**reading))
    return [" ".join(m.content for m in c.messages) for c in loaded.conversations]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def nested(tmp_path: Path, *trees: Any) -> Path:
    return write(tmp_path / "a.jsonl", [{"message_tree_id": "t", "prompt": tree} for tree in trees])


def flat(root: dict[str, Any], parent: str | None = None) -> list[dict[str, Any]]:
    row = {key: value for key, value in root.items() if key != "replies"} | {"parent_id": parent}
    return [row, *(below for reply in root["replies"] for below in flat(reply, root["message_id"]))]


@pytest.mark.parametrize("shape", ["tree", "flat_tree"])
def test_the_best_path_and_every_path(tmp_path: Path, shape: str) -> None:
    path = nested(tmp_path, TREE) if shape == "tree" else write(tmp_path / "a.jsonl", flat(TREE))
    assert load_conversations(path).format_name == shape
    assert paths(path) == ["root a0"], "the best ranked reply, up to the last answer"
    assert paths(path, paths="all") == ["root a0", "root a1 u2 a2"]


def test_flat_messages_may_come_in_any_order(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", flat(TREE)[::-1])
    assert paths(path, paths="all") == ["root a0", "root a1 u2 a2"]


def test_unranked_replies_keep_their_order(tmp_path: Path) -> None:
    tree = node("q", "prompter", node("first", "assistant"), node("second", "assistant"))
    assert paths(nested(tmp_path, tree)) == ["q first"]
    assert paths(nested(tmp_path, tree), paths="all") == ["q first", "q second"]


def test_one_path_is_told_once(tmp_path: Path) -> None:
    """Two open questions under one answer leave the same conversation."""
    tree = node("q", "prompter", node("a", "assistant", node("u", "prompter"), node("v", "prompter")))
    assert paths(nested(tmp_path, tree), paths="all") == ["q a"]


def test_trees_of_one_language(tmp_path: Path) -> None:
    german = node("frage", "prompter", node("antwort", "assistant", lang="de"), lang="de")
    english = node("q", "prompter", node("a", "assistant", lang="en"), lang="en")
    path = nested(tmp_path, german, english)
    assert paths(path) == ["frage antwort", "q a"]
    assert paths(path, language="de") == ["frage antwort"]
    read = read_conversations(path, reading=Reading(language="fa"))
    assert [error.code for error in read.faults] == ["D020"]


def test_places_name_the_last_reply(tmp_path: Path) -> None:
    path = nested(tmp_path, TREE)
    (conversation,) = load_conversations(path).conversations
    assert str(conversation.place) == f"{path}:1, reply a0"


def faults(path: Path) -> list[tuple[str, str]]:
    return [(error.code, error.message) for error in read_conversations(path).faults]


def test_what_is_wrong_with_a_tree(tmp_path: Path) -> None:
    twice = node("q", "prompter", node("u", "prompter", node("a", "assistant")))
    empty = node("q", "prompter", node("", "assistant"))
    found = faults(nested(tmp_path, twice, empty, TREE))
    assert found == [
        ("D016", "turn 2 is from `prompter`, where assistant should speak"),
        ("D013", "turn 2 (assistant) is empty"),
    ]


def test_what_is_wrong_with_flat_messages(tmp_path: Path) -> None:
    rows = [
        *flat(node("q", "prompter", node("a", "assistant"))),
        {"message_id": "a", "parent_id": "q", "text": "again", "role": "assistant"},
        {"message_id": "b", "parent_id": "nobody", "text": "b", "role": "assistant"},
        {"message_id": "x", "parent_id": "y", "text": "x", "role": "assistant"},
        {"message_id": "y", "parent_id": "x", "text": "y", "role": "prompter"},
    ]
    path = write(tmp_path / "a.jsonl", rows)
    assert [code for code, _ in faults(path)] == ["D004", "D012", "D016", "D016"]
    assert [" ".join(m.content for m in c.messages) for c in read_conversations(path).conversations] == [
        "q a"
    ]


def test_a_long_thread_is_no_recursion(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    for n in range(1200):
        parent = None if n == 0 else str(n - 1)
        rows.append(
            {
                "message_id": str(n),
                "parent_id": parent,
                "text": str(n),
                "role": ("prompter", "assistant")[n % 2],
            }
        )
    (conversation,) = load_conversations(write(tmp_path / "a.jsonl", rows)).conversations
    assert len(conversation.messages) == 500
