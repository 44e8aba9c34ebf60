"""The base's weights as int8: how far off the products are, that the integers are exact, that LoRA is not touched."""

from __future__ import annotations

import weakref
from typing import Any

import exactness
import pytest
import torch
from exactness import adapted, distance, examples

from myna.data.packing import collate
from myna.engine import decoder
from myna.engine.frozen import (
    DenseWeight,
    FrozenWeight,
    Int8Weight,
    WatchedWeight,
    quantize_weight,
    smoothing,
)
from myna.engine.kernels import Kernels
from myna.engine.step import FastStepper, KernelsName, make_stepper, round_up
from myna.engine.torch_kernels import TorchKernels

NUM_IN, NUM_OUT, RANK, TOKENS = 576, 320, 8, 70
# forward and backward: what smoothing takes from the outliers of x it lays on the weight's, which the backward sees
MOST_OFF = (0.012, 0.0135)
MOST_OFF_PLAIN = 0.012
each_kernels = pytest.mark.parametrize("kernels", ["torch", "native"])


def a_layer(dtype: torch.dtype, *, zero_weight: bool = False, seed: int = 0) -> dict[str, Any]:
    """Gaussian weights whose rows differ in size, an adapter, and an input and a gradient with outliers.

    Six columns in a thousand of the input are three times as large in every token (Dettmers et al. 2022, section 4, find as
    many in large decoders), one token in ten is three times as large as the others.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    x, g = normal(TOKENS, NUM_IN), 1e-4 * normal(TOKENS, NUM_OUT)
    x[:, ::160] *= 3
    x[::10] *= 3
    g[::10] *= 3
    weight = torch.zeros(NUM_OUT, NUM_IN) if zero_weight else 0.05 * normal(NUM_OUT, NUM_IN)
    return {
        "weight": (weight * (0.7 + 0.6 * torch.rand(NUM_OUT, 1, generator=generator))).to(dtype),
        "bias": normal(NUM_OUT).to(dtype),
        "a": (0.05 * normal(RANK, NUM_IN)).to(dtype),
        "b": (0.1 * normal(NUM_OUT, RANK)).to(dtype),
        "x": x.to(dtype),
        "g": g.to(dtype),
    }


def products(
    frozen: FrozenWeight, layer: dict[str, Any], kernels: Kernels
) -> tuple[torch.Tensor, torch.Tensor]:
    frozen.low.put(slice(0, NUM_OUT), slice(0, RANK), layer["a"], layer["b"])
    x, g = layer["x"], layer["g"]
    forward = frozen.product(torch.cat([x, x @ layer["a"].T], 1), kernels)
    return forward, frozen.product_back(torch.cat([g, g @ layer["b"]], 1), kernels)


def dense_of(layer: dict[str, Any], *, bias: bool = True) -> DenseWeight:
    return DenseWeight(layer["weight"], layer["bias"] if bias else None, RANK)


def int8_of(layer: dict[str, Any], *, bias: bool = True, smooth: bool = True) -> Int8Weight:
    largest = layer["x"].abs().amax(0).float() if smooth else None
    return Int8Weight(dense_of(layer, bias=bias), largest)


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@each_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_products_are_near_the_dense_ones(kernels: KernelsName, dtype: torch.dtype) -> None:
    layer = a_layer(dtype)
    layer["a"].zero_()  # LoRA's part is exact and would only dilute the figure
    layer["bias"].zero_()
    found = products(int8_of(layer), layer, exactness.kernels_named(kernels))
    exact = {name: value.double() for name, value in layer.items()}
    dense = products(dense_of(exact), exact, TorchKernels())
    for mine, theirs, most in zip(found, dense, MOST_OFF, strict=True):
        assert 0.004 < off(mine, theirs) < most
    rough = products(int8_of(layer, smooth=False), layer, exactness.kernels_named(kernels))
    assert 0.004 < off(rough[1], dense[1]) < MOST_OFF_PLAIN


def test_smoothing_takes_the_outliers_of_the_columns() -> None:
    """With columns thirty times as large as the others, the product is several times nearer than without."""
    layer = a_layer(torch.float32)
    layer["x"][:, ::160] *= 10
    expected = products(dense_of(layer), layer, TorchKernels())[0]
    smooth, rough = (
        off(products(int8_of(layer, smooth=s), layer, TorchKernels())[0], expected) for s in (True, False)
    )
    assert smooth < 0.015 < rough and smooth < rough / 2
    layer["x"][:, 7] = 0  # a column that calibration never saw
    weight = int8_of(layer)
    assert torch.isfinite(products(weight, layer, TorchKernels())[1]).all()


@each_kernels
@pytest.mark.parametrize("smooth", [True, False])
def test_the_integers_are_exact(kernels: KernelsName, smooth: bool) -> None:
    """The same quantized values multiplied in float64 give the same answer, both ways, LoRA and bias with it."""
    layer = a_layer(torch.float32)
    named, frozen = exactness.kernels_named(kernels), int8_of(layer, smooth=smooth)
    forward, back = products(frozen, layer, named)
    assert frozen.quants_NK.dtype == torch.int8
    largest = layer["x"].abs().amax(0)
    smooth_K = smoothing(largest, layer["weight"]) if smooth else torch.ones(NUM_IN)
    weight, column, row = frozen.quants_NK.double(), (1 / smooth_K).double(), frozen.scale_N.double()
    x, g, a, b = (layer[name].double() for name in ("x", "g", "a", "b"))
    quants, scale = named.quantize_rows(layer["x"], 1 / smooth_K)
    exact = (quants.double() @ weight.T) * scale.double()[:, None] * row
    assert off(forward, exact + x @ a.T @ b.T + layer["bias"].double()) <= 1e-6
    quants, scale = named.quantize_rows(layer["g"], frozen.scale_N)
    exact = (quants.double() @ weight) * scale.double()[:, None] * column
    assert off(back, exact + g @ b @ a) <= 1e-6


@each_kernels
def test_lora_is_not_quantized(kernels: KernelsName) -> None:
    """Over a base of zeros the answer is LoRA's alone, to float32's own rounding."""
    layer = a_layer(torch.float32, zero_weight=True)
    found = products(int8_of(layer, bias=False), layer, exactness.kernels_named(kernels))
    x, g, a, b = (layer[name].double() for name in ("x", "g", "a", "b"))
    assert off(found[0], x @ a.T @ b.T) <= 1e-6
    assert off(found[1], g @ b @ a) <= 1e-6


def test_a_row_of_zeros_has_scale_zero_and_the_others_reach_127() -> None:
    weight = torch.tensor([[0.0, 0.0, 0.0], [0.5, -1.0, 0.25], [3e-5, 0.0, 1e-5]])
    quants, scale = quantize_weight(weight)
    assert quants.tolist() == [[0, 0, 0], [64, -127, 32], [127, 0, 42]]
    assert scale.tolist() == pytest.approx([0.0, 1 / 127, 3e-5 / 127])
    assert scale.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_native_products_are_the_torch_ones(dtype: torch.dtype) -> None:
    """But for values at an exact half, which two correct roundings may part by one in 127."""
    layer = a_layer(dtype)
    found = products(int8_of(layer), layer, exactness.kernels_named("native"))
    expected = products(int8_of(layer), layer, TorchKernels())
    for mine, theirs in zip(found, expected, strict=True):
        apart = (mine.float() - theirs.float()).norm(dim=1) / theirs.float().norm(dim=1)
        assert float(apart.median()) <= (1e-6 if dtype == torch.float32 else 2e-3)
        assert float(apart.max()) <= 2e-3


@each_kernels
@pytest.mark.parametrize("family", ["llama-bias", "gemma2-window", "gpt_neox"])
def test_an_int8_step_is_near_the_dense_one(family: str, kernels: KernelsName) -> None:
    batch = collate(examples())
    dense = exactness.fast_answer(adapted(family, torch.float32), [batch], kernels)
    found, twin = (
        exactness.fast_answer(adapted(family, torch.float32), [batch], name, quantize_with=batch)
        for name in (kernels, "torch")
    )
    assert 1e-6 < abs(found.loss - dense.loss) / dense.loss < 0.01
    assert distance(found, dense) < 0.05
    assert distance(found, twin) < 0.02  # a value that is rounded the other way moves all that comes after
    again = exactness.fast_answer(adapted(family, torch.float32), [batch], kernels, quantize_with=batch)
    assert distance(again, found) == 0


def test_a_decoder_holds_one_byte_a_weight() -> None:
    """One int8 copy serves both ways, and the dense weights are let go."""
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}
    held = {}
    for quantize_with in (None, collate(examples())):
        model = adapted("llama", torch.float32, **sizes)
        linears = [m.base_layer for m in model.modules() if hasattr(m, "base_layer")]
        num_weights = sum(linear.weight.numel() for linear in linears)
        stepper = make_stepper(model, "fast", quantize_with=quantize_with)
        assert isinstance(stepper, FastStepper)
        assert not any(linear.weight.numel() for linear in linears)
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for group in stepper.decoder.groups()
            for tensor in (*vars(group.frozen).values(), *vars(group.frozen.low).values())
            if isinstance(tensor, torch.Tensor)
        }
        held[quantize_with is not None] = sum(storages.values()) / num_weights
    # besides: scales by row and column, and the adapter as the products read it, turned and not
    assert 4 <= held[False] < 4.5 and 1 <= held[True] < 1.4


def test_layer_by_layer_is_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same integers as where all columns are measured before the first weight is quantized, one layer open at a time."""
    batch = round_up(collate(examples()))
    whole, parts = (make_stepper(adapted("llama", torch.float32), "fast") for _ in range(2))
    assert isinstance(whole, FastStepper) and isinstance(parts, FastStepper)
    groups = list(whole.decoder.groups())
    for group in groups:
        assert isinstance(group.frozen, DenseWeight)
        group.frozen = WatchedWeight(group.frozen)
    with torch.no_grad():
        whole.decoder.hidden(batch)
    expected = [Int8Weight(g.frozen.dense, g.frozen.largest_K) for g in groups]  # type: ignore[attr-defined]
    open_at_once: list[int] = []

    class Counted(Int8Weight):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            open_at_once.append(sum(isinstance(g.frozen, WatchedWeight) for g in parts.decoder.groups()))

    dense = [weakref.ref(group.frozen) for group in parts.decoder.groups()]
    left: list[int] = []
    monkeypatch.setattr(
        decoder, "give_back_memory", lambda: left.append(sum(ref() is not None for ref in dense))
    )
    monkeypatch.setitem(decoder.INT8_WEIGHTS, "int8", Counted)
    parts.decoder.quantize_int8(batch)
    for group, weight in zip(parts.decoder.groups(), expected, strict=True):
        assert isinstance(group.frozen, Int8Weight)
        assert torch.equal(group.frozen.quants_NK, weight.quants_NK)
        assert torch.equal(group.frozen.scale_N, weight.scale_N)
    assert open_at_once == [4, 3, 2, 1] * 2
    assert left == [4, 0], "a layer's weights are gone before memory is given back"
