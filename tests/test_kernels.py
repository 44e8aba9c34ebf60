"""Each kernel against float64 torch: odd widths, strides, both number formats. What C computes is what torch says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import exactness
import pytest
import torch

from myna.data.packing import collate
from myna.engine.kernels import ActivationName, AttentionSpec, Kernels, LowRankTerm, Norm, Rope
from myna.engine.layout import plan_layout
from myna.engine.step import KernelsName, best_kernels
from myna.engine.torch_kernels import TorchKernels

# one rounding of the result and the sums' own: what a float32 or bfloat16 answer may be off by, by norm
BOUND = {torch.float32: 2e-6, torch.bfloat16: 4e-3}
EXACT = TorchKernels()
kinds = pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in ("torch", "native") for dtype in BOUND],
    ids=lambda value: str(value).removeprefix("torch."),
)


def strided(*shape: int, dtype: torch.dtype, extra: int = 3, seed: int = 0) -> torch.Tensor:
    """Random numbers in a view whose rows are longer than what they show."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(*shape[:-1], shape[-1] + extra, generator=generator)
    return wide.to(dtype)[..., : shape[-1]]


def double(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def off(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@kinds
@pytest.mark.parametrize("width", [1, 15, 64, 100, 577])
def test_rms_norm(name: KernelsName, dtype: torch.dtype, width: int) -> None:
    kernels = exactness.kernels_named(name)
    weight = 1 + 0.3 * torch.randn(width, generator=torch.Generator().manual_seed(9))
    x, g, plus = (strided(11, width, dtype=dtype, seed=seed) for seed in range(3))
    norm, exact_norm = Norm(weight, None, 1e-5), Norm(weight.double(), None, 1e-5)
    found, exact = (torch.empty_like(strided(11, width, dtype=kind)) for kind in (dtype, torch.float64))
    stats, exact_stats = kernels.norm(x, norm, found), EXACT.norm(x.double(), exact_norm, exact)
    assert off(found, exact) <= BOUND[dtype]
    for added in (None, plus):
        back = kernels.norm_back(g, x, norm, stats, added)
        # a width of 1 has no gradient in x but what is added
        exact_back = EXACT.norm_back(g.double(), x.double(), exact_norm, exact_stats, double(added))
        assert float((back.double() - exact_back).norm()) <= BOUND[dtype] * (float(exact_back.norm()) + 1)


@kinds
def test_layer_norm(name: KernelsName, dtype: torch.dtype) -> None:
    kernels, generator = exactness.kernels_named(name), torch.Generator().manual_seed(9)
    weight, bias = 1 + 0.3 * torch.randn(70, generator=generator), torch.randn(70, generator=generator)
    x, g = (strided(11, 70, dtype=dtype, seed=seed) for seed in range(2))
    found = torch.empty_like(x)
    stats = kernels.norm(x, Norm(weight, bias, 1e-5, centred=True), found)
    leaf = x.double().requires_grad_()
    exact = torch.nn.functional.layer_norm(leaf, (70,), weight.double(), bias.double(), 1e-5)
    assert off(found, exact.detach()) <= BOUND[dtype]
    exact.backward(g.double())
    back = kernels.norm_back(g, x, Norm(weight, bias, 1e-5, centred=True), stats, None)
    assert leaf.grad is not None and off(back, leaf.grad) <= BOUND[dtype]


ACTS: dict[ActivationName, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}


@kinds
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", ACTS)
def test_gate(name: KernelsName, dtype: torch.dtype, activation: ActivationName, gated: bool) -> None:
    kernels, width = exactness.kernels_named(name), 37
    h = 4 * strided(9, width * (2 if gated else 1), dtype=dtype)
    g = strided(9, width, dtype=dtype, seed=1)
    found, out, again = torch.empty_like(g), torch.empty_like(h), torch.empty_like(g)
    kernels.gate(h, activation, gated, found)
    leaf = h.double().requires_grad_()
    act = ACTS[activation]
    exact = act(leaf[:, :width]) * leaf[:, width:] if gated else act(leaf)
    exact.backward(g.double())
    kernels.gate_back(g, h, activation, gated, out, again)
    assert leaf.grad is not None
    assert off(found, exact.detach()) <= BOUND[dtype] and off(out, leaf.grad) <= 1.5 * BOUND[dtype]
    assert torch.equal(again, found)


def spec_of(heads: int, kv_heads: int, width: int, rotary: int, **more: Any) -> AttentionSpec:
    return AttentionSpec(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=width,
        rotary_dim=rotary,
        scale=width**-0.5,
        query_at=0,
        query_step=width,
        key_at=heads * width,
        value_at=(heads + kv_heads) * width,
        kv_step=width,
        **more,
    )


def head_norm(width: int, seed: int) -> Norm:
    return Norm(1 + 0.3 * torch.randn(width, generator=torch.Generator().manual_seed(seed)), None, 1e-5)


ATTENTION = {
    "plain": spec_of(4, 4, 16, 16),
    "grouped": spec_of(6, 2, 32, 32),
    "a part turned, not in whole vectors": spec_of(2, 1, 48, 12),
    "wide heads": spec_of(2, 1, 112, 112),
    "window": spec_of(4, 2, 16, 16, window=7),
    "window of one": spec_of(2, 2, 16, 16, window=1),
    "softcap": spec_of(4, 2, 16, 16, softcap=1.5),
    "window and softcap": spec_of(4, 2, 32, 32, window=40, softcap=2.0),
    "head norms": spec_of(4, 2, 64, 64, query_norm=head_norm(64, 1), key_norm=head_norm(64, 2)),
    "side by side": replace(
        spec_of(3, 3, 16, 4), query_at=0, query_step=48, key_at=16, value_at=32, kv_step=48
    ),
    "heads that C does not take": spec_of(2, 1, 20, 20),
}


def exact_spec(spec: AttentionSpec) -> AttentionSpec:
    norms = [n and Norm(n.weight_d.double(), None, n.eps) for n in (spec.query_norm, spec.key_norm)]
    return replace(spec, query_norm=norms[0], key_norm=norms[1])


def attend(
    kernels: Kernels, spec: AttentionSpec, lengths: Sequence[int], dtype: torch.dtype, share: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The answer and the gradient of one attention, on numbers that bfloat16 holds exactly."""
    rows = exactness.related_examples() if share else exactness.examples(lengths)
    batch = collate(rows, share=share)
    num_tokens, heads_width = len(batch.input_ids_T), spec.num_heads * spec.head_dim
    turn = torch.randn(num_tokens, spec.rotary_dim, generator=torch.Generator().manual_seed(4))
    rope = Rope(turn.cos().to(_high(dtype)), turn.sin().to(_high(dtype)))
    columns = heads_width + 2 * spec.num_kv_heads * spec.head_dim
    qkv = strided(num_tokens, columns, dtype=torch.bfloat16, seed=5).to(dtype)
    g = strided(num_tokens, heads_width, dtype=torch.bfloat16, seed=6).to(dtype)
    answer, gradient = torch.empty_like(g), torch.full_like(qkv, torch.nan)
    layout = plan_layout(batch)
    saved = kernels.attention(qkv, spec, rope, layout, answer)
    kernels.attention_back(g, qkv, answer, saved, spec, rope, layout, gradient)
    return answer, gradient


def _high(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@kinds
@pytest.mark.parametrize("case", ATTENTION)
def test_attention(name: KernelsName, dtype: torch.dtype, case: str) -> None:
    kernels, spec = exactness.kernels_named(name), ATTENTION[case]
    for lengths, share in (((70, 3, 1, 24, 131), False), ((), True)):
        found = attend(kernels, spec, lengths, dtype, share)
        exact = attend(EXACT, exact_spec(spec), lengths, torch.float64, share)
        assert off(found[0], exact[0]) <= BOUND[dtype]
        assert off(found[1], exact[1]) <= 2 * BOUND[dtype]


@pytest.mark.parametrize("window", [None, 600])
def test_attention_over_a_long_row(window: int | None) -> None:
    spec = spec_of(1, 1, 16, 16, window=window)
    found = attend(exactness.kernels_named("native"), spec, (4300, 5), torch.float32)
    expected = attend(TorchKernels(), spec, (4300, 5), torch.float32)
    assert off(found[0], expected[0].double()) <= BOUND[torch.float32]
    assert off(found[1], expected[1].double()) <= 3 * BOUND[torch.float32]


@kinds
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("vocabulary", [17, 400, 50_257])
def test_loss(name: KernelsName, dtype: torch.dtype, vocabulary: int, softcap: float | None) -> None:
    kernels = exactness.kernels_named(name)
    logits = 5 * strided(6, vocabulary, dtype=dtype, extra=0)
    targets = torch.randint(vocabulary, (6,), generator=torch.Generator().manual_seed(2))
    targets[0], targets[1] = 0, vocabulary - 1
    leaf = logits.double().requires_grad_()
    capped = leaf if softcap is None else softcap * torch.tanh(leaf / softcap)
    exact = torch.nn.functional.cross_entropy(capped, targets, reduction="sum")
    exact.backward()
    loss = kernels.loss_back(logits, targets, softcap)
    assert float(loss) == pytest.approx(exact.item(), rel=2e-6)
    assert leaf.grad is not None and off(logits, leaf.grad) <= 2 * BOUND[dtype]


@kinds
def test_a_loss_of_huge_logits_is_finite(name: KernelsName, dtype: torch.dtype) -> None:
    logits = torch.tensor([[3e4, -3e4, 0.0, 3e4]]).to(dtype)
    loss = exactness.kernels_named(name).loss_back(logits, torch.tensor([1]), None)
    assert float(loss) == pytest.approx(6e4, rel=0.01)
    expected = torch.tensor([[0.5, -1.0, 0.0, 0.5]])
    torch.testing.assert_close(logits.float(), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("width", [5, 64, 333])
def test_int8_rows_in_c_are_those_in_torch(dtype: torch.dtype, folded: bool, width: int) -> None:
    """The same scales; at an exact half two correct roundings may part by one."""
    x, native = strided(50, width, dtype=dtype), exactness.kernels_named("native")
    x[3] = 0
    fold = torch.rand(width, generator=torch.Generator().manual_seed(3)) if folded else None
    found, scale = native.quantize_rows(x, fold)
    expected, expected_scale = EXACT.quantize_rows(x, fold)
    torch.testing.assert_close(scale, expected_scale, rtol=2e-7, atol=0.0)
    apart = (found.int() - expected.int()).abs()
    assert int(apart.max()) <= 1 and float(apart.float().mean()) <= 1e-3
    assert not found[3].any() and float(scale[3]) == 0
    assert int(expected.abs().amax()) == 127


def low_term(rows: int, width: int, dtype: torch.dtype) -> LowRankTerm:
    """Three parts on columns that are no multiple of anything, the first columns nobody's."""
    h, m = strided(rows, 37, dtype=dtype, seed=3), torch.zeros(37, width + 2).to(dtype)[:, :width]
    blocks = [[2, 3, 0, 2], [3, 20, 2, 36], [20, width, 36, 37]]
    for start, stop, first, last in blocks:
        m[first:last, start:stop] = strided(last - first, stop - start, dtype=dtype, seed=stop)
    return LowRankTerm(h, m, torch.tensor(blocks))


# one row and one rank, more than a panel or chunk of each, multiples of vectors and none
# the last: more ranks than an outer product takes at a time
LOW_RANK = [(1, 1, 1), (3, 5, 2), (16, 128, 16), (67, 130, 21), (130, 300, 48), (65, 129, 77), (9, 40, 523)]


@kinds
@pytest.mark.parametrize(("rows", "width", "ranks"), LOW_RANK)
def test_low_rank_products(name: KernelsName, dtype: torch.dtype, rows: int, width: int, ranks: int) -> None:
    kernels = exactness.kernels_named(name)
    x, m = strided(rows, width, dtype=dtype), strided(width, ranks, dtype=dtype, seed=1)
    wide = torch.full((rows, ranks + 2), torch.nan).to(dtype)
    kernels.low_rank(x, m, wide[:, 1 : ranks + 1])
    assert off(wide[:, 1 : ranks + 1], x.double() @ m.double()) <= BOUND[dtype]
    assert wide[:, [0, ranks + 1]].isnan().all(), "written beside its place"


@kinds
@pytest.mark.parametrize(("rows", "width", "ranks"), LOW_RANK)
def test_outer_products_are_added(
    name: KernelsName, dtype: torch.dtype, rows: int, width: int, ranks: int
) -> None:
    """To tensors that lie apart, on what is in them, in float32 where the products are; and turned."""
    kernels, before = exactness.kernels_named(name), strided(ranks, width, dtype=torch.float32, seed=2)
    x, g = strided(rows, width, dtype=dtype), strided(rows, ranks, dtype=dtype, seed=1)
    into = [part.clone() for part in before.split(-(-ranks // 3))]
    kernels.add_outer(g, x, into, 0.3)
    exact = before.double() + 0.3 * g.double().T @ x.double()
    bound = BOUND[torch.float32 if name == "native" else dtype]
    most = bound * (
        float(exact.norm()) + 1
    )  # where product and what was there cancel, each has its own rounding
    assert float((torch.cat(into) - exact).norm()) <= most
    turned = before.T.contiguous()
    kernels.add_outer(x, g, [turned], 0.3)
    assert float((turned - exact.T).norm()) <= most


def test_an_outer_product_is_added_to_narrow_gradients() -> None:
    """Where the adapter's own parameters are bfloat16."""
    x, g, into = (torch.ones(shape).bfloat16() for shape in ((9, 5), (9, 2), (2, 5)))
    exactness.kernels_named("native").add_outer(g, x, [into], 2)
    assert torch.equal(into, torch.full((2, 5), 19.0).bfloat16())


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("whole", [False, True])
def test_dequantize_in_c_is_that_in_torch(dtype: torch.dtype, whole: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    sums = torch.randint(-900_000, 900_000, (13, 45), dtype=torch.int32, generator=generator)
    row, column = torch.rand(13, generator=generator), torch.rand(45, generator=generator)
    low, bias = low_term(13, 45, dtype), strided(45, dtype=dtype, extra=0)
    more: dict[str, Any] = dict.fromkeys(("column_scale", "low", "bias"))
    if whole:
        more = {"column_scale": column, "low": low, "bias": bias}
    exact_low = LowRankTerm(low.h_TR.double(), low.m_RN.double(), low.blocks_B4)
    exact_more = {name: exact_low if value is low else double(value) for name, value in more.items()}
    found = exactness.kernels_named("native").dequantize(sums, row, **more, dtype=dtype)
    exact = EXACT.dequantize(sums, row.double(), **exact_more, dtype=torch.float64)
    assert found.dtype == dtype and off(found, exact) <= BOUND[dtype]


def test_the_best_kernels_are_named_with_the_reason() -> None:
    on_gpu = best_kernels("cuda", "bf16")
    assert on_gpu[0] == "torch" and "for a CPU" in on_gpu[1]
    assert best_kernels("cpu", "fp16")[0] == "torch" and "not in fp16" in best_kernels("cpu", "fp16")[1]
    exactness.kernels_named("native")  # or skipped: there is no compiler
    assert best_kernels("cpu", "fp32") == ("native", "")
