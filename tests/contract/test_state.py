"""Whoever owns state: what it gives goes through safetensors and JSON, and another one that takes it gives the same."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from myna.engine.optim import flatten_adapter
from myna.engine.scaling import LossScale, Scaling
from myna.errors import CheckpointError
from myna.settings import TrainSettings
from myna.state import (
    AdapterState,
    OptimizerState,
    Position,
    Progress,
    RandomState,
    Snapshot,
    State,
    StateOwner,
    restore,
)

SHAPES = {"a.weight": (5, 3), "b.bias": (7,), "c.weight": (2, 9)}


def parameters(seed: int) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()
    }


def flat(steps: int) -> OptimizerState:
    """The optimizer of training, after some steps."""
    held = parameters(0)
    adapter = flatten_adapter(held, TrainSettings())
    for _ in range(steps):
        adapter.gradient_P.copy_(torch.linspace(-1, 1, adapter.gradient_P.numel()))
        adapter.step(0.1)
    return OptimizerState(held, adapter)


def plain(make: Callable[..., Any], steps: int) -> OptimizerState:
    """An optimizer of torch's, which makes its tensors at its first step."""
    held = parameters(0)
    optimizer = make(held.values(), lr=0.1)
    for _ in range(steps):
        for parameter in held.values():
            parameter.grad = torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape)
        optimizer.step()
    return OptimizerState(held, optimizer)


def drawn(times: int) -> RandomState:
    random.seed(times)
    np.random.seed(times)
    torch.manual_seed(times)
    for _ in range(times):
        random.gauss(0, 1), np.random.standard_normal(), torch.randn(1)
    return RandomState()


def progressed(steps: int) -> Progress:
    progress = Progress(metrics_bytes=100 * steps)
    for step in range(1, steps + 1):
        progress.note_step(seconds=0.1, tokens=40, target_tokens=9)
        progress.note_validation(step, 1 / step)
    return progress


@dataclass(frozen=True)
class Owner:
    """`make(n)` is one with the state after n steps; what it gives must differ from one of 0 steps."""

    make: Callable[[int], StateOwner]


OWNERS = {
    "adapter": Owner(lambda steps: AdapterState(parameters(steps))),
    "optimizer adamw, flat": Owner(flat),
    "optimizer adamw": Owner(lambda steps: plain(torch.optim.AdamW, steps)),
    "optimizer sgd": Owner(lambda steps: plain(lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9), steps)),
    "optimizer adafactor": Owner(lambda steps: plain(torch.optim.Adafactor, steps)),
    "random": Owner(drawn),
    "scale of fp16": Owner(lambda steps: Scaling(LossScale(2.0**16 / 2**steps, steps))),
    "position": Owner(lambda steps: Position(steps, steps // 2)),
    "progress": Owner(progressed),
}


@pytest.fixture(autouse=True)
def generators() -> Iterator[None]:
    """Put back for the other tests."""
    before = RandomState().give_state()
    yield
    RandomState().take_state(before)


def through_files(state: State) -> State:
    tensors = load(save({name: tensor.contiguous() for name, tensor in state.tensors.items()}))
    return State(tensors, json.loads(json.dumps(dict(state.facts), allow_nan=False)))


def same(one: State, other: State) -> bool:
    return (
        one.facts == other.facts
        and one.tensors.keys() == other.tensors.keys()
        and all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())
        and all(tensor.dtype == other.tensors[name].dtype for name, tensor in one.tensors.items())
    )


@pytest.mark.parametrize("name", OWNERS)
def test_what_is_given_is_taken(name: str) -> None:
    given = through_files(OWNERS[name].make(3).give_state())
    fresh = OWNERS[name].make(0)
    assert not same(through_files(fresh.give_state()), given)
    fresh.take_state(given)
    assert same(through_files(fresh.give_state()), given)


@pytest.mark.parametrize("name", OWNERS)
def test_what_was_given_is_not_changed_by_taking_it(name: str) -> None:
    """Nobody holds on to another's tensors."""
    given = through_files(OWNERS[name].make(3).give_state())
    kept = through_files(given)
    owner = OWNERS[name].make(0)
    owner.take_state(given)
    for tensor in owner.give_state().tensors.values():
        if tensor.is_floating_point():
            tensor.add_(1)
    assert same(given, kept)


@pytest.mark.parametrize("name", [name for name in OWNERS if name not in ("progress", "optimizer adamw")])
def test_a_state_of_nothing_is_refused(name: str) -> None:
    """Progress alone may be empty: checkpoints of before had none."""
    owner = OWNERS[name].make(2)
    with pytest.raises(CheckpointError):
        restore(Snapshot(2, {"it": State()}), {"it": owner})


def test_the_generators_go_on_where_they_were() -> None:
    def draws() -> tuple[Any, ...]:
        return (
            random.random(),
            random.gauss(0, 1),
            np.random.standard_normal(3).tolist(),
            torch.randn(3).tolist(),
        )

    given = through_files(drawn(3).give_state())
    expected = draws()
    drawn(8)
    assert draws() != expected
    RandomState().take_state(given)
    assert draws() == expected


def test_owners_and_states_are_the_same() -> None:
    owner = Position()
    for states in ({}, {"position": State(), "other": State()}):
        with pytest.raises(CheckpointError, match="differs in who owns state"):
            restore(Snapshot(1, states), {"position": owner})


@pytest.mark.parametrize("facts", [{"scale": 4.0, "good_steps": 1}, {}], ids=["scaled there", "scaled here"])
def test_a_scale_of_another_number_format_is_refused(facts: dict[str, float]) -> None:
    here = Scaling(None if facts else LossScale(2.0))
    with pytest.raises(CheckpointError, match="scale"):
        restore(Snapshot(1, {"scale": State(facts=facts)}), {"scale": here})
