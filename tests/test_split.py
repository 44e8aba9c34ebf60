"""Held-out rows: no prompt on both sides, nothing lost, the same every time."""

from __future__ import annotations

import random

import pytest

from myna.data.conversation import Conversation, Message, Place
from myna.data.split import drop_overlap, split_rows
from myna.errors import DataError


def ask(prompt: str, answer: str = "a", system: str | None = None) -> Conversation:
    messages = (Message("user", prompt), Message("assistant", answer))
    return Conversation(messages, Place("t.jsonl", 1)).with_system(system)


def prompts(conversations: tuple[Conversation, ...]) -> set[str]:
    return {c.messages[0].content for c in conversations}


MANY = [ask(f"prompt {n % 80}", f"answer {n}") for n in range(100)]


def test_every_row_once_in_order_and_no_prompt_on_two_sides() -> None:
    split = split_rows(MANY, test_fraction=0.2, validation_fraction=0.1, seed=1)
    sides = (split.train, split.validation, split.test)
    assert sorted(c.answer() for side in sides for c in side) == sorted(c.answer() for c in MANY)
    for side in sides:
        assert [MANY.index(c) for c in side] == sorted(MANY.index(c) for c in side)
    assert not prompts(split.train) & prompts(split.test)
    assert not prompts(split.train) & prompts(split.validation)
    assert not prompts(split.validation) & prompts(split.test)
    assert (len(split.test), len(split.validation)) == (20, 10)


def test_the_same_seed_is_the_same_split_and_another_is_not() -> None:
    first = split_rows(MANY, test_fraction=0.2, seed=1)
    assert split_rows(MANY, test_fraction=0.2, seed=1) == first
    assert split_rows(MANY, test_fraction=0.2, seed=2).test != first.test


def test_neither_order_nor_answers_nor_a_validation_part_decide() -> None:
    first = prompts(split_rows(MANY, test_fraction=0.2, seed=1).test)
    shuffled = random.Random(0).sample([ask(c.messages[0].content, "other") for c in MANY], len(MANY))
    assert prompts(split_rows(shuffled, test_fraction=0.2, seed=1).test) == first
    with_validation = split_rows(MANY, test_fraction=0.2, validation_fraction=0.3, seed=1)
    assert prompts(with_validation.test) == first


def test_few_rows_change_sides_when_rows_are_added() -> None:
    before = prompts(split_rows(MANY[:80], test_fraction=0.25, seed=1).test)
    after = prompts(split_rows([*MANY[:80], ask("new 1"), ask("new 2")], test_fraction=0.25, seed=1).test)
    assert len(before - after) <= 2


def test_the_system_text_is_part_of_the_prompt() -> None:
    rows = [ask("q", system=f"system {n}") for n in range(10)]
    assert len(split_rows(rows, test_fraction=0.3, seed=0).test) == 3


@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
@pytest.mark.parametrize("seed", range(5))
def test_two_prompts_give_one_to_each_side(fraction: float, seed: int) -> None:
    rows = [ask("x"), ask("x"), ask("x"), ask("y")]
    split = split_rows(rows, test_fraction=fraction, seed=seed)
    assert split.train and split.test and len(prompts(split.train)) == len(prompts(split.test)) == 1


@pytest.mark.parametrize("seed", range(5))
def test_three_prompts_for_three_parts(seed: int) -> None:
    rows = [ask("x"), ask("y"), ask("z")]
    split = split_rows(rows, test_fraction=0.9, validation_fraction=0.05, seed=seed)
    assert [len(split.train), len(split.validation), len(split.test)] == [1, 1, 1]


def test_a_prompt_of_many_rows_does_not_burst_the_held_out_part() -> None:
    rows = [ask("often")] * 90 + [ask(f"rare {n}") for n in range(10)]
    for seed in range(10):
        assert len(split_rows(rows, test_fraction=0.1, seed=seed).test) == 10


def test_nothing_is_held_out_unasked() -> None:
    split = split_rows([ask("x")], test_fraction=0, seed=0)
    assert (len(split.train), split.validation, split.test) == (1, (), ())


@pytest.mark.parametrize(
    ("rows", "test_fraction", "validation_fraction"),
    [
        ([ask("x")], 0.1, 0.0),
        ([ask("x", "a"), ask("x", "b")], 0.5, 0.0),
        ([ask("x"), ask("y")], 0.1, 0.1),
        (MANY, 0.5, 0.5),
        (MANY, 1.0, 0.0),
        ([], 0.1, 0.0),
    ],
)
def test_refused_where_nothing_is_left(
    rows: list[Conversation], test_fraction: float, validation_fraction: float
) -> None:
    with pytest.raises(DataError) as caught:
        split_rows(rows, test_fraction=test_fraction, validation_fraction=validation_fraction, seed=0)
    assert caught.value.code == "D020"
    assert "--set data.test_fraction=0" in str(caught.value.help)


def test_training_rows_that_stand_in_the_test_file_are_dropped() -> None:
    train = [ask("x"), ask("y"), ask("x", "another answer"), ask("x", system="s")]
    kept, num_dropped = drop_overlap(train, [ask("x", "the answer"), ask("z")])
    assert kept == (train[1], train[3])
    assert num_dropped == 2
    assert drop_overlap(train, []) == (tuple(train), 0)
