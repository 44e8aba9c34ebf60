"""Two paths, one answer: over every family with a fast path, packed equals the plain forward of transformers and peft."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from myna.adapters.methods import METHODS, add_adapter, trainable_parameters
from myna.data.packing import Batch, collate
from myna.data.render import IGNORE, Example
from myna.engine.step import FAST_FAMILIES, attention_for, choose_path, pack_loss, prepare_model
from myna.recipe import AdapterSettings

FAMILIES = {name: {} for name in FAST_FAMILIES} | {
    "mistral-window": {"sliding_window": 5},
    "llama-bias": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
}
LENGTHS = (9, 3, 24, 1, 7, 25)


def examples(lengths: Sequence[int] = LENGTHS) -> list[Example]:
    random = np.random.default_rng(0)
    made = []
    for length in lengths:
        ids = random.integers(3, 400, length)
        labels = np.where(random.random(length) < 0.6, ids, IGNORE)
        made.append(Example(ids, labels))
    return made


def adapted(name: str, path: str, dtype: torch.dtype, method: str = "lora") -> Any:
    """A tiny model of a family with an adapter whose B is not zero, in training mode on a path."""
    from transformers import AutoModelForCausalLM

    config = tiny.model_config(name.partition("-")[0], **FAMILIES[name])
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention_for(path))  # type: ignore[arg-type]
    settings = AdapterSettings(method=method, r=4, alpha=8)  # type: ignore[arg-type]
    model = add_adapter(model.requires_grad_(False), settings, seed=3, base_name="tiny").to(dtype)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    prepare_model(model, path)  # type: ignore[arg-type]
    return model


def loss_and_gradients(model: Any, batches: Sequence[Batch], path: str) -> tuple[float, torch.Tensor]:
    total = 0.0
    for batch in batches:
        loss = pack_loss(model, batch, path)  # type: ignore[arg-type]
        loss.backward()
        total += float(loss.detach())
    flat = [p.grad.flatten() for p in trainable_parameters(model).values() if p.grad is not None]
    assert len(flat) == len(trainable_parameters(model))
    return total, torch.cat(flat)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.fast])
@pytest.mark.parametrize("family", FAMILIES)
def test_fast_equals_reference(family: str, method: str, dtype: torch.dtype, bound: float) -> None:
    batch = [collate(examples())]
    fast, fast_gradient = loss_and_gradients(adapted(family, "fast", dtype, method), batch, "fast")
    plain, plain_gradient = loss_and_gradients(
        adapted(family, "reference", dtype, method), batch, "reference"
    )
    assert abs(fast - plain) <= bound * abs(plain)
    assert (fast_gradient - plain_gradient).norm() <= bound * plain_gradient.norm()
    assert plain_gradient.norm() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_one_row_at_a_time(family: str) -> None:
    rows = examples()
    packed, gradient = loss_and_gradients(adapted(family, "fast", torch.float64), [collate(rows)], "fast")
    alone, alone_gradient = loss_and_gradients(
        adapted(family, "fast", torch.float64), [collate([row]) for row in rows], "fast"
    )
    assert packed == pytest.approx(alone, rel=1e-12)
    assert (gradient - alone_gradient).norm() <= 1e-10 * gradient.norm()


def test_documents_never_see_each_other() -> None:
    model = adapted("llama", "fast", torch.float64)
    first, second, third = examples((12, 8, 12))
    other = Example(first.input_ids_T[::-1].copy(), np.full(12, IGNORE))
    masked = Example(first.input_ids_T, np.full(12, IGNORE))
    before = float(pack_loss(model, collate([masked, second, third]), "fast").detach())
    after = float(pack_loss(model, collate([other, second, third]), "fast").detach())
    assert before == after
    moved = Example(second.input_ids_T[::-1].copy(), second.labels_T)
    assert float(pack_loss(model, collate([masked, moved, third]), "fast").detach()) != before


def test_what_has_no_fast_path_says_why() -> None:
    llama, adapter = tiny.model_config("llama"), AdapterSettings()
    assert choose_path(llama, adapter) == ("fast", "")
    assert choose_path(llama, AdapterSettings(dropout=0.1))[0] == "reference"
    assert "attention dropout" in choose_path(tiny.model_config("llama", attention_dropout=0.1), adapter)[1]
    assert "gpt_neox" in choose_path(tiny.model_config("gpt_neox"), adapter)[1]
