"""Public rows in many dresses, where a checkout has them beside it: all load to the same conversations."""

from __future__ import annotations

from pathlib import Path

import pytest

from myna.data.rows import load_conversations

DRESSES = (
    *("alpaca.json", "alpaca.jsonl", "alpaca.csv", "alpaca.parquet", "messages.jsonl", "sharegpt.json"),
    *("prompt_completion.jsonl", "question_answer.jsonl", "sharegpt_role_content.json"),
)


@pytest.mark.parametrize("name", DRESSES)
def test_every_dress_is_the_same_rows(shared_data: Path, name: str) -> None:
    path = shared_data / "formats" / name
    if not path.is_file():
        pytest.skip(f"the shared rows have no {name}")
    first = load_conversations(shared_data / "formats" / "question_answer.jsonl").conversations
    found = load_conversations(path).conversations
    assert len(found) == 120
    assert [c.messages[-2:] for c in found] == [c.messages[-2:] for c in first]
