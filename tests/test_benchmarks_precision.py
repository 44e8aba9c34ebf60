"""The pure parts of the benchmark of what int8 and bf16 cost in quality."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from precision import FIRST, STORED, Learned, compare, precision_page

EXACT = Learned("fp32", 1, 0.2, 100, (2.0, 1.0), 0.6, (0.5, 0.69))


def learned(int8_loss: float, int8_right: float | None) -> list[Learned]:
    """Two seeds, the second with half the loss; bf16 as fp32."""
    int8 = {"name": "int8", "held_out_loss": int8_loss, "exact_match": int8_right}
    ones = [EXACT, replace(EXACT, name="bf16"), replace(EXACT, **int8)]
    return ones + [replace(one, seed=2, held_out_loss=one.held_out_loss / 2) for one in ones]


@pytest.mark.parametrize(
    ("loss", "right", "is_near"),
    [
        (0.2019, 0.69, True),
        (0.1981, 0.5, True),
        (0.203, 0.6, False),
        (0.197, 0.6, False),
        (0.2, 0.49, False),
        (0.2, 0.7, False),
        (0.2, None, True),
    ],
)
def test_near_is_a_hundredth_of_the_mean_loss_and_inside_each_interval(
    loss: float, right: float | None, is_near: bool
) -> None:
    first, bf16, int8 = compare(learned(loss, right))
    assert first.is_near and bf16.is_near and int8.is_near is is_near
    assert first.own_spread == pytest.approx(0.1 / 0.15)


def test_the_page_says_which_is_not_near() -> None:
    facts = dict.fromkeys(("date", "machine", "versions", "commit", "command"), "x")
    lines = precision_page(learned(0.21, 0.6), "demo", facts).splitlines()
    assert "| fp32 | 0.15000 |  | 67% |  |" in lines
    assert "| bf16 | 0.15000 | +0.00% | 67% | yes |" in lines
    assert "| int8 | 0.15750 | +5.00% | 67% | no |" in lines
    assert "| 2 | int8 | 0.10500 | 60% | 50% to 69% |" in lines
    assert "| 2 | 1.0000 | 1.0000 | 1.0000 |" in lines
    assert next(iter(STORED)) == FIRST
