"""LoRA dropout on the fast path: given the same masks it is peft's, and the masks follow from seed, step and pack alone."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import exactness
import pytest
import tiny
import torch
from exactness import PATH_BOUND, Answer, adapted, distance, examples, require_same, same
from tiny_lora import new_adapter, new_base

import myna.engine.decoder
import myna.steps
from myna.adapters.files import load_adapter
from myna.adapters.methods import trainable_parameters
from myna.data.packing import Batch, collate
from myna.engine.dropout import DropoutMask, PackMasks
from myna.engine.lora import LoraGroup
from myna.engine.products import WideProducts
from myna.engine.step import FastStepper, KernelsName, make_stepper
from myna.engine.torch_kernels import TorchKernels
from myna.errors import Interrupted
from myna.model.load import load_base
from myna.pipeline import train_stage
from myna.prepare import prepare
from myna.recipe import Recipe, load_recipe
from myna.run import Run
from myna.show import Show
from myna.stored import run_of
from myna.train import train

RATE = 0.3
DRAW = (42, 3, 1)
EXACT = torch.float64
Patch = pytest.MonkeyPatch


def with_dropout(model: Any, make: Callable[[str], torch.nn.Module]) -> Any:
    """The model with `make(name)` as the dropout of each module that has an adapter."""
    for name, module in model.named_modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = make(name)
    return model


def dropping(family: str, dtype: torch.dtype = EXACT, rate: float = RATE, **more: Any) -> Any:
    return with_dropout(adapted(family, dtype, **more), lambda _: torch.nn.Dropout(rate))


def pack(draw: tuple[int, ...] = DRAW) -> Batch:
    return collate(examples(), draw=draw)


def fast(
    family: str, batch: Batch, dtype: torch.dtype = EXACT, kernels: Any = "torch", **more: Any
) -> Answer:
    return exactness.fast_answer(dropping(family, dtype), [batch], kernels, **more)


class Given(torch.nn.Module):
    """A dropout that draws nothing: its factors, padded as the plain forward pads rows, are [D, L, K]."""

    def __init__(self, mask: DropoutMask, batch: Batch, dtype: torch.dtype) -> None:
        super().__init__()
        factor_TK = mask.keep().to(dtype) / (1 - mask.rate)
        rows = [factor_TK[s.start : s.start + s.length] for s in batch.segments]
        self.factor_DLK = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor_DLK


def masks_of(model: Any, batch: Batch) -> dict[str, DropoutMask]:
    """The masks that the fast path draws for a pack, by the name of the module; `model` is taken apart."""
    names = {id(parameter): name for name, parameter in trainable_parameters(model).items()}
    stepper = make_stepper(model, "fast")
    assert isinstance(stepper, FastStepper)
    masks = stepper.decoder.masks(batch)
    assert masks is not None
    groups = [group for group in stepper.decoder.groups() if group.parts]
    parts = [(group, part) for group in groups for part in group.parts]
    return {
        names[id(part.a)].removesuffix(".lora_A.default.weight"): masks.of(
            number, group.frozen.num_in, group.dropout
        )
        for number, (group, part) in enumerate(parts)
    }


def peft_given_the_masks(family: str, dtype: torch.dtype, batch: Batch, **more: Any) -> Answer:
    masks = masks_of(dropping(family, dtype, **more), batch)
    model = with_dropout(adapted(family, dtype, **more), lambda name: Given(masks[name], batch, dtype))
    return exactness.reference_answer(model, [batch])


# biases, fused q k v, both blocks on one input, second norms
FAMILIES = ("llama", "qwen2", "phi3", "gpt_neox", "gemma2-window")
CASES: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES),
    *((family, {"method": "rslora"}) for family in ("llama", "phi3")),
    ("llama-bias", {"targets": ["k_proj", "down_proj"]}),
    ("llama", {"targets": r".*layers\.1\.mlp\.up_proj"}),
]


@exactness.each_kind
@pytest.mark.parametrize(("family", "more"), CASES, ids=str)
def test_given_the_same_masks_it_is_pefts(
    family: str, more: dict[str, Any], kernels: KernelsName, dtype: torch.dtype
) -> None:
    batch = pack()
    expected = peft_given_the_masks(family, dtype, batch, **more)
    found = exactness.fast_answer(dropping(family, dtype, **more), [batch], kernels)
    require_same(found, expected, PATH_BOUND[dtype])
    assert not same(exactness.fast_answer(adapted(family, dtype, **more), [batch], kernels), expected, 0.02)


def test_bfloat16_is_near_it() -> None:
    truth = peft_given_the_masks("llama", EXACT, pack())
    for kernels in ("torch", "native", TorchKernels(WideProducts())):
        found = fast("llama", pack(), torch.bfloat16, kernels)
        assert distance(found, truth) < 0.06


@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_int8_weights_and_dropout(kernels: KernelsName) -> None:
    """As far from the dense weights as without dropout."""
    calibration = collate(examples())
    off = []
    for batch in (calibration, pack()):
        dense = fast("llama", batch, torch.float32)
        off.append(distance(fast("llama", batch, torch.float32, kernels, quantize_with=calibration), dense))
    assert 0 < off[1] < 1.5 * off[0] < 0.1
    assert distance(dense, fast("llama", calibration, torch.float32)) > 0.2


@exactness.each_kind
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_layers_that_run_again_draw_the_same_to_the_bit(
    family: str, kernels: KernelsName, dtype: torch.dtype
) -> None:
    plain, *others = (fast(family, pack(), dtype, kernels, checkpoint_layers=every) for every in (0, 1, 2))
    assert all(is_same_to_the_bit(other, plain) for other in others)


def is_same_to_the_bit(found: Answer, expected: Answer) -> bool:
    gradients = expected.gradients.items()
    return found.loss == expected.loss and all(torch.equal(found.gradients[n], g) for n, g in gradients)


@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_the_same_draw_twice_is_the_same_bytes_and_another_is_not(kernels: KernelsName) -> None:
    model = dropping("llama", torch.float32)
    stepper = make_stepper(model, "fast", kernels=exactness.kernels_named(kernels))
    first, again, *others = (
        exactness.answer_of(stepper, model, [pack(draw)])
        for draw in (DRAW, DRAW, (42, 3, 2), (42, 4, 1), (43, 3, 1))
    )
    assert is_same_to_the_bit(again, first)
    assert all(distance(other, first) > 0.05 for other in others)


@exactness.each_kind
def test_a_pack_without_a_draw_drops_nothing(kernels: KernelsName, dtype: torch.dtype) -> None:
    batch = collate(examples())
    plain = exactness.fast_answer(adapted("llama", dtype), [batch], kernels)
    assert is_same_to_the_bit(fast("llama", batch, dtype, kernels), plain)


def test_a_pack_shares_or_draws() -> None:
    with pytest.raises(AssertionError):
        collate(examples(), share=True, draw=DRAW)


# Planted faults


def one_mask_for_the_group(patch: Patch) -> None:
    honest = LoraGroup._masks

    def _masks(group: LoraGroup, masks: PackMasks) -> Iterator[Any]:
        found = list(honest(group, masks))
        yield from ((part, found[0][1]) for part, _ in found)

    patch.setattr(LoraGroup, "_masks", _masks)


def the_gradient_in_x_is_not_masked(patch: Patch) -> None:
    patch.setattr(
        LoraGroup,
        "input_gradient",
        lambda group, ggh, kernels, masks: group.frozen.product_back(ggh, kernels),
    )


def without_masks(name: str) -> Callable[[Patch], None]:
    """A function of the group that is not told of the masks."""

    def plant(patch: Patch) -> None:
        honest = getattr(LoraGroup, name)
        patch.setattr(LoraGroup, name, lambda *arguments: honest(*arguments[:-1], None))

    return plant


def mask_with(name: str, value: Callable[[DropoutMask], float]) -> Callable[[Patch], None]:
    return lambda patch: patch.setattr(DropoutMask, name, property(value))


def another_adapters_mask(patch: Patch) -> None:
    honest = PackMasks.of
    patch.setattr(PackMasks, "of", lambda masks, adapter, *more: honest(masks, adapter ^ 1, *more))


FAULTS: dict[str, Callable[[Patch], None]] = {
    "adapters of a group share a mask": one_mask_for_the_group,
    "the low-rank gradient in x rides along unmasked": the_gradient_in_x_is_not_masked,
    "the gradient of A is of the whole input": without_masks("add_adapter_gradients"),
    "the forward drops nothing": without_masks("forward"),
    "what is kept is not scaled": mask_with("scale", lambda mask: 1.0),
    "the rate is a little off": mask_with("threshold", lambda mask: round(mask.rate * 1.01 * 2**32) - 2**31),
    "an adapter has another's mask": another_adapters_mask,
}


@functools.cache
def honest_answer() -> Answer:
    return peft_given_the_masks("llama", EXACT, pack())


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_dropout_is_seen(fault: str, monkeypatch: Patch) -> None:
    assert same(fast("llama", pack()), honest_answer(), PATH_BOUND[EXACT])
    FAULTS[fault](monkeypatch)
    assert not same(fast("llama", pack()), honest_answer(), PATH_BOUND[torch.float32])


def test_masks_that_change_in_a_recomputation_are_seen(monkeypatch: Patch) -> None:
    plain, honest = fast("llama", pack()), myna.engine.decoder._run_layers

    def changed(x: torch.Tensor, layers: Any, tools: dict[str, Any]) -> torch.Tensor:
        if torch.is_grad_enabled():
            other = PackMasks((0,), len(x), 99, 2 * x.shape[1], x.device)
            tools = {name: replace(tool, masks=other) for name, tool in tools.items()}
        return honest(x, layers, tools)

    monkeypatch.setattr(myna.engine.decoder, "_run_layers", changed)
    found = fast("llama", pack(), checkpoint_layers=1)
    assert found.loss == plain.loss and not same(found, plain, PATH_BOUND[torch.float32])


# A run


@pytest.fixture
def recipe(tmp_path: Path, tiny_base: Path, monkeypatch: Patch) -> Recipe:
    monkeypatch.chdir(tmp_path)
    rows = tiny.write_rows(tmp_path / "orders.jsonl", tiny.rows(20))
    path = tmp_path / "recipe.yaml"
    settings = {"epochs": 2, "pack_tokens": 150}
    path.write_text(tiny.recipe_text(tiny_base, rows, train=settings, adapter={"dropout": 0.2}))
    return load_recipe(path)


def named(recipe: Recipe, name: str, **adapter: object) -> Recipe:
    run, settings = recipe.run.model_copy(update={"name": name}), recipe.adapter.model_copy(update=adapter)
    return recipe.model_copy(update={"run": run, "adapter": settings})


def adapter_bytes(run: Run) -> bytes:
    return (run.adapter_dir / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_run_repeats_and_goes_on_to_the_bit(recipe: Recipe) -> None:
    said: list[str] = []
    first = train_stage(named(recipe, "first"), show=Show(say=said.append))
    told = " ".join(said)
    assert "packed, fast path" in told and "each row has masks of its own" in told
    second = named(recipe, "second")
    asked = iter([None, None, None, *[signal.SIGTERM] * 9])
    with pytest.raises(Interrupted):
        list(train(prepare(second, run_of(second), print), print, lambda: next(asked)))
    torch.manual_seed(99)  # nothing hangs on a generator's state
    assert adapter_bytes(train_stage(second, resume=True)) == adapter_bytes(first)
    assert adapter_bytes(train_stage(named(recipe, "none", dropout=0.0))) != adapter_bytes(first)


def test_every_pack_of_a_run_has_a_draw_of_its_own(recipe: Recipe, monkeypatch: Patch) -> None:
    seen: list[Batch] = []
    honest = myna.steps.collate

    def watched(*arguments: Any, **settings: Any) -> Batch:
        seen.append(honest(*arguments, **settings))
        return seen[-1]

    monkeypatch.setattr(myna.steps, "collate", watched)
    run = train_stage(recipe)
    num_packs = [line.count('"num_packs": 2') for line in run.metrics_path.read_text().splitlines()]
    assert any(num_packs), "no step has two packs"
    draws = [batch.draw for batch in seen]
    assert None not in draws and len(set(draws)) == len(draws) > len(num_packs) == 10
    assert all(len(path) == 1 for batch in seen for path in batch.documents)


def test_what_is_trained_drops_nothing_when_it_answers(tmp_path: Path) -> None:
    """Evaluation, export and chat load the adapter by one function."""
    base = new_base(tmp_path / "base")
    folder = new_adapter(base, tmp_path / "adapter", lora_dropout=0.5)
    model = load_adapter(load_base(base, "fp32"), folder)
    rates = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert 0.5 in rates, "the adapter has no dropout to be off"
    ids = torch.arange(3, 20)[None]
    assert torch.equal(model(ids).logits, model(ids).logits)
    assert not torch.equal(model(ids).logits, model.train()(ids).logits)
