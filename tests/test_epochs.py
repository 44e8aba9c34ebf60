"""Which rows an epoch has where several files are mixed, and in which order they come."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from myna.data.epochs import Order, Part, epoch_rows, lengths_at_most, rows_an_epoch

LENGTHS = [int(n) for n in np.random.default_rng(0).integers(1, 99, 150)]
PARTS = (Part(100), Part(30, 2.0), Part(20, 0.3))


def rows(epoch: int, order: Order = "shuffled", seed: int = 7) -> list[int]:
    return epoch_rows(LENGTHS, PARTS, seed=seed, epoch=epoch, order=order).tolist()


@pytest.mark.parametrize("order", ["shuffled", "length", "file"])
def test_every_file_comes_as_often_as_its_weight_says(order: Order) -> None:
    for epoch in range(5):
        counts = Counter(rows(epoch, order))
        assert all(counts[row] == 1 for row in range(100))
        assert all(counts[row] == 2 for row in range(100, 130))
        assert sum(counts[row] for row in range(130, 150)) == 6
        assert counts.total() == rows_an_epoch(PARTS) == 166


def test_a_part_of_a_file_goes_on_where_the_last_epoch_ended() -> None:
    seen = Counter(row for epoch in range(10) for row in rows(epoch) if row >= 130)
    assert set(seen.values()) == {3} and len(seen) == 20  # 10 epochs of 6 rows, each of 20 as often
    first, second = (set(rows(epoch)) & set(range(130, 150)) for epoch in (0, 1))
    assert not first & second
    assert set(rows(0, seed=8)) != set(rows(0))


def test_orders() -> None:
    assert rows(0, "file") == sorted(rows(0))
    lengths = [LENGTHS[row] for row in rows(1, "length")]
    assert lengths == sorted(lengths)
    assert rows(0) == rows(0) != rows(1)


def test_weights_near_nothing_and_near_a_whole() -> None:
    assert Part(3, 0.01).rows_an_epoch == 1
    assert Part(3, 1.01).rows_an_epoch == 3
    assert Part(7, 2.5).rows_an_epoch == 18
    assert Part(0, 0.5).rows_an_epoch == 0


def test_a_long_row_may_stand_in_a_step_twice() -> None:
    assert lengths_at_most([1, 2, 3], (Part(1), Part(1, 1.5), Part(1, 0.5))) == [1, 2, 2, 3]
