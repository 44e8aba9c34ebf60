"""Held-out rows: no prompt on both sides, nothing lost, the same every time."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from myna.data.conversation import Conversation, Message, Place
from myna.data.split import Split, drop_overlap, split_rows
from myna.errors import DataError


def ask(prompt: str, answer: str = "a", system: str | None = None, group: str | None = None) -> Conversation:
    messages = (Message("user", prompt), Message("assistant", answer))
    return Conversation(messages, Place("t.jsonl", 1), group=group).with_system(system)


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
    assert drop_overlap(train, []) == (train, 0)


def test_splits_of_before_there_were_groups_and_labels_are_as_they_were() -> None:
    """Frozen from the version without them: a resumed run must find its rows on the side where they were."""
    split = split_rows(MANY, test_fraction=0.2, validation_fraction=0.1, seed=42)
    test = [3, 13, 14, 17, 19, 20, 21, 22, 32, 34, 50, 57, 73, 75, 78, 83, 93, 94, 97, 99]
    validation = [4, 18, 26, 46, 49, 54, 69, 72, 84, 98]
    assert [MANY.index(row) for row in split.test] == test
    assert [MANY.index(row) for row in split.validation] == validation
    with_system = split_rows(MANY, test_fraction=0.2, validation_fraction=0.1, seed=42, system="Be brief.")
    assert with_system == split


GROUPED = [ask(f"prompt {n}", group=f"customer {n % 37}") for n in range(400)]


def sides_of(split: Split) -> list[tuple[Conversation, ...]]:
    return [split.train, split.validation, split.test]


@pytest.mark.parametrize("seed", range(3))
def test_a_group_stays_on_one_side(seed: int) -> None:
    split = split_rows(GROUPED, test_fraction=0.2, validation_fraction=0.1, seed=seed)
    groups = [{row.group for row in side} for side in sides_of(split)]
    assert sum(map(len, groups)) == 37 and all(groups)
    assert len(split.test) == pytest.approx(80, abs=12)
    shuffled = split_rows(
        random.Random(1).sample(GROUPED, 400), test_fraction=0.2, validation_fraction=0.1, seed=seed
    )
    assert {row.group for row in shuffled.test} == groups[2]


def test_a_prompt_in_two_groups_ties_them_together() -> None:
    rows = [*GROUPED, ask("prompt 0", "other", group="customer 5")]  # prompt 0 is customer 0's
    for seed in range(20):
        split = split_rows(rows, test_fraction=0.3, seed=seed)
        where = [{row.group for row in side} for side in (split.train, split.test)]
        assert not where[0] & where[1]
        assert not {"customer 0", "customer 5"} & where[0] or {"customer 0", "customer 5"} <= where[0]


def test_rows_of_a_given_file_do_not_share_a_group_either() -> None:
    train = [ask("a", group="x"), ask("b", group="y")]
    assert drop_overlap(train, [ask("c", group="x")]) == ((train[1],), 1)


def test_prompts_that_the_system_text_makes_the_same_are_the_same() -> None:
    rows = [ask(f"q{n}", system=system) for n in range(50) for system in ("s", None)]
    for seed in range(5):
        split = split_rows(rows, test_fraction=0.3, seed=seed, system="s")
        assert not prompts_as_trained(split.train, "s") & prompts_as_trained(split.test, "s")
    assert drop_overlap([rows[0]], [rows[1]], "s") == ((), 1)
    assert drop_overlap([rows[0]], [rows[1]]) == ([rows[0]], 0)


def prompts_as_trained(rows: tuple[Conversation, ...], system: str) -> set[tuple[Message, ...]]:
    return {row.with_system(system).prompt().messages for row in rows}


LABELLED = [ask(f"text {n}", f"label {min(n % 10, n % 7)}") for n in range(500)] + [
    ask("once", "rare"),
    *(ask(f"twice {n}", "seldom") for n in range(2)),
]


@pytest.mark.parametrize("seed", range(4))
def test_each_label_gives_its_part_and_keeps_a_row(seed: int) -> None:
    split = split_rows(LABELLED, test_fraction=0.2, validation_fraction=0.1, seed=seed, stratify=True)
    counts = Counter(row.answer() for row in LABELLED)
    train, validation, test = (Counter(row.answer() for row in side) for side in sides_of(split))
    assert (len(split.test), len(split.validation)) == (101, 50)
    for label, size in counts.items():
        assert train[label] >= 1
        assert abs(test[label] - 0.2 * size) <= 1 and abs(validation[label] - 0.1 * size) <= 1
    assert not prompts(split.train) & prompts(split.test)


def test_a_label_keeps_its_last_row_where_nearly_all_is_held_out() -> None:
    rows = [ask(f"text {n}", str(n % 2)) for n in range(10)]
    split = split_rows(rows, test_fraction=0.55, validation_fraction=0.44, seed=0, stratify=True)
    assert {row.answer() for row in split.train} == {"0", "1"}


def test_a_group_of_many_labels_is_held_out_whole() -> None:
    rows = [ask(f"text {n}", f"label {n % 4}", group=f"g{n // 8}") for n in range(400)]
    split = split_rows(rows, test_fraction=0.2, seed=0, stratify=True)
    groups = [{row.group for row in side} for side in (split.train, split.test)]
    assert not groups[0] & groups[1]
    assert set(Counter(row.answer() for row in split.test).values()) == {20}


def test_answers_that_are_texts_are_no_labels() -> None:
    with pytest.raises(DataError, match="100 different answers") as caught:
        split_rows(MANY, test_fraction=0.2, seed=0, stratify=True)
    assert caught.value.help == "--set data.stratify=false"
    rows = [ask(f"text {n}", str(n % 2), group=str(n % 2)) for n in range(10)]
    with pytest.raises(DataError, match="no row can be held out so that each of 2 labels keeps one"):
        split_rows(rows, test_fraction=0.2, seed=0, stratify=True)
