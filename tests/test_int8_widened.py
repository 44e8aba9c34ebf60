"""int8 weights where the CPU is slow at integers: multiplied in float32, never whole in it, planned and obeyed."""

from __future__ import annotations

from typing import Any

import exactness
import pytest
import torch
from exactness import adapted, distance, examples, fast_answer
from test_int8 import NUM_IN, NUM_OUT, RANK, a_layer, dense_of, each_kernels, int8_of, off, products

import myna.engine.products as products_module
from myna.data.packing import collate
from myna.engine.frozen import DenseWeight, Int8Weight, WidenedInt8Weight, smoothing
from myna.engine.kernels import Kernels
from myna.engine.step import FastStepper, KernelsName, make_stepper
from myna.engine.threads import usable_cores
from myna.engine.torch_kernels import TorchKernels

UNIT = {
    torch.float32: 1e-6,
    torch.bfloat16: 2**-8,
}  # of an answer; bfloat16 rounds it, and in torch its low-rank part


def widened_of(layer: dict[str, Any], *, smooth: bool = True, bias: bool = True) -> WidenedInt8Weight:
    largest = layer["x"].abs().amax(0).float() if smooth else None
    return WidenedInt8Weight(dense_of(layer, bias=bias), largest)


def dequantized(frozen: Int8Weight, layer: dict[str, Any], *, smooth: bool) -> dict[str, Any]:
    """The layer with its weight as the integers say it, all in float64."""
    exact = {name: value.double() for name, value in layer.items()}
    weight = frozen.quants_NK.double() * frozen.scale_N.double()[:, None]
    if smooth:
        largest = layer["x"].abs().amax(0).float()
        weight /= smoothing(largest, layer["weight"]).double()
    return exact | {"weight": weight}


@each_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("smooth", [True, False])
def test_both_products_are_those_of_the_dequantized_weight(
    smooth: bool, dtype: torch.dtype, kernels: KernelsName
) -> None:
    layer = a_layer(dtype)
    frozen = widened_of(layer, smooth=smooth)
    named = exactness.kernels_named(kernels)
    exact = dequantized(frozen, layer, smooth=smooth)
    # what the adapter gives beside is had from the same numbers: the products' own error is what is measured
    x, g, a, b = (layer[name] for name in ("x", "g", "a", "b"))
    frozen.low.put(slice(0, NUM_OUT), slice(0, RANK), a, b)
    h, gh = x @ a.T, g @ b
    found = (
        frozen.product(torch.cat([x, h], 1), named),
        frozen.product_back(torch.cat([g, gh], 1), named),
        frozen.product_back(g, named),
    )
    back = exact["g"] @ exact["weight"]
    expected = (
        exact["x"] @ exact["weight"].T + h.double() @ exact["b"].T + exact["bias"],
        back + gh.double() @ exact["a"],
        back,
    )
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == dtype and off(mine, theirs) <= UNIT[dtype]


@each_kernels
def test_it_is_nearer_to_the_dense_products_than_integers_are(kernels: KernelsName) -> None:
    """The weight alone is rounded; integer products round the activations too."""
    layer = a_layer(torch.float32)
    layer["a"].zero_()
    layer["bias"].zero_()
    named, dense = exactness.kernels_named(kernels), products(dense_of(layer), layer, TorchKernels())
    widened, integers = (products(w, layer, named) for w in (widened_of(layer), int8_of(layer)))
    for mine, theirs, expected in zip(widened, integers, dense, strict=True):
        assert 0.002 < off(mine, expected) < off(theirs, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_its_integers_are_those_of_the_other_way(dtype: torch.dtype) -> None:
    layer = a_layer(dtype)
    one, other = widened_of(layer), int8_of(layer)
    assert torch.equal(one.quants_NK, other.quants_NK) and torch.equal(one.scale_N, other.scale_N)


@pytest.mark.parametrize("numbers", [1 << 21, 8 * NUM_IN, 1])
def test_parts_of_a_weight_are_the_whole(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight of one part, of several with a rest, and of one row each."""
    layer = a_layer(torch.float32)
    expected = products(widened_of(layer), layer, TorchKernels())
    monkeypatch.setattr(products_module, "WIDE_NUMBERS", numbers)
    found = products(widened_of(layer), layer, TorchKernels())
    assert all(off(mine, theirs) <= 1e-6 for mine, theirs in zip(found, expected, strict=True))


@each_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_more_of_a_weight_stands_in_float32_than_a_part(
    dtype: torch.dtype, kernels: KernelsName, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few tokens beside a large weight: what a product makes is far less than the weight has numbers."""
    rows, columns, tokens, part = 3_000, 512, 2, 8_192
    monkeypatch.setattr(products_module, "WIDE_NUMBERS", part)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    frozen = WidenedInt8Weight(DenseWeight(weight, None, 0), torch.ones(columns))
    x, g = torch.ones(tokens, columns, dtype=dtype), torch.ones(tokens, rows, dtype=dtype)
    exactness.kernels_named(kernels)  # skips where there is no compiler
    named = exactness.choose_kernels(kernels, usable_cores())  # with nothing kept from other products
    with exactness.Made() as made:
        frozen.product(x, named)
        frozen.product_back(g, named)
    assert made.largest <= max(part + columns, tokens * (rows + columns)) < rows * columns / 100


@each_kernels
@pytest.mark.parametrize("family", ["llama-bias", "gemma2-window", "gpt_neox"])
def test_a_widened_step_is_nearer_the_dense_one(family: str, kernels: KernelsName) -> None:
    batch = collate(examples())

    def answer(name: KernelsName, **how: Any) -> exactness.Answer:
        return fast_answer(adapted(family, torch.float32), [batch], name, **how)

    how = {"quantize_with": batch, "int8_products": "fp32"}
    dense, found, twin = answer(kernels), answer(kernels, **how), answer("torch", **how)
    integers = answer(kernels, quantize_with=batch)
    assert 1e-6 < distance(found, dense) < distance(integers, dense)
    # the kernels measure the columns, too: a weight at an exact half may become the next integer
    assert distance(found, twin) < 2e-3
    assert distance(answer(kernels, **how), found) == 0


def test_no_integer_product_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """And with the other way there is one: the word is obeyed."""
    asked: list[int] = []
    honest = torch._int_mm

    def counted(*given: Any) -> torch.Tensor:
        asked.append(1)
        return honest(*given)

    monkeypatch.setattr(torch, "_int_mm", counted)
    batch = collate(examples())
    found: dict[str, int] = {}
    for way in ("fp32", "int8"):
        stepper = make_stepper(
            adapted("llama", torch.float32),
            "fast",
            quantize_with=batch,
            int8_products=way,  # type: ignore[arg-type]
        )
        stepper.loss(batch).backward()
        found[way] = len(asked)
    assert found["fp32"] == 0 < found["int8"]


@each_kernels
def test_a_decoder_holds_one_byte_a_weight(kernels: KernelsName) -> None:
    """After a step too: nothing of the weights is kept in float32 beside."""
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}
    model, batch = adapted("llama", torch.float32, **sizes), collate(examples())
    num_weights = sum(m.base_layer.weight.numel() for m in model.modules() if hasattr(m, "base_layer"))
    named: Kernels = exactness.kernels_named(kernels)
    stepper = make_stepper(model, "fast", kernels=named, quantize_with=batch, int8_products="fp32")
    assert isinstance(stepper, FastStepper)
    stepper.loss(batch).backward()
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for group in stepper.decoder.groups()
        for tensor in (*vars(group.frozen).values(), *vars(group.frozen.low).values())
        if isinstance(tensor, torch.Tensor)
    }
    assert 1 <= sum(storages.values()) / num_weights < 1.4
