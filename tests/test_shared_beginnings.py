"""A beginning that rows share lies in the pack once and answers as if each row had its own."""

from __future__ import annotations

from itertools import pairwise

import exactness
import numpy as np
import pytest
import torch
from exactness import ORDER_BOUND, PATH_BOUND, adapted, example, related_examples, require_same
from hypothesis import given, settings
from hypothesis import strategies as st

from myna.data.packing import MIN_SHARED, MOST_NESTED, Segment, collate
from myna.data.render import Example
from myna.engine.step import KernelsName, Stepper, make_stepper

# one head layout, norm and place for positions each; windows shorter than the shared trunk, caps in attention and head
FAMILIES = (
    "llama",
    "mistral-window",
    "gemma2-window",
    "gemma3_text-window",
    "phi3-window",
    "qwen3",
    "gpt_neox",
)


def new_stepper(family: str, dtype: torch.dtype, kernels: KernelsName) -> tuple[object, Stepper]:
    model = adapted(family, dtype)
    return model, make_stepper(model, "fast", kernels=exactness.kernels_named(kernels))


@exactness.each_kind
@pytest.mark.parametrize("family", FAMILIES)
def test_shared_equals_not_shared(family: str, kernels: KernelsName, dtype: torch.dtype) -> None:
    rows = related_examples()
    shared, apart = collate(rows, share=True), collate(rows)
    assert len(shared.input_ids_T) < 0.6 * len(apart.input_ids_T)
    assert shared.lengths == apart.lengths
    model, stepper = new_stepper(family, dtype, kernels)
    found = exactness.answer_of(stepper, model, [shared])
    expected = exactness.answer_of(stepper, model, [apart])
    require_same(found, expected, ORDER_BOUND[dtype], each=PATH_BOUND[dtype])


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_equals_the_plain_forward(family: str) -> None:
    rows = related_examples(seed=3)
    found = exactness.fast_answer(adapted(family, torch.float64), [collate(rows, share=True)])
    expected = exactness.reference_answer(adapted(family, torch.float64), [collate(rows)])
    require_same(found, expected, PATH_BOUND[torch.float64])


@exactness.each_kind
def test_a_row_does_not_notice_who_shares_its_beginning(kernels: KernelsName, dtype: torch.dtype) -> None:
    """The loss of one row alone in the loss, whatever tails the others have after the beginning that they share."""
    random = np.random.default_rng(5)
    trunk, tail = random.integers(3, 400, 19).tolist(), random.integers(3, 400, 9).tolist()
    _, stepper = new_stepper("mistral-window", dtype, kernels)

    def loss_beside(others: list[list[int]]) -> float:
        rows = [example(trunk + other, [False] * (19 + len(other))) for other in others]
        rows.insert(1, example(trunk + tail))
        return float(stepper.loss(collate(rows, share=True)).detach())

    alone = loss_beside([])
    for others in ([[5, 6, 7]], [[*tail[:4], 8, 9], [7]], [[], [11] * 30, tail]):
        assert loss_beside(others) == pytest.approx(alone, rel=1e-6 if dtype == torch.float32 else 1e-12)


@exactness.each_kind
def test_many_rows_and_long_ones(kernels: KernelsName, dtype: torch.dtype) -> None:
    """More tokens than a kernel takes at a time, in the trunk and in the branches."""
    random = np.random.default_rng(6)
    trunk = random.integers(3, 400, 300)
    rows = [example([*trunk[: 300 - 30 * k], *random.integers(3, 400, 9 + 29 * k)]) for k in range(8)]
    model, stepper = new_stepper("gemma2-window" if dtype == torch.float32 else "llama", dtype, kernels)
    shared, apart = collate(rows, share=True), collate(rows)
    assert len(shared.input_ids_T) < 0.6 * len(apart.input_ids_T)
    found = exactness.answer_of(stepper, model, [shared])
    require_same(
        found, exactness.answer_of(stepper, model, [apart]), 2 * ORDER_BOUND[dtype], each=PATH_BOUND[dtype]
    )


def test_a_tree_literally() -> None:
    first = example([5, 6, 7, 8, 20, 21])
    second = example([5, 6, 7, 8], [False, True, True, True])
    third = example([5, 6, 7, 30], [False, False, True, True])  # three alike are too few to share
    fourth = example([5, 6, 7, 8, 20], [False, False, True, True, True])
    batch = collate([first, second, third, fourth], share=True)
    assert batch.segments == (Segment(0, 4), Segment(4, 1, 0), Segment(5, 2, 0), Segment(7, 4))
    assert batch.documents == ((0, 2), (0,), (3,), (0, 1))
    assert batch.input_ids_T.tolist() == [5, 6, 7, 8, 20, 20, 21, 5, 6, 7, 30]
    assert batch.position_ids_T.tolist() == [0, 1, 2, 3, 4, 4, 5, 0, 1, 2, 3]
    assert batch.target_index_N.tolist() == [0, 1, 2, 3, 5, 0, 1, 2, 8, 9, 1, 2, 3]
    assert batch.targets_N.tolist() == [6, 7, 8, 20, 21, 6, 7, 8, 7, 30, 7, 8, 20]


tokens = st.lists(st.integers(0, 2), min_size=1, max_size=14)
many_rows = st.lists(tokens, min_size=1, max_size=9)


def test_beginnings_of_beginnings_end_somewhere() -> None:
    """A thousand rows, each the next one's beginning: no recursion as deep as that, and every row still its own."""
    rows = [list(range(MIN_SHARED * (n + 1))) for n in range(1200)]
    batch = collate([example(row) for row in rows], share=True)
    assert max(map(len, batch.documents)) <= MOST_NESTED + 1
    for number in (0, 1, 255, 256, 257, 1199):
        assert batch.input_ids_T[batch.tokens_of(number)].tolist() == rows[number]


@given(many_rows)
@settings(max_examples=150, deadline=None)
def test_every_tree_spells_its_rows(rows: list[list[int]]) -> None:
    made = [example(row) for row in rows]
    shared, apart = collate(made, share=True), collate(made)
    ids, positions = shared.input_ids_T.numpy(), shared.position_ids_T.numpy()
    for number, row in enumerate(rows):
        place = shared.tokens_of(number).numpy()
        assert ids[place].tolist() == row
        assert positions[place].tolist() == list(range(len(row)))
        path = shared.documents[number]
        assert [shared.segments[s].parent for s in path] == [-1, *path[:-1]]
    held = [t for s in shared.segments for t in range(s.start, s.start + s.length)]
    assert held == list(range(len(ids))), "every token of the pack stands in one segment"
    assert {s for path in shared.documents for s in path} == set(range(len(shared.segments)))
    assert all(segment.parent < number for number, segment in enumerate(shared.segments))
    assert len(ids) <= len(apart.input_ids_T)
    assert_nothing_is_twice(shared.segments, ids)
    require_same_targets(made, rows)


def assert_nothing_is_twice(segments: tuple[Segment, ...], ids: np.ndarray) -> None:
    """No two segments below one parent begin alike for as long as is worth sharing."""
    beginnings = [
        (s.parent, tuple(ids[s.start : s.start + MIN_SHARED])) for s in segments if s.length >= MIN_SHARED
    ]
    assert len(beginnings) == len(set(beginnings))


def require_same_targets(made: list[Example], rows: list[list[int]]) -> None:
    batch = collate(made, share=True)
    ids, starts = batch.input_ids_T, batch.target_index_N
    found = sorted(zip(ids[starts].tolist(), batch.targets_N.tolist(), strict=True))
    assert found == sorted(pair for row in rows for pair in pairwise(row))
