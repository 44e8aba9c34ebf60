"""The flat optimizer against torch's own and the textbook, the clipping, the schedules, what a checkpoint keeps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from myna.engine.optim import FlatAdapter, flatten_adapter, gradient_norm, lr_at
from myna.settings import TrainSettings
from myna.state import AdapterState, OptimizerState

SHAPES = {"b.weight": (5, 3), "a.bias": (7,), "c.weight": (2, 9), "d.norm": (3,)}
SETTINGS = TrainSettings(weight_decay=0.3, betas=[0.8, 0.95])
RATES = (0.1, 0.05, 0.2, 0.01, 0.03)


def new_parameters() -> dict[str, torch.nn.Parameter]:
    torch.manual_seed(0)
    return {name: torch.nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}


def add_gradient(parameters: dict[str, torch.nn.Parameter], step: int) -> None:
    """Through autograd, as training does it."""
    torch.manual_seed(100 + step)
    loss = sum((p.square() * torch.randn_like(p)).sum() for p in parameters.values())
    assert isinstance(loss, torch.Tensor)
    loss.backward()  # type: ignore[no-untyped-call]


def trained(steps: int) -> tuple[dict[str, torch.nn.Parameter], FlatAdapter]:
    parameters = new_parameters()
    adapter = flatten_adapter(parameters, SETTINGS)
    for step in range(steps):
        add_gradient(parameters, step)
        adapter.step(RATES[step])
    return parameters, adapter


def test_it_is_torchs_adamw_with_decay_on_matrices_alone() -> None:
    flat, _ = trained(5)
    plain = new_parameters()
    groups = [
        {"params": [p for p in plain.values() if p.ndim == 2], "weight_decay": 0.3},
        {"params": [p for p in plain.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.95), foreach=False)
    for step in range(5):
        add_gradient(plain, step)
        for group in optimizer.param_groups:
            group["lr"] = RATES[step]
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in plain.items():
        torch.testing.assert_close(flat[name], parameter, rtol=1e-6, atol=1e-7)


def test_it_is_the_formula() -> None:
    """Loshchilov & Hutter 2019, algorithm 2, in float64 by hand."""
    w, m, v = 2.0, 0.0, 0.0
    parameter = torch.nn.Parameter(torch.tensor([[w]], dtype=torch.float64))
    adapter = flatten_adapter({"w": parameter}, SETTINGS)
    for step, (rate, gradient) in enumerate([(0.1, 3.0), (0.2, -1.0), (0.05, 0.5)], start=1):
        assert parameter.grad is not None
        parameter.grad += gradient
        adapter.step(rate)
        m, v = 0.8 * m + 0.2 * gradient, 0.95 * v + 0.05 * gradient**2
        unbiased_m, unbiased_v = m / (1 - 0.8**step), v / (1 - 0.95**step)
        w = w - rate * 0.3 * w - rate * unbiased_m / (math.sqrt(unbiased_v) + 1e-8)
        assert float(parameter.detach()) == pytest.approx(w, rel=1e-12)


def test_parameters_and_gradients_are_views_and_stay_so() -> None:
    before = new_parameters()
    parameters, adapter = trained(0)
    for name, parameter in parameters.items():
        assert torch.equal(parameter, before[name])
    add_gradient(parameters, 0)
    add_gradient(parameters, 1)  # two packs of a step: they add up
    total = sum(float(p.grad.square().sum()) for p in parameters.values() if p.grad is not None)
    assert gradient_norm(adapter.gradient_P) == pytest.approx(math.sqrt(total), rel=1e-6)
    assert total > 0
    adapter.step(0.1)
    for parameter in parameters.values():
        assert parameter.grad is not None and not parameter.grad.any()
        start, size = adapter.gradient_P.data_ptr(), adapter.gradient_P.nbytes
        assert start <= parameter.grad.data_ptr() < start + size


@pytest.mark.parametrize("limit", [0.0, 0.5, 1e6])
def test_clipping_is_torchs(limit: float) -> None:
    parameters, adapter = trained(0)
    plain = new_parameters()
    add_gradient(parameters, 0)
    add_gradient(plain, 0)
    expected = torch.nn.utils.clip_grad_norm_(list(plain.values()), limit or math.inf)
    assert adapter.clip(limit) == pytest.approx(float(expected), rel=1e-6)
    for name, parameter in plain.items():
        torch.testing.assert_close(parameters[name].grad, parameter.grad, rtol=1e-6, atol=0)
    if limit == 0.5:
        assert gradient_norm(adapter.gradient_P) == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_shows_in_the_norm(bad: float) -> None:
    _, adapter = trained(0)
    adapter.gradient_P[4] = bad
    assert not math.isfinite(adapter.clip(1.0))


def test_the_norm_of_millions_is_exact() -> None:
    torch.manual_seed(0)
    gradient = torch.randn(5_000_000)
    assert gradient_norm(gradient) == pytest.approx(float(gradient.double().norm()), rel=1e-6)


def hand_over(parameters: Any, optimizer: Any, again: Any, resumed: Any) -> None:
    """What a checkpoint does, without the disk: the state of one adapter and optimizer given to another pair."""
    AdapterState(again).take_state(AdapterState(parameters).give_state())
    OptimizerState(again, resumed).take_state(OptimizerState(parameters, optimizer).give_state())


def test_a_checkpoint_keeps_the_names_and_going_on_is_bit_exact() -> None:
    parameters, adapter = trained(2)
    found = OptimizerState(parameters, adapter).give_state().tensors
    kinds = ("step", "exp_avg", "exp_avg_sq")
    assert set(found) == {f"{kind}/{name}" for kind in kinds for name in SHAPES}
    assert all(found[f"exp_avg/{name}"].shape == shape for name, shape in SHAPES.items())
    again, resumed = trained(0)
    hand_over(parameters, adapter, again, resumed)
    for step in (2, 3, 4):
        add_gradient(again, step)
        resumed.step(RATES[step])
    straight, _ = trained(5)
    assert all(torch.equal(again[name], straight[name]) for name in SHAPES)


def test_a_checkpoint_of_one_tensor_a_parameter_is_read() -> None:
    """As they were before the tensors were flat: torch's own optimizer over the parameters."""
    parameters = new_parameters()
    plain = torch.optim.AdamW(parameters.values(), lr=0.1, betas=(0.8, 0.95), weight_decay=0.0)
    add_gradient(parameters, 0)
    plain.step()
    plain.zero_grad()
    flat = new_parameters()
    adapter = flatten_adapter(flat, SETTINGS.model_copy(update={"weight_decay": 0.0}))
    hand_over(parameters, plain, flat, adapter)
    for _ in range(2):
        add_gradient(parameters, 1)
        plain.step()
        plain.zero_grad()
        add_gradient(flat, 1)
        adapter.step(0.1)
    for name, parameter in parameters.items():
        torch.testing.assert_close(flat[name], parameter, rtol=1e-6, atol=1e-7)


def rates(schedule: str, num_steps: int, warmup: int) -> list[float]:
    settings = TrainSettings(learning_rate=1.0, warmup_steps=warmup, schedule=schedule)  # type: ignore[arg-type]
    return [lr_at(step, num_steps, settings) for step in range(1, num_steps + 1)]


def test_warm_up_stable_decay() -> None:
    assert rates("wsd", 10, 2) == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, 2 / 3, 1 / 3])
    assert rates("wsd", 20, 0) == pytest.approx([*[1.0] * 16, 0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "wsd"])
@pytest.mark.parametrize(("num_steps", "warmup"), [(1, 5), (2, 0), (3, 9), (4, 2), (100, 10)])
def test_a_rate_is_above_zero_and_at_most_the_peak(schedule: str, num_steps: int, warmup: int) -> None:
    found = rates(schedule, num_steps, warmup)
    assert all(0 < rate <= 1 for rate in found)
    end = found[min(warmup, num_steps - 1) :]
    assert end == sorted(end, reverse=True)  # after the warm-up it never rises
