"""The demo's rows: always the same, wide, and no held-out pattern is a trained one."""

from __future__ import annotations

import json
import random
from pathlib import Path

from myna.demo import NUM_TEST, NUM_TRAIN, TEST_PATTERNS, TRAIN_PATTERNS, demo_recipe, make_rows, write_rows


def test_no_pattern_and_no_prompt_is_in_both(tmp_path: Path) -> None:
    assert not set(TRAIN_PATTERNS) & set(TEST_PATTERNS)
    assert all(pattern.count("{") == 5 for pattern in (*TRAIN_PATTERNS, *TEST_PATTERNS))
    train, test = (
        [json.loads(line) for line in path.read_text().splitlines()] for path in write_rows(tmp_path)
    )
    assert (len(train), len(test)) == (NUM_TRAIN, NUM_TEST)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    assert {tuple(json.loads(row["completion"])) for row in train} == {
        ("customer", "item", "quantity", "city", "day")
    }


def test_the_rows_are_always_the_same(tmp_path: Path) -> None:
    first, second = write_rows(tmp_path / "a"), write_rows(tmp_path / "b")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert make_rows(3, TRAIN_PATTERNS, random.Random(1)) != make_rows(3, TRAIN_PATTERNS, random.Random(2))


def test_the_answer_stands_in_the_order(tmp_path: Path) -> None:
    for row in make_rows(200, TRAIN_PATTERNS + TEST_PATTERNS, random.Random(5)):
        answer = json.loads(row["completion"])
        prompt = row["prompt"].lower()
        assert all(str(answer[key]).lower() in prompt for key in ("customer", "item", "city", "day"))
        if str(answer["quantity"]) not in prompt:
            assert answer["quantity"] <= 20


def test_its_recipe_takes_overrides(tmp_path: Path) -> None:
    recipe = demo_recipe(tmp_path, "x", ["train.max_steps=2"])
    assert (recipe.run.name, recipe.train.max_steps, recipe.model.base) == ("x", 2, "smollm2-135m")
