"""Gradient checkpointing: layers run again in the backward give the same bytes, and far less is kept until then."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import exactness
import pytest
import torch
from exactness import adapted, related_examples

import myna.engine.decoder
import myna.engine.kept
from myna.data.packing import collate
from myna.engine.kept import InHostMemory, InputPlace, KeptInput, OnDevice, OnDisk
from myna.engine.step import KernelsName, make_stepper
from myna.errors import MachineError

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


# Inputs that wait elsewhere


def places(folder: Path) -> list[InputPlace]:
    return [OnDevice(), InHostMemory(), OnDisk(folder)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_what_waits_elsewhere_comes_back_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = [torch.randn(n, 64).to(dtype) for n in (3, 200, 1)]
    tensors[0][0, 0], tensors[0][1, 1] = torch.inf, torch.nan
    for place in places(tmp_path):
        kept: list[KeptInput] = []
        for x in tensors:
            kept.append(place.keep(x, before=kept[-1] if kept else None))
        for x, waiting in zip(reversed(tensors), reversed(kept), strict=True):
            found = waiting.fetch()
            assert found.dtype == dtype and found.shape == x.shape
            assert torch.equal(found.view(torch.uint8), x.view(torch.uint8)), place.name


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("place", [InHostMemory, OnDisk])
def test_inputs_kept_elsewhere_are_the_same_to_the_bit(tmp_path: Path, place: Any, every: int) -> None:
    """Two packs, the second before the first one's backward: neither takes the other's place."""
    batches = [collate(related_examples(), share=True), collate(exactness.examples())]
    found = []
    for keep_inputs in (OnDevice(), place(tmp_path) if place is OnDisk else place()):
        model = adapted("gemma2-window", torch.float32, num_hidden_layers=NUM_LAYERS)
        stepper = make_stepper(model, "fast", checkpoint_layers=every, keep_inputs=keep_inputs)
        losses = [stepper.loss(batch) for batch in batches]
        for loss in losses:
            loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append(exactness.Answer(sum(float(loss.detach()) for loss in losses), gradients))
    assert found[0].norm > 0.1
    assert_same_bytes(found[1], found[0])
    assert not list(tmp_path.iterdir())


def test_an_input_on_disk_is_not_in_memory(tmp_path: Path) -> None:
    """What lives between forward and backward is smaller by every layer's input but what the rest holds on to."""
    batch, held = collate(exactness.examples((120, 100, 36))), {}
    for place in places(tmp_path):
        model = adapted("llama", torch.float32, num_hidden_layers=NUM_LAYERS)
        stepper = make_stepper(model, "fast", checkpoint_layers=1, keep_inputs=place)
        exactness.answer_of(stepper, model, [batch])
        with exactness.Made() as made:
            loss = stepper.loss(batch)
            held[place.name] = made.held_bytes()
        loss.backward()
    input_bytes = 256 * 64 * 4
    assert held["device"] - held["disk"] == NUM_LAYERS * input_bytes
    assert held["cpu"] >= NUM_LAYERS * input_bytes  # in CPU memory, which here is the device's too


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="this system does not list open files")
@pytest.mark.parametrize("fails", ["never", "in the forward", "before the backward", "in the backward"])
def test_no_file_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    def open_here() -> int:
        links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
        return sum(os.path.lexists(link) and str(tmp_path) in os.readlink(link) for link in links)

    model = adapted("llama", torch.float32, num_hidden_layers=NUM_LAYERS)
    stepper = make_stepper(model, "fast", checkpoint_layers=1, keep_inputs=OnDisk(tmp_path))
    honest, calls, most = myna.engine.decoder._run_layers, 0, 0

    def run_layers(*arguments: Any) -> Any:
        nonlocal calls, most
        calls, most = calls + 1, max(most, open_here())
        if calls == {"in the forward": 3, "in the backward": NUM_LAYERS + 2}.get(fails):
            raise ZeroDivisionError
        return honest(*arguments)

    monkeypatch.setattr(myna.engine.decoder, "_run_layers", run_layers)
    loss = None
    with contextlib.suppress(ZeroDivisionError):
        loss = stepper.loss(collate(exactness.examples()))
        if fails != "before the backward":
            loss.backward()
    assert most == (3 if fails == "in the forward" else NUM_LAYERS)  # they were there
    del loss
    assert open_here() == 0 and not list(tmp_path.iterdir())


def test_a_disk_that_is_full_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(myna.engine.kept, "_write_all", full)
    with pytest.raises(MachineError, match="on disk: No space left") as caught:
        OnDisk(tmp_path).keep(torch.ones(2, 2), None)
    assert caught.value.where == str(tmp_path)
    with pytest.raises(MachineError, match="on disk: No such file"):
        OnDisk(tmp_path / "none").keep(torch.ones(2, 2), None)


def test_an_input_that_comes_back_otherwise_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault: of two waiting inputs the wrong one is fetched."""
    batch, kept = [collate(exactness.examples())], []
    model = adapted("llama", torch.float64, num_hidden_layers=NUM_LAYERS)
    plain = exactness.fast_answer(model, batch, checkpoint_layers=1)

    class Confused(OnDisk):
        def keep(self, x: torch.Tensor, before: KeptInput | None) -> KeptInput:
            kept.append(super().keep(x, before))
            return kept[-2] if len(kept) == 3 else kept[-1]

    monkeypatch.setattr(myna.engine.kept._OnDisk, "close", lambda self: None)
    other = exactness.fast_answer(
        adapted("llama", torch.float64, num_hidden_layers=NUM_LAYERS),
        batch,
        checkpoint_layers=1,
        keep_inputs=Confused(tmp_path),
    )
    assert other.loss == plain.loss and not exactness.same(other, plain, exactness.PATH_BOUND[torch.float32])
    monkeypatch.undo()
    for waiting in kept:
        waiting.close()  # type: ignore[attr-defined]
