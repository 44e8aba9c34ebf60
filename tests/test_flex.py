"""Attention by block masks sees what the padded one sees; of the backward, which torch has on a GPU only, all around it."""

from __future__ import annotations

from typing import Any

import exactness
import pytest
import torch
from exactness import ORDER_BOUND, PATH_BOUND, adapted, related_examples, require_same

import myna.engine.flex
from myna.data.packing import collate
from myna.engine.flex import FlexKernels
from myna.engine.kernels import Norm, Rope
from myna.engine.layout import plan_layout
from myna.engine.native_check import attention_spec, small_pack
from myna.engine.torch_kernels import TorchKernels


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (13, None), (None, 5.0)])
def test_the_block_mask_is_the_padded_attention(window: int | None, softcap: float | None) -> None:
    layout, generator = plan_layout(small_pack()), torch.Generator().manual_seed(0)
    spec = attention_spec(4, 2, 32, 32, scale=0.3, window=window, softcap=softcap)
    num_tokens = len(layout.batch.input_ids_T)
    qkv = torch.randn(num_tokens, 8 * 32, generator=generator)
    angle = torch.randn(num_tokens, 16, generator=generator).repeat(1, 2)
    rope = Rope(angle.cos(), angle.sin())
    flex, plain = torch.empty(num_tokens, 128), torch.empty(num_tokens, 128)
    FlexKernels().attention(qkv, spec, rope, layout, flex)
    TorchKernels().attention(qkv, spec, rope, layout, plain)
    assert (flex - plain).norm() <= 1e-5 * plain.norm()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_large_heads_are_normed_in_float32() -> None:
    """fp16 holds 300, not its square."""
    layout, generator = plan_layout(small_pack()), torch.Generator().manual_seed(0)
    norm = Norm(torch.ones(32), None, 1e-6)
    spec = attention_spec(4, 2, 32, 32, scale=0.3, norm=norm)
    num_tokens = len(layout.batch.input_ids_T)
    qkv = (300 * torch.randn(num_tokens, 8 * 32, generator=generator)).half()
    qkv[:, 6 * 32 :] /= 300
    rope = Rope(torch.ones(num_tokens, 32), torch.zeros(num_tokens, 32))
    flex, plain = (torch.empty(num_tokens, 128, dtype=torch.float16) for _ in range(2))
    FlexKernels().attention(qkv, spec, rope, layout, flex)
    TorchKernels().attention(qkv, spec, rope, layout, plain)
    assert (flex.float() - plain.float()).norm() <= 1e-2 * plain.float().norm()


def dense_flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    score_mod: Any,
    block_mask: Any,
    scale: float,
    enable_gqa: bool,
) -> torch.Tensor:
    """What flex_attention computes, by its documented formula over all of [T, T]: with a backward on a CPU too."""
    num_heads, num_tokens = query.shape[1], query.shape[2]
    assert enable_gqa == (num_heads != key.shape[1])
    key, value = (x.repeat_interleave(num_heads // x.shape[1], 1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * scale
    scores = scores if score_mod is None else score_mod(scores, None, None, None, None)
    place = torch.arange(num_tokens)
    seen = block_mask.mask_mod(None, None, place[:, None], place[None, :])
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value


@pytest.mark.parametrize("family", exactness.FEW)
def test_a_step_by_block_masks_is_the_padded_step(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but flex_attention's own kernels: loss and gradients of a whole model over a tree of shared beginnings."""
    batch, dtype = [collate(related_examples(), share=True)], torch.float64
    plain = exactness.fast_answer(adapted(family, dtype), batch)
    monkeypatch.setattr(myna.engine.flex, "flex_attention", dense_flex)
    monkeypatch.setattr(myna.engine.flex, "_has_backward", lambda x: True)
    require_same(exactness.fast_answer(adapted(family, dtype), batch, "flex"), plain, ORDER_BOUND[dtype])

    def another(layout: Any, window: int | None) -> Any:
        return honest(layout, 4)

    honest = myna.engine.flex.block_mask
    monkeypatch.setattr(
        myna.engine.flex, "block_mask", another
    )  # a planted fault: every layer has a window of 4
    found = exactness.fast_answer(adapted(family, dtype), batch, "flex")
    assert not exactness.same(found, plain, PATH_BOUND[torch.float32])
