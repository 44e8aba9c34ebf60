"""Attention by block masks sees what the padded one sees: the forward, which torch has on a CPU too."""

from __future__ import annotations

import pytest
import torch

from myna.engine.flex import FlexKernels
from myna.engine.kernels import Rope, TorchKernels
from myna.engine.layout import plan_layout
from myna.engine.native_check import attention_spec, small_pack


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
