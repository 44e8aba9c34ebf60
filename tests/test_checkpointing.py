"""Gradient checkpointing: layers run again in the backward give the same bytes, and far less is kept until then."""

from __future__ import annotations

from typing import Any

import exactness
import pytest
import torch
from exactness import adapted, related_examples

from myna.data.packing import collate
from myna.engine.step import KernelsName, make_stepper

NUM_LAYERS = 5  # not a multiple of 2 or 3
# five layers alike, windows and caps by layer, both blocks on one input
FAMILIES = ("llama", "gemma2-window", "gpt_neox")
LOWEST = ["v_proj", "o_proj"]


def new_stepper(family: str, dtype: torch.dtype, kernels: KernelsName, every: int, **more: Any) -> Any:
    model = adapted(family, dtype, num_hidden_layers=NUM_LAYERS, **more)
    named = exactness.kernels_named(kernels)
    return model, make_stepper(model, "fast", kernels=named, checkpoint_layers=every)


@exactness.each_kind
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_is_the_same_to_the_bit(family: str, kernels: KernelsName, dtype: torch.dtype) -> None:
    batch = [collate(related_examples(), share=True)]
    plain, *others = (
        exactness.fast_answer(
            adapted(family, dtype, num_hidden_layers=NUM_LAYERS), batch, kernels, checkpoint_layers=every
        )
        for every in (0, 1, 2, 3)
    )
    assert plain.norm > 0.1
    for other in others:
        assert_same_bytes(other, plain)


@pytest.mark.parametrize("targets", [["down_proj"], ["q_proj", "v_proj"]])
def test_checkpointed_with_few_adapters_is_the_same_to_the_bit(targets: list[str]) -> None:
    """Where nothing asks for the gradient of the first layer's input, none is made."""
    batch, dtype = [collate(related_examples(), share=True)], torch.float64
    plain, other = (
        exactness.fast_answer(adapted("llama", dtype, targets=targets), batch, checkpoint_layers=every)
        for every in (0, 1)
    )
    assert_same_bytes(other, plain)


def assert_same_bytes(found: exactness.Answer, expected: exactness.Answer) -> None:
    assert found.loss == expected.loss
    for name, gradient in expected.gradients.items():
        assert torch.equal(found.gradients[name], gradient), name


def kept_bytes(kernels: KernelsName, every: int) -> tuple[int, int]:
    """What lives between the forward and the backward of a pack, and after it but for the gradients."""
    model, stepper = new_stepper("llama", torch.float32, kernels, every)
    batch = collate(exactness.examples((120, 100, 36)))
    exactness.answer_of(stepper, model, [batch])  # the kernels' own scratch stays from call to call
    for parameter in model.parameters():
        parameter.grad = None
    with exactness.Made() as made:
        loss = stepper.loss(batch)
        between = made.held_bytes()
        loss.backward()
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        return between, made.held_bytes() - gradients


@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_checkpointing_keeps_less(kernels: KernelsName) -> None:
    none, each, every_other = (kept_bytes(kernels, every) for every in (0, 1, 2))
    assert every_other[0] < each[0] < 0.5 * none[0]
    tokens_bytes = 256 * 64 * 4
    assert each[0] >= NUM_LAYERS * tokens_bytes  # the layers' inputs at least: what is kept is counted
    # the backward lets go of what the forward kept: the ropes, the layout and the loss remain
    assert none[1] < 0.2 * none[0]
