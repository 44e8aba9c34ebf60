"""Float products of narrow tensors: as they are, and widened to float32."""

from __future__ import annotations

import exactness
import pytest
import torch
from exactness import adapted, distance, examples, fast_answer

import myna.engine.products as products_module
from myna.data.packing import collate
from myna.engine.native import NativeKernels
from myna.engine.products import PlainProducts, WideProducts
from myna.engine.step import choose_kernels
from myna.engine.threads import fast_in_bfloat16
from myna.engine.torch_kernels import TorchKernels

T, K, N = 7, 24, 40
NARROW = (torch.bfloat16, torch.float16)
UNIT = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # what one rounding may cost


def drawn(rows: int, columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """A view with a longer row stride, as the step's tensors are."""
    wide = torch.randn(rows, columns + 5, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return wide[:, 2 : columns + 2]


def require_rounded_once(found: torch.Tensor, exact: torch.Tensor) -> None:
    assert found.shape == exact.shape
    limit = UNIT[found.dtype] * 1.001 * exact.abs() + 1e-5
    assert bool(((found.double() - exact).abs() <= limit).all())


@pytest.mark.parametrize("numbers", [1 << 21, 8 * K, 1])
@pytest.mark.parametrize("dtype", NARROW)
def test_widened_products_are_rounded_once(
    dtype: torch.dtype, numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight of one part, of five, and of one row each."""
    monkeypatch.setattr(products_module, "WIDE_NUMBERS", numbers)
    x, weight, g = drawn(T, K, dtype, 1), drawn(N, K, dtype, 2), drawn(T, N, dtype, 3)
    bias, wide = drawn(1, N, dtype, 4)[0], WideProducts()
    exact = x.double() @ weight.double().T
    require_rounded_once(wide.linear(x, weight), exact)
    require_rounded_once(wide.linear(x, weight, bias), exact + bias.double())
    into = drawn(T, N, dtype, 5)
    assert wide.linear(x, weight, out=into).data_ptr() == into.data_ptr()
    require_rounded_once(into, exact)
    exact = g.double() @ weight.double()
    require_rounded_once(wide.back(g, weight), exact)
    into = drawn(T, K, dtype, 6)
    wide.back(g, weight, out=into)
    require_rounded_once(into, exact)


@pytest.mark.parametrize("products", [PlainProducts(), WideProducts()])
def test_the_adapters_gradient_comes_in_float32(products: PlainProducts | WideProducts) -> None:
    g, x = drawn(T, N, torch.bfloat16, 1), drawn(T, K, torch.bfloat16, 2)
    found, exact = products.outer(g, x), g.double().T @ x.double()
    assert found.dtype == torch.float32
    assert (found - exact).norm() <= (1e-6 if isinstance(products, WideProducts) else 1e-2) * exact.norm()


def test_no_more_of_a_weight_stands_in_float32_than_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head of a large vocabulary would be hundreds of MB."""
    monkeypatch.setattr(products_module, "WIDE_NUMBERS", 1000)
    weight, wide = drawn(4000, K, torch.bfloat16, 1), WideProducts()
    x, g = drawn(T, K, torch.bfloat16, 2), drawn(T, 4000, torch.bfloat16, 3)
    with exactness.Made() as made:
        wide.linear(x, weight)
        wide.back(g, weight)
    assert made.largest <= T * 4000
    assert wide._scratch["weight"].numel() <= 1000 + K


@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_a_widened_step_is_as_near_the_truth(kernels: str) -> None:
    batch, truth = [collate(examples())], exactness.reference_of("llama", torch.float64)
    exactness.kernels_named(kernels)  # type: ignore[arg-type]  # skips where there is no compiler
    found = [
        fast_answer(adapted("llama", torch.bfloat16), batch, choose_kernels(kernels, 1, widen=widen))  # type: ignore[arg-type]
        for widen in (False, True)
    ]
    plain, wide = (distance(answer, truth) for answer in found)
    assert wide <= 1.01 * plain and wide < 0.04
    assert abs(found[1].loss - truth.loss) <= 2e-3 * truth.loss


def test_every_float_product_is_asked_of_the_seam() -> None:
    """One that is not would be slow on a processor that is slow in bfloat16."""

    class Counted(WideProducts):
        def _wide(self, name: str, narrow: torch.Tensor) -> torch.Tensor:
            assert narrow.dtype == torch.bfloat16
            return super()._wide(name, narrow)

    class Watch(exactness.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func in (torch.ops.aten.mm.default, torch.ops.aten.mm.out, torch.ops.aten.addmm.default):
                assert all(t.dtype == torch.float32 for t in args if isinstance(t, torch.Tensor))
            return func(*args, **(kwargs or {}))

    model, batch = adapted("llama", torch.bfloat16), collate(examples())
    stepper = exactness.make_stepper(model, "fast", kernels=TorchKernels(Counted()))
    with Watch():
        exactness.answer_of(stepper, model, [batch])
    int8 = exactness.make_stepper(
        adapted("llama", torch.bfloat16), "fast", kernels=TorchKernels(Counted()), quantize_with=batch
    )
    with Watch():
        int8.loss(batch).backward()


def test_the_plan_s_word_reaches_the_kernels() -> None:
    assert isinstance(choose_kernels("torch", 1).products, PlainProducts)
    assert isinstance(choose_kernels("torch", 1, widen=True).products, WideProducts)
    exactness.kernels_named("native")
    native = choose_kernels("native", 1, widen=True)
    assert isinstance(native, NativeKernels) and isinstance(native.products, WideProducts)


@pytest.mark.parametrize(
    ("cpuinfo", "fast"),
    [
        ("vendor_id : AuthenticAMD\nflags : avx512f avx512_bf16", True),
        ("vendor_id : GenuineIntel\nflags : avx512f avx512_bf16", False),
        ("vendor_id : GenuineIntel\nflags : avx512f avx512_bf16 amx_bf16 amx_tile", True),
        ("vendor_id : GenuineIntel\nflags : avx2 fma", False),
        ("", False),
    ],
)
def test_which_cpu_multiplies_bfloat16_faster(cpuinfo: str, fast: bool) -> None:
    assert fast_in_bfloat16(cpuinfo) is fast
