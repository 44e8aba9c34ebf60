"""The exactness suite on CUDA: the fast path there equals the plain forward there, and the one on the CPU."""

from __future__ import annotations

import exactness
import pytest
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

from myna.data.packing import Batch, collate
from myna.engine.step import make_stepper

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
