"""The masks of LoRA dropout: their formula, one for every kernel, and as good as independent draws."""

from __future__ import annotations

import itertools

import exactness
import numpy as np
import pytest
import torch

import myna.engine.dropout
from myna.engine.dropout import PackMasks
from myna.engine.torch_kernels import TorchKernels

RATE = 0.3
DRAW = (42, 3, 1)
TOKENS, WIDTH, ADAPTERS = 70, 1100, 3


def kept(
    adapter: int = 0, rate: float = RATE, draw: tuple[int, ...] = DRAW, tokens: int = TOKENS
) -> torch.Tensor:
    return PackMasks(draw, tokens, ADAPTERS, WIDTH, torch.device("cpu")).of(adapter, WIDTH, rate).keep()


def test_a_mask_is_its_formula() -> None:
    mask = PackMasks(DRAW, TOKENS, ADAPTERS, WIDTH, torch.device("cpu")).of(1, WIDTH, RATE)
    rows, columns = (t.numpy().view(np.uint32) for t in (mask.rows_T, mask.columns_K))
    word = (rows[:, None] ^ columns) * np.uint32(0x21F0AAAD)
    word = word.view(np.int32)
    word = (word ^ (word >> 15)).view(np.uint32) * np.uint32(0xD35A2D97)
    expected = word.view(np.int32) >= round(RATE * 2**32) - 2**31
    assert np.array_equal(mask.keep().numpy(), expected)


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.5, 0.9, 1 - 1e-15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_kernel_keeps_the_same(rate: float, dtype: torch.dtype) -> None:
    found = []
    for kernels in (TorchKernels(), exactness.kernels_named("native")):
        mask = PackMasks(DRAW, TOKENS, 2, WIDTH, torch.device("cpu")).of(1, WIDTH - 5, rate)
        out = torch.zeros(TOKENS, WIDTH, dtype=dtype)[:, : WIDTH - 5]
        kernels.drop(torch.ones_like(out), mask, out)
        assert torch.equal(out != 0, mask.keep())
        found.append(out)
    assert torch.equal(*found)
    if 0 < rate < 0.9:
        assert float(found[0].double().mean()) == pytest.approx(1, abs=0.02)  # nothing is lost on the whole


def largest_deviation(rate: float) -> float:
    """In standard deviations of independent draws: rates of all, by row and by column; what masks, rows, columns, and the
    corners of squares have in common. The draws are fixed, so this is no matter of luck.
    """
    draws = (DRAW, (42, 3, 2), (42, 4, 1), (43, 3, 1))
    drawn = [kept(adapter, rate, draw).double() for adapter in range(ADAPTERS) for draw in draws]
    masks = [(mask - (1 - rate)) / (rate * (1 - rate)) ** 0.5 for mask in drawn]
    sums = [(a * b).mean() * a.numel() ** 0.5 for a, b in itertools.combinations(masks, 2)]
    for mask in masks:
        sums += [mask.mean() * mask.numel() ** 0.5, mask.mean(1) * WIDTH**0.5, mask.mean(0) * TOKENS**0.5]
        corners = mask[:-1:2, :-1:2] * mask[1::2, :-1:2] * mask[:-1:2, 1::2] * mask[1::2, 1::2]
        sums.append(corners.mean() * corners.numel() ** 0.5)
    for mask in masks[:2]:
        sums += [(mask @ mask.T / WIDTH**0.5).triu(1), (mask.T @ mask / TOKENS**0.5).triu(1)]
    return max(float(s.abs().max()) for s in sums)


@pytest.mark.parametrize("rate", [RATE, 0.5])
def test_masks_are_as_independent_draws(rate: float) -> None:
    """By adapter, step, pack and seed they differ, and no row or column tells of another."""
    assert largest_deviation(rate) < 6


@pytest.mark.parametrize("rate", [0.05, 0.95])
def test_the_rate_is_what_was_asked_for(rate: float) -> None:
    dropped = sum(int((~kept(adapter, rate)).sum()) for adapter in range(ADAPTERS))
    drawn = ADAPTERS * TOKENS * WIDTH
    assert abs(dropped - rate * drawn) < 4 * (drawn * rate * (1 - rate)) ** 0.5


def test_words_that_are_mixed_too_little_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(myna.engine.dropout, "SECOND", 1)
    assert largest_deviation(RATE) > 10


def test_a_token_keeps_its_mask_when_the_pack_grows() -> None:
    assert torch.equal(kept(2, tokens=TOKENS + 30)[:TOKENS], kept(2))
