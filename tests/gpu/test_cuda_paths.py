"""The exactness suite on CUDA: the fast path there equals the plain forward there, and the one on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import exactness
import pytest
import tiny
import torch
from exactness import (
    FAMILIES,
    PATH_BOUND,
    Answer,
    adapted,
    distance,
    examples,
    related_examples,
    require_same,
)

import myna.engine.scaling
from myna.adapters.methods import trainable_parameters
from myna.data.packing import Batch, collate
from myna.engine.flex import FlexKernels, flex_missing
from myna.engine.kept import PlaceName, input_place
from myna.engine.scaling import LossScale, mean_loss
from myna.engine.step import make_stepper
from myna.pipeline import train_stage
from myna.recipe import load_recipe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is to be seen here")
DTYPES = [torch.float32, torch.float64]
SHARED = (
    "llama",
    "mistral-window",
    "gemma2-window",
    "gemma3_text-window",
    "phi3-window",
    "qwen3",
    "gpt_neox",
)


@pytest.fixture(autouse=True)
def exact_products() -> None:
    """TensorFloat-32 keeps ten bits of a float32: too few to compare by."""
    torch.backends.cuda.matmul.allow_tf32 = False


def on_gpu(
    family: str, dtype: torch.dtype, batches: list[Batch], path: str = "fast", **more: object
) -> Answer:
    model = adapted(family, dtype).to("cuda")
    answer = exactness.answer_of(make_stepper(model, path, **more), model, batches)  # type: ignore[arg-type]
    return Answer(answer.loss, {name: g.cpu() for name, g in answer.gradients.items()})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_fast_equals_reference_on_cuda(family: str, dtype: torch.dtype) -> None:
    batch = [collate(examples())]
    expected = on_gpu(family, dtype, batch, "reference")
    require_same(on_gpu(family, dtype, batch), expected, PATH_BOUND[dtype])


@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_equals_the_cpu(family: str) -> None:
    found = on_gpu(family, torch.float64, [collate(examples())])
    require_same(found, exactness.reference_of(family, torch.float64), PATH_BOUND[torch.float64])


@pytest.mark.parametrize("family", SHARED)
def test_shared_equals_not_shared_on_cuda(family: str) -> None:
    rows, dtype = related_examples(), torch.float64
    found = on_gpu(family, dtype, [collate(rows, share=True)])
    expected = on_gpu(family, dtype, [collate(rows)])
    require_same(found, expected, exactness.ORDER_BOUND[dtype], each=PATH_BOUND[dtype])


@pytest.mark.parametrize("every", [1, 2])
def test_checkpointed_is_not_checkpointed_on_cuda(every: int) -> None:
    batch, dtype = [collate(examples())], torch.float64
    found = on_gpu("gemma2-window", dtype, batch, checkpoint_layers=every)
    require_same(found, on_gpu("gemma2-window", dtype, batch), 1e-12, each=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_near_the_truth_as_the_plain_forward(family: str) -> None:
    """Rounded to eight bits, neither path is exact: the fast one is no further off than the plain one, and a margin."""
    batch, truth = [collate(examples())], exactness.reference_of(family, torch.float64)
    fast, plain = (on_gpu(family, torch.bfloat16, batch, path) for path in ("fast", "reference"))
    assert abs(fast.loss - truth.loss) <= 0.01 * truth.loss
    assert distance(fast, truth) <= 1.5 * distance(plain, truth) + 0.01


def test_int8_is_near_the_dense_step_on_cuda() -> None:
    batch = collate(examples())
    dense = on_gpu("llama", torch.bfloat16, [batch])
    found = on_gpu("llama", torch.bfloat16, [batch], quantize_with=batch)
    assert 0 < abs(found.loss - dense.loss) < 0.01 * dense.loss
    assert 0 < distance(found, dense) < 0.1


# Attention by block masks


def block_masks() -> FlexKernels:
    why = flex_missing("cuda")
    if why:
        pytest.skip(why)
    return FlexKernels()


@pytest.mark.parametrize("family", FAMILIES)
def test_block_masks_equal_the_reference(family: str) -> None:
    """flex_attention's products are as exact as float32 is told to be; its kernels have no float64."""
    torch.set_float32_matmul_precision("highest")
    batch, dtype = [collate(examples())], torch.float32
    found = on_gpu(family, dtype, batch, kernels=block_masks())
    require_same(found, exactness.reference_of(family, dtype), PATH_BOUND[dtype])


@pytest.mark.parametrize("family", SHARED)
def test_block_masks_share_beginnings(family: str) -> None:
    torch.set_float32_matmul_precision("highest")
    rows, dtype = related_examples(), torch.float32
    found = on_gpu(family, dtype, [collate(rows, share=True)], kernels=block_masks())
    expected = on_gpu(family, dtype, [collate(rows)])
    require_same(found, expected, exactness.ORDER_BOUND[dtype] * 3, each=PATH_BOUND[dtype])


@pytest.mark.parametrize("family", exactness.FEW)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_block_masks_in_few_bits_are_as_near_the_truth_as_the_plain_forward(
    family: str, dtype: torch.dtype
) -> None:
    batch, truth = [collate(examples())], exactness.reference_of(family, torch.float64)
    fast = on_gpu(family, dtype, batch, kernels=block_masks())
    plain = on_gpu(family, dtype, batch, "reference")
    assert abs(fast.loss - truth.loss) <= 0.01 * truth.loss
    assert distance(fast, truth) <= 1.5 * distance(plain, truth) + 0.01


# Inputs of layers that wait elsewhere


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("name", ["cpu", "disk"])
def test_inputs_kept_elsewhere_are_the_same_to_the_bit_on_cuda(
    name: PlaceName, every: int, tmp_path: Path
) -> None:
    """Twelve layers of two packs: copies of the side stream run beside layers that write where freed inputs lay."""
    batches = [collate(examples((900, 700, 400))), collate(examples((1000, 30), seed=1))]
    found = []
    for place in ("device", name):
        model = adapted("llama", torch.float32, num_hidden_layers=12).to("cuda")
        keep_inputs = input_place(place, device="cuda", folder=tmp_path)  # type: ignore[arg-type]
        stepper = make_stepper(model, "fast", checkpoint_layers=every, keep_inputs=keep_inputs)
        found.append(exactness.answer_of(stepper, model, batches))
    assert found[0].loss == found[1].loss
    for parameter, gradient in found[0].gradients.items():
        assert torch.equal(found[1].gradients[parameter], gradient), parameter


@pytest.mark.parametrize("name", ["cpu", "disk"])
def test_inputs_kept_elsewhere_are_not_on_the_device(name: PlaceName, tmp_path: Path) -> None:
    batch, held = collate(examples((1000, 1000))), []
    for place in ("device", name):
        model = adapted("llama", torch.float32, num_hidden_layers=12).to("cuda")
        keep_inputs = input_place(place, device="cuda", folder=tmp_path)  # type: ignore[arg-type]
        stepper = make_stepper(model, "fast", checkpoint_layers=1, keep_inputs=keep_inputs)
        before = torch.cuda.memory_allocated()
        loss = stepper.loss(batch)
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated() - before)
        loss.backward()
    assert held[0] - held[1] >= 11 * 2000 * 64 * 4


# fp16


@pytest.mark.parametrize("family", exactness.FEW)
def test_fp16_is_as_near_the_truth_as_the_plain_forward_on_cuda(family: str) -> None:
    """The base in fp16, the adapter in float32, the loss scaled: as a GPU without bfloat16 trains."""
    batch, answers = collate(examples()), []
    for path, dtype in (("fast", torch.float16), ("reference", torch.float16), ("reference", torch.float64)):
        model = adapted(family, dtype)
        exact = trainable_parameters(adapted(family, torch.float64))
        for name, parameter in trainable_parameters(model).items():
            parameter.data = exact[name].data.to(torch.float32 if dtype is torch.float16 else dtype)
        stepper = make_stepper(model.to("cuda"), path)  # type: ignore[arg-type]
        scaling = LossScale(2.0**10) if dtype is torch.float16 else None
        with exactness.Double():
            loss = mean_loss(stepper, batch, len(batch.targets_N), scaling)
            loss.backward()
        scale = scaling.scale if scaling else 1.0
        gradients = {n: p.grad.cpu() / scale for n, p in trainable_parameters(model).items()}  # type: ignore[union-attr]
        answers.append(Answer(float(loss.detach()) / scale, gradients))
    fast, plain, truth = answers
    assert abs(fast.loss - truth.loss) <= 1e-3 * truth.loss
    assert distance(fast, truth) <= 1.5 * distance(plain, truth) + 0.005


def test_a_training_in_fp16_on_cuda_skips_what_overflows(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(myna.engine.scaling, "FIRST_SCALE", 2.0**24)
    rows = tiny.write_rows(tmp_path / "orders.jsonl", tiny.rows(40))
    path = tmp_path / "recipe.yaml"
    settings = {"gradient_checkpointing": "all", "checkpoint_to": "cpu"}
    path.write_text(tiny.recipe_text(tiny_base, rows, model={"dtype": "fp16"}, train=settings))
    run = train_stage(load_recipe(path))
    lines = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    num_skipped = sum(line["skipped"] for line in lines)
    assert lines[0]["skipped"] and 2 <= num_skipped <= 7
    assert lines[-1]["loss"] < lines[0]["loss"]
