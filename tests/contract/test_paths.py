"""Two paths, one answer: over every family with a fast path, packed equals the plain forward of transformers and peft."""

from __future__ import annotations

import exactness
import numpy as np
import pytest
import tiny
import tiny_families
import torch
from exactness import (
    FAMILIES,
    FEW,
    ORDER_BOUND,
    PATH_BOUND,
    adapted,
    distance,
    examples,
    fast_answer,
    require_same,
)

from myna.adapters.methods import METHODS
from myna.data.packing import collate
from myna.data.render import IGNORE, Example
from myna.engine.step import KernelsName, choose_path, make_stepper
from myna.settings import AdapterSettings

# every family by the first method, a few by the others: a method changes a factor, and that once for all families
FAST_METHODS = [name for name, method in METHODS.items() if method.fast]
CASES = [
    (family, method) for method in FAST_METHODS for family in (FAMILIES if method == FAST_METHODS[0] else FEW)
]


@exactness.each_kind
@pytest.mark.parametrize(("family", "method"), CASES)
def test_fast_equals_reference(family: str, method: str, kernels: KernelsName, dtype: torch.dtype) -> None:
    found = fast_answer(adapted(family, dtype, method), [collate(examples())], kernels)
    require_same(found, exactness.reference_of(family, dtype, method), PATH_BOUND[dtype])


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_one_row_at_a_time(family: str) -> None:
    rows, model = examples(), adapted(family, torch.float64)
    stepper = make_stepper(model, "fast")
    packed = exactness.answer_of(stepper, model, [collate(rows)])
    alone = exactness.answer_of(stepper, model, [collate([row]) for row in rows])
    require_same(packed, alone, 1e-12, each=ORDER_BOUND[torch.float64])


@pytest.mark.parametrize(
    ("family", "kernels"), [*((f, "native") for f in FAMILIES), *((f, "torch") for f in FEW)]
)
def test_bfloat16_is_as_near_the_truth_as_the_plain_forward(family: str, kernels: KernelsName) -> None:
    """Rounded to eight bits no path is exact; the fast one is hardly ever further off than the plain one."""
    batch, truth = [collate(examples())], exactness.reference_of(family, torch.float64)
    fast = fast_answer(adapted(family, torch.bfloat16), batch, kernels)
    plain = exactness.reference_of(family, torch.bfloat16)
    assert abs(fast.loss - truth.loss) <= 2e-3 * truth.loss
    assert distance(fast, truth) <= 1.25 * distance(plain, truth) < 0.06


@exactness.each_kind
def test_documents_never_see_each_other(kernels: KernelsName, dtype: torch.dtype) -> None:
    named = exactness.kernels_named(kernels)
    stepper = make_stepper(adapted("llama", dtype), "fast", kernels=named)
    first, second, third = examples((12, 8, 12))
    other = Example(first.input_ids_T[::-1].copy(), np.full(12, IGNORE))
    masked = Example(first.input_ids_T, np.full(12, IGNORE))
    before = float(stepper.loss(collate([masked, second, third])).detach())
    after = float(stepper.loss(collate([other, second, third])).detach())
    assert before == after
    moved = Example(second.input_ids_T[::-1].copy(), second.labels_T)
    assert float(stepper.loss(collate([masked, moved, third])).detach()) != before


def test_what_has_no_fast_path_says_why() -> None:
    llama, adapter = tiny.model_config("llama"), AdapterSettings()
    assert choose_path(llama, adapter) == ("fast", "")
    assert choose_path(llama, AdapterSettings(dropout=0.1)) == ("fast", "")
    assert "dropout of its own" in choose_path(tiny.model_config("llama", attention_dropout=0.1), adapter)[1]
    assert "falcon" in choose_path(tiny_families.family_config("falcon", 400), adapter)[1]
