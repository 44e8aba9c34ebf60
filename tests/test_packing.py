"""Which rows make a step, what a pack looks like as tensors, and that how a step is cut changes nothing."""

from __future__ import annotations

from collections.abc import Sequence

import exactness
import numpy as np
import pytest
import torch

from myna.data.epochs import Order, Part
from myna.data.packing import Batch, Segment, collate, num_steps_an_epoch, plan_packs
from myna.data.render import IGNORE, Example
from myna.engine.step import KernelsName, make_stepper


@pytest.mark.parametrize(("num_rows", "batch_size", "pack_tokens"), [(1, 8, 10), (23, 4, 30), (64, 8, 1)])
def test_an_epoch_has_every_row_once(num_rows: int, batch_size: int, pack_tokens: int) -> None:
    lengths = [1 + (7 * row) % 19 for row in range(num_rows)]
    steps = plan_packs(lengths, seed=3, epoch=0, batch_size=batch_size, pack_tokens=pack_tokens)
    assert sorted(row for step in steps for pack in step for row in pack) == list(range(num_rows))
    assert len(steps) == num_steps_an_epoch(num_rows, batch_size)
    assert all(sum(len(pack) for pack in step) == batch_size for step in steps[:-1])
    for step in steps:
        for pack in step:
            assert len(pack) == 1 or sum(lengths[row] for row in pack) <= pack_tokens


def test_the_plan_is_a_pure_function() -> None:
    plan = [plan_packs([5] * 40, seed=1, epoch=e, batch_size=4, pack_tokens=99) for e in (0, 0, 1)]
    assert plan[0] == plan[1] != plan[2]
    other = plan_packs([5] * 40, seed=2, epoch=0, batch_size=4, pack_tokens=99)
    assert other != plan[0]


FEW = [1 + (7 * row) % 19 for row in range(10)]


def test_the_plans_of_before_there_were_orders_and_weights_are_as_they_were() -> None:
    """Frozen from the version without them: a resumed run must find its rows in the steps where they were."""
    first, second = (plan_packs(FEW, seed=3, epoch=epoch, batch_size=4, pack_tokens=30) for epoch in (0, 1))
    assert first == [((2, 9, 6, 0),), ((5, 7), (4, 1)), ((8, 3),)]
    assert second == [((8, 4), (2, 1)), ((5, 7, 0), (9,)), ((6, 3),)]


def test_the_orders_of_an_epoch_are_frozen() -> None:
    def steps(order: Order, epoch: int) -> list[list[int]]:
        planned = plan_packs(
            FEW,
            seed=3,
            epoch=epoch,
            batch_size=4,
            pack_tokens=30,
            parts=(Part(6, 1.5), Part(4, 0.5)),
            order=order,
        )
        return [sorted(row for pack in step for row in pack) for step in planned]

    assert FEW == [1, 8, 15, 3, 10, 17, 5, 12, 19, 7]
    assert [steps("file", epoch) for epoch in (0, 1)] == [
        [[0, 1, 2, 2], [3, 4, 4, 5], [5, 6, 7]],
        [[0, 0, 1, 1], [2, 3, 3, 4], [5, 8, 9]],
    ]
    assert [steps("length", epoch) for epoch in (0, 1)] == [
        [[0, 1, 3, 6], [2, 4, 4, 7], [2, 5, 5]],
        [[0, 0, 3, 3], [1, 1, 4, 9], [2, 5, 8]],
    ]
    assert [steps("shuffled", epoch) for epoch in (0, 1)] == [
        [[0, 2, 5, 6], [1, 3, 4, 7], [2, 4, 5]],
        [[0, 2, 4, 9], [0, 1, 3, 8], [1, 3, 5]],
    ]


def test_a_batch_literally() -> None:
    first = Example(np.array([5, 6, 7]), np.array([IGNORE, 6, 7]))
    second = Example(np.array([8, 9]), np.array([8, 9]))  # the first token of a document is never a target
    batch = collate([first, second])
    assert batch.input_ids_T.tolist() == [5, 6, 7, 8, 9]
    assert batch.position_ids_T.tolist() == [0, 1, 2, 0, 1]
    assert batch.target_index_N.tolist() == [0, 1, 3]
    assert batch.targets_N.tolist() == [6, 7, 9]
    assert batch.segments == (Segment(0, 3), Segment(3, 2))
    assert (batch.documents, batch.lengths) == (((0,), (1,)), (3, 2))
    assert batch.tokens_of(1).tolist() == [3, 4]
    assert len(batch.targets_N) == first.num_targets + second.num_targets


# rows of a step as packs of so many each; no pack shares what two packs have in common
SPLITS = [(8,), (4, 4), (2, 2, 2, 2), (1,) * 8, (5, 3)]


def split(rows: Sequence[Example], sizes: Sequence[int]) -> list[Batch]:
    ends = np.cumsum(sizes).tolist()
    return [collate(rows[end - size : end], share=True) for size, end in zip(sizes, ends, strict=True)]


@exactness.each_kind
@pytest.mark.parametrize("family", ["llama", "gemma2-window", "gpt_neox"])
def test_micro_batches_are_one_step(family: str, kernels: KernelsName, dtype: torch.dtype) -> None:
    """8×1 = 4×2 = 2×4 = 1×8: the loss is over the target tokens of the whole step."""
    rows = exactness.related_examples(seed=7)[:8]
    assert len({example.num_targets for example in rows}) > 4
    model = exactness.adapted(family, dtype)
    stepper = make_stepper(model, "fast", kernels=exactness.kernels_named(kernels))
    whole, *others = (exactness.answer_of(stepper, model, split(rows, sizes), mean=True) for sizes in SPLITS)
    for other in others:
        bound = exactness.ORDER_BOUND[dtype]
        exactness.require_same(other, whole, bound, each=exactness.PATH_BOUND[dtype])
