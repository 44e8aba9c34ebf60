"""For each promise of the step one planted fault: the comparison that holds without it must fail with it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import exactness
import pytest
import torch
from exactness import ORDER_BOUND, PATH_BOUND, Answer, adapted, examples, related_examples, same
from planted import PLANTED, SPOILED, Patch, gradient_is_overwritten, kernels_with

import myna.engine.decoder
from myna.data.packing import Batch, collate
from myna.engine.step import FastStepper, make_stepper

EXACT = torch.float64


def fast(
    family: str, batches: list[Batch], spoil: Callable[[FastStepper], None] | None = None, **more: Any
) -> Answer:
    """The fast path's answer; `spoil` may change the stepper once it is made."""
    model = adapted(family, EXACT)
    stepper = make_stepper(model, "fast", **more)
    assert isinstance(stepper, FastStepper)
    if spoil is not None:
        spoil(stepper)
    return exactness.answer_of(stepper, model, batches)


@functools.cache
def holds_without_fault(family: str) -> bool:
    found = fast(family, [collate(examples())])
    return same(found, exactness.reference_of(family, EXACT), PATH_BOUND[EXACT])


@pytest.mark.parametrize("fault", PLANTED)
def test_a_fault_in_the_engine_is_seen(fault: str, monkeypatch: Patch) -> None:
    family, plant = PLANTED[fault]
    assert holds_without_fault(family)
    plant(monkeypatch)
    found = fast(family, [collate(examples())])
    assert not same(found, exactness.reference_of(family, EXACT), PATH_BOUND[EXACT])
    assert not same(found, exactness.reference_of(family, EXACT), PATH_BOUND[torch.float32]), "nor in float32"


@pytest.mark.parametrize("fault", SPOILED)
def test_a_fault_in_the_stepper_is_seen(fault: str) -> None:
    family, spoil = SPOILED[fault]
    assert holds_without_fault(family)
    found = fast(family, [collate(examples())], spoil)
    assert not same(found, exactness.reference_of(family, EXACT), PATH_BOUND[torch.float32])


# Faults of shared beginnings: what is held against what


def targets_of_shared_tokens_are_dropped(batch: Batch) -> Batch:
    index = batch.target_index_N.tolist()
    first = torch.tensor([place not in index[:n] for n, place in enumerate(index)])
    return replace(batch, target_index_N=batch.target_index_N[first], targets_N=batch.targets_N[first])


def branches_begin_at_zero(batch: Batch) -> Batch:
    positions = batch.position_ids_T.clone()
    for segment in batch.segments:
        positions[segment.start : segment.start + segment.length] = torch.arange(segment.length)
    return replace(batch, position_ids_T=positions)


def branches_forget_their_parent(batch: Batch) -> Batch:
    segments = tuple(replace(segment, parent=-1) for segment in batch.segments)
    return replace(batch, segments=segments, documents=tuple((n,) for n in range(len(segments))))


SHARED = (targets_of_shared_tokens_are_dropped, branches_begin_at_zero, branches_forget_their_parent)


@pytest.mark.parametrize("fault", SHARED, ids=lambda fault: fault.__name__)
def test_a_fault_in_shared_beginnings_is_seen(fault: Callable[[Batch], Batch]) -> None:
    rows = related_examples()
    expected, shared = fast("llama", [collate(rows)]), collate(rows, share=True)
    assert same(fast("llama", [shared]), expected, ORDER_BOUND[EXACT])
    assert not same(fast("llama", [fault(shared)]), expected, ORDER_BOUND[torch.float32])


def test_a_recomputation_with_other_weights_is_seen(monkeypatch: Patch) -> None:
    batches = [collate(examples())]
    expected = fast("llama", batches)
    assert same(fast("llama", batches, checkpoint_layers=1), expected, ORDER_BOUND[EXACT])
    honest = myna.engine.decoder._run_layers

    def changed(x: torch.Tensor, layers: Any, tools: Any) -> torch.Tensor:
        return honest(x * 1.001 if torch.is_grad_enabled() else x, layers, tools)

    monkeypatch.setattr(myna.engine.decoder, "_run_layers", changed)
    found = fast("llama", batches, checkpoint_layers=1)
    assert found.loss == expected.loss and not same(found, expected, PATH_BOUND[torch.float32])


def test_a_pack_whose_gradient_is_not_added_is_seen() -> None:
    rows = examples()
    batches = [collate(rows[:3]), collate(rows[3:])]
    expected = fast("llama", [collate(rows)])
    assert same(fast("llama", batches), expected, ORDER_BOUND[EXACT])
    found = fast("llama", batches, kernels_with(add_outer=gradient_is_overwritten))
    assert not same(found, expected, PATH_BOUND[torch.float32])


def test_a_mean_of_means_is_seen() -> None:
    """Each pack normalised by its own target tokens is another step."""
    rows, model = related_examples(seed=7)[:8], adapted("llama", EXACT)
    stepper = make_stepper(model, "fast")
    packs = [collate(rows[:5], share=True), collate(rows[5:], share=True)]
    whole = exactness.answer_of(stepper, model, [collate(rows, share=True)], mean=True)
    assert same(exactness.answer_of(stepper, model, packs, mean=True), whole, ORDER_BOUND[EXACT])
    parts = [exactness.answer_of(stepper, model, [pack], mean=True) for pack in packs]
    gradients = {name: sum(part.gradients[name] for part in parts) / 2 for name in whole.gradients}
    wrong = Answer(sum(part.loss for part in parts) / 2, gradients)  # type: ignore[arg-type]
    assert not same(wrong, whole, PATH_BOUND[torch.float32])


def test_a_tensor_of_all_logits_is_seen() -> None:
    with exactness.Made() as made:
        torch.zeros(7, 3).view(21).add_(1)
    assert made.largest == 21
    with exactness.Made() as made:
        kept = torch.zeros(10) + 1
        assert made.held_bytes() == 40
        del kept
    assert made.held_bytes() == 0


def test_a_native_kernel_that_is_asked_for_something_else_is_seen() -> None:
    """The comparison of C with torch is no comparison of a thing with itself."""
    batches, native = [collate(examples())], exactness.kernels_named("native")
    model = adapted("mistral-window", torch.float32)
    stepper = make_stepper(model, "fast", kernels=native)
    expected = exactness.reference_of("mistral-window", torch.float32)
    assert same(exactness.answer_of(stepper, model, batches), expected, PATH_BOUND[torch.float32])
    assert isinstance(stepper, FastStepper)
    for layer in stepper.decoder.layers:
        object.__setattr__(layer.attention.spec, "window", 6)
    assert not same(exactness.answer_of(stepper, model, batches), expected, PATH_BOUND[torch.float32])
