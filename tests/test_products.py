"""Float products of narrow tensors: as they are, and widened to float32."""

from __future__ import annotations

import exactness
import pytest
import torch
from exactness import adapted, distance, examples, fast_answer

import myna.engine.products as products_module
from myna.data.packing import collate
from myna.engine.native import NativeKernels
from myna.engine.native_library import native_library
from myna.engine.native_products import NativeProducts
from myna.engine.products import PlainProducts, WideProducts
from myna.engine.step import KernelsName, ProductsName, choose_kernels
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


@pytest.mark.parametrize(
    ("kernels", "products"), [("torch", "torch"), ("native", "torch"), ("native", "native")]
)
def test_a_widened_step_is_as_near_the_truth(kernels: KernelsName, products: ProductsName) -> None:
    batch, truth = [collate(examples())], exactness.reference_of("llama", torch.float64)
    exactness.kernels_named(kernels)  # skips where there is no compiler
    found = [
        fast_answer(
            adapted("llama", torch.bfloat16),
            batch,
            choose_kernels(kernels, 1, widen=widen, products=products),
        )
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
    assert isinstance(native, NativeKernels) and type(native.products) is WideProducts
    own = choose_kernels("native", 1, widen=True, products="native")
    assert isinstance(own, NativeKernels) and isinstance(own.products, NativeProducts)
    assert isinstance(choose_kernels("native", 1, products="native").products, PlainProducts)


@pytest.mark.parametrize(
    ("rows", "depth", "columns"), [(7, 24, 40), (70, 1300, 100), (600, 41, 17), (1, 1, 1)]
)
def test_products_in_c_are_rounded_once(rows: int, depth: int, columns: int) -> None:
    """One tile and several, one part of a sum and three, more rows than a piece has, a single number."""
    exactness.kernels_named("native")
    choose_kernels("native", 1)  # the number of threads is the library's
    own = NativeProducts(native_library())
    x, weight = drawn(rows, depth, torch.bfloat16, 1), drawn(columns, depth, torch.bfloat16, 2)
    g, bias = drawn(rows, columns, torch.bfloat16, 3), drawn(1, columns, torch.bfloat16, 4)[0]
    kept = {tensor: tensor.clone() for tensor in (x, weight, g, bias)}
    exact = x.double() @ weight.double().T
    require_rounded_once(own.linear(x, weight), exact)
    require_rounded_once(own.linear(x, weight, bias), exact + bias.double())
    into = drawn(rows, columns, torch.bfloat16, 5)
    assert own.linear(x, weight, out=into).data_ptr() == into.data_ptr()
    require_rounded_once(into, exact)
    exact = g.double() @ weight.double()
    require_rounded_once(own.back(g, weight), exact)
    into = drawn(rows, depth, torch.bfloat16, 6)
    around = into.as_strided((rows, depth + 5), (depth + 5, 1), 0)
    outside = around[:, depth + 2 :].clone()
    own.back(g, weight, out=into)
    require_rounded_once(into, exact)
    assert torch.equal(around[:, depth + 2 :], outside)
    assert all(torch.equal(now, before) for now, before in kept.items())


def test_products_in_c_of_other_dtypes_are_torch_s() -> None:
    exactness.kernels_named("native")
    own = NativeProducts(native_library())
    x, weight = drawn(T, K, torch.float16, 1), drawn(N, K, torch.float16, 2)
    require_rounded_once(own.linear(x, weight), x.double() @ weight.double().T)


def test_a_product_in_c_holds_no_part_of_the_weight_in_float32() -> None:
    exactness.kernels_named("native")
    own, weight = NativeProducts(native_library()), drawn(4000, K, torch.bfloat16, 1)
    x, g = drawn(T, K, torch.bfloat16, 2), drawn(T, 4000, torch.bfloat16, 3)
    own.linear(x, weight)
    own.back(g, weight)
    assert set(own._scratch) == {"x"} and own._scratch["x"].numel() <= T * (4000 + 16)


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
