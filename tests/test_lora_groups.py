"""Linears that read one input as one product: all adapted, some of them, none; and an adapter that moves."""

from __future__ import annotations

from collections import Counter
from typing import Any

import exactness
import pytest
import torch
from exactness import PATH_BOUND, adapted, examples, require_same

from myna.adapters.methods import trainable_parameters
from myna.data.packing import collate
from myna.engine.frozen import FrozenWeight
from myna.engine.kernels import Kernels
from myna.engine.lora import LoraGroup
from myna.engine.step import FastStepper, KernelsName, Stepper, make_stepper
from myna.engine.torch_kernels import TorchKernels

SUBSETS = [
    ("llama-bias", ["q_proj", "v_proj"]),
    ("llama-bias", ["k_proj"]),
    ("llama", ["up_proj"]),
    ("gemma2-window", ["down_proj"]),
    ("qwen2", ["v_proj", "o_proj", "gate_proj"]),
    ("phi3", ["qkv_proj"]),
    ("gpt_neox", ["dense_4h_to_h"]),
    ("gpt_neox-serial", ["dense", "dense_h_to_4h"]),
    ("llama", r".*layers\.1\.mlp\.(gate|down)_proj"),
]


@exactness.each_kind
@pytest.mark.parametrize(("family", "targets"), SUBSETS)
def test_a_part_of_the_linears(
    family: str, targets: str | list[str], kernels: KernelsName, dtype: torch.dtype
) -> None:
    batch = [collate(examples())]
    found = exactness.fast_answer(adapted(family, dtype, targets=targets), batch, kernels)
    expected = exactness.reference_answer(adapted(family, dtype, targets=targets), batch)
    require_same(found, expected, PATH_BOUND[dtype])


class Plain(torch.nn.Module):
    """Two linears on one input as peft computes them, as an oracle: the second alone has an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(5, 4, bias=False), torch.nn.Linear(5, 3)


def test_a_group_is_its_formula() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["second"])
    plain = inject_adapter_in_model(config, Plain().requires_grad_(False).double())
    lora = plain.second
    for parameter in (lora.lora_A["default"].weight, lora.lora_B["default"].weight):
        torch.nn.init.normal_(parameter)
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    expected = torch.cat([plain.first(x), lora(x)], dim=1)
    group = LoraGroup([plain.first, lora])
    xh = group.input_buffer(x)
    xh[:, :5] = x.detach()
    torch.testing.assert_close(group.forward(xh, TorchKernels()), expected.detach())
    a, b = lora.lora_A["default"].weight, lora.lora_B["default"].weight
    torch.testing.assert_close(xh[:, 5:], x.detach() @ a.detach().T)
    assert [p.shape for p in group.parameters] == [a.shape, b.shape] and group.parameters[0] is a


@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_the_adapters_gradients_are_added_where_they_stand(kernels: KernelsName) -> None:
    """In float32 also under bfloat16, onto what is there, in the tensor that the optimizer reads."""
    model, batch = adapted("llama", torch.bfloat16), collate(examples())
    parameters = trainable_parameters(model)
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
    stepper = make_stepper(model, "fast", kernels=exactness.kernels_named(kernels))
    once = exactness.answer_of(stepper, model, [batch])
    homes = {name: parameter.grad for name, parameter in parameters.items()}
    stepper.loss(batch).backward()
    for name, parameter in parameters.items():
        assert parameter.grad is homes[name] and parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        torch.testing.assert_close(parameter.grad, 2 * once.gradients[name], rtol=1e-5, atol=1e-6)
    if kernels == "native":  # torch's products of bfloat16 are rounded to it
        assert any((g.bfloat16().float() != g).any() for g in once.gradients.values())


class Counted:
    """A frozen weight that counts who asks it for what."""

    def __init__(self, frozen: FrozenWeight, name: str, asked: Counter[str]) -> None:
        self._frozen, self._name, self._asked = frozen, name, asked

    def __getattr__(self, name: str) -> Any:
        return getattr(self._frozen, name)

    def product(self, xh: torch.Tensor, kernels: Kernels) -> torch.Tensor:
        self._asked[f"{self._name} forward"] += 1
        return self._frozen.product(xh, kernels)

    def product_back(self, ggh: torch.Tensor, kernels: Kernels) -> torch.Tensor:
        self._asked[f"{self._name} back"] += 1
        return self._frozen.product_back(ggh, kernels)


PLACES = ("qkv", "o", "gate_up", "down")
BACKS = [
    (r".*layers\.2\.mlp\.down_proj", []),
    (r".*layers\.2\.mlp\.up_proj", ["2 down"]),
    (r".*layers\.2\.self_attn\.v_proj", ["2 o", "2 gate_up", "2 down"]),
    (r".*layers\.1\.self_attn\.o_proj", ["1 gate_up", "1 down", *(f"2 {place}" for place in PLACES)]),
]


@pytest.mark.parametrize("checkpoint_layers", [0, 1])
@pytest.mark.parametrize(("targets", "expected"), BACKS)
def test_what_lies_below_the_lowest_adapter_has_no_backward(
    targets: str, expected: list[str], checkpoint_layers: int
) -> None:
    """Of the product that adapters sit on the gradient in the input is asked only where something below wants it."""
    model = adapted("llama", torch.float64, targets=targets, num_hidden_layers=3)
    stepper = make_stepper(model, "fast", checkpoint_layers=checkpoint_layers)
    assert isinstance(stepper, FastStepper)
    asked: Counter[str] = Counter()
    for number, group in enumerate(stepper.decoder.groups()):
        group.frozen = Counted(group.frozen, f"{number // 4} {PLACES[number % 4]}", asked)
    stepper.loss(collate(examples())).backward()
    assert sorted(name for name in asked if name.endswith("back")) == sorted(f"{n} back" for n in expected)
    assert set(asked.values()) <= {1, 2}
    assert sum(asked[f"{layer} {place} forward"] for layer in range(3) for place in PLACES) >= 12


def test_a_changed_adapter_is_seen_after_refresh_and_not_before() -> None:
    model = adapted("llama", torch.float64)
    stepper, batch = make_stepper(model, "fast"), collate(examples())
    before = float(stepper.loss(batch).detach())
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.mul_(1.5)
    assert float(stepper.loss(batch).detach()) == before
    stepper.refresh()
    after = exactness.answer_of(stepper, model, [batch])
    twin = adapted("llama", torch.float64)
    with torch.no_grad():
        for parameter in trainable_parameters(twin).values():
            parameter.mul_(1.5)
    require_same(after, exactness.reference_answer(twin, [batch]), PATH_BOUND[torch.float64])


def trained_losses(model: Any, stepper: Stepper, *, refresh: bool = True) -> list[float]:
    """The losses of five AdamW steps on two packs by turns, and of one more look."""
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=0.02, weight_decay=0.1)
    packs = [collate(examples()), collate(examples(seed=4))]
    losses = []
    for step in range(6):
        loss = stepper.loss(packs[step % 2]) / len(packs[step % 2].targets_N)
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if refresh:
            stepper.refresh()
    return losses


@pytest.mark.parametrize("kernels", ["torch", "native"])
@pytest.mark.parametrize("family", ["llama", "gemma2-window"])
def test_five_steps_of_training_are_the_references(family: str, kernels: KernelsName) -> None:
    model = adapted(family, torch.float32)
    expected = trained_losses(model, make_stepper(model, "reference"))
    assert min(expected[4:]) < 0.9 * min(expected[:2])
    found = {}
    for refresh in (True, False):
        model = adapted(family, torch.float32)
        stepper = make_stepper(model, "fast", kernels=exactness.kernels_named(kernels))
        found[refresh] = trained_losses(model, stepper, refresh=refresh)
    assert found[True] == pytest.approx(expected, rel=1e-4)
    assert found[False] != pytest.approx(expected, rel=1e-2), (
        "an adapter that is never taken over went unseen"
    )
