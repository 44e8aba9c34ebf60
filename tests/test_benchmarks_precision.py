"""The pure parts of the benchmark of what int8 and bf16 cost in quality."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from precision import FIRST, STORED, Learned, precision_page

EXACT = Learned("fp32", 0.2, 0.6, (0.5, 0.69), 100, (2.0, 1.0))


def test_near_is_a_hundredth_of_the_loss_and_inside_the_interval() -> None:
    assert EXACT.is_near(EXACT)
    assert replace(EXACT, held_out_loss=0.2019, exact_match=0.69).is_near(EXACT)
    assert replace(EXACT, held_out_loss=0.1981).is_near(EXACT)
    for other in (
        {"held_out_loss": 0.203},
        {"held_out_loss": 0.197},
        {"exact_match": 0.49},
        {"exact_match": 0.7},
    ):
        assert not replace(EXACT, **other).is_near(EXACT)


def test_the_precision_page_says_which_is_not_near() -> None:
    far = replace(EXACT, name="int8", held_out_loss=0.21)
    facts = dict.fromkeys(("date", "machine", "versions", "commit", "command"), "x")
    lines = precision_page([EXACT, far], facts).splitlines()
    assert "| fp32 | 0.2000 | +0.00% | 60% | 50% to 69% |  |" in lines
    assert "| int8 | 0.2100 | +5.00% | 60% | 50% to 69% | no |" in lines
    assert "| 2 | 1.0000 | 1.0000 |" in lines
    assert next(iter(STORED)) == FIRST
