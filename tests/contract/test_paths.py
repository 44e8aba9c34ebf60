"""Two paths, one answer: over every family with a fast path, packed equals the plain forward of transformers and peft."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_families
import torch
from torch.overrides import TorchFunctionMode

from myna.adapters.methods import METHODS, add_adapter, trainable_parameters
from myna.data.packing import Batch, collate
from myna.data.render import IGNORE, Example
from myna.engine.families import FAST
from myna.engine.step import choose_path, make_stepper
from myna.recipe import AdapterSettings

# by family: what is changed in the tiny config of its real shape (windows shorter than the rows, caps that bend)
FAMILIES: dict[str, dict[str, Any]] = {name: {} for name in FAST} | {
    "mistral-window": {"sliding_window": 5},
    "llama-bias": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "qwen2-tied": {"tie_word_embeddings": True, "num_key_value_heads": 4},
    "phi3-window": {"sliding_window": 7},
    "gemma2-window": {"sliding_window": 5},
    "gemma3_text-window": {"sliding_window": 5},
    "gpt_neox-serial": {"use_parallel_residual": False, "attention_bias": False},
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


def adapted(name: str, dtype: torch.dtype, method: str = "lora", seed: int = 2) -> Any:
    """A tiny model of a family with an adapter whose B is not zero."""
    from transformers import AutoModelForCausalLM

    model_type = name.partition("-")[0]
    config = tiny_families.family_config(model_type, 400, **FAMILIES[name])
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).to(torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases that do something
                parameter.add_(torch.randn_like(parameter) * 0.2)
    settings = AdapterSettings(method=method, r=4, alpha=8)  # type: ignore[arg-type]
    model = add_adapter(model.requires_grad_(False), settings, seed=3, base_name="tiny").to(dtype)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.copy_(parameter + torch.randn(parameter.shape, dtype=torch.float64) * 0.1)
    return model


class Double(TorchFunctionMode):
    """float64 stays float64: transformers turns to float32 inside norms, rotary embeddings and softmax."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64:
            if func is torch.Tensor.float:
                return args[0]
            if func is torch.Tensor.to and torch.float32 in (*args[1:], kwargs.get("dtype")):
                return args[0]
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def loss_and_gradients(
    model: Any, batches: Sequence[Batch], path: str, **settings: Any
) -> tuple[float, torch.Tensor]:
    stepper = make_stepper(model, path, **settings)  # type: ignore[arg-type]
    total = 0.0
    with Double():
        for batch in batches:
            loss = stepper.loss(batch)
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
    fast, fast_gradient = loss_and_gradients(adapted(family, dtype, method), batch, "fast")
    plain, plain_gradient = loss_and_gradients(adapted(family, dtype, method), batch, "reference")
    assert abs(fast - plain) <= bound * abs(plain)
    assert (fast_gradient - plain_gradient).norm() <= bound * plain_gradient.norm()
    assert plain_gradient.norm() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_one_row_at_a_time(family: str) -> None:
    rows = examples()
    packed, gradient = loss_and_gradients(adapted(family, torch.float64), [collate(rows)], "fast")
    alone, alone_gradient = loss_and_gradients(
        adapted(family, torch.float64), [collate([row]) for row in rows], "fast"
    )
    assert packed == pytest.approx(alone, rel=1e-12)
    assert (gradient - alone_gradient).norm() <= 1e-10 * gradient.norm()


def test_documents_never_see_each_other() -> None:
    stepper = make_stepper(adapted("llama", torch.float64), "fast")
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
    assert choose_path(llama, AdapterSettings(dropout=0.1))[0] == "reference"
    assert "dropout of its own" in choose_path(tiny.model_config("llama", attention_dropout=0.1), adapter)[1]
    assert "falcon" in choose_path(tiny_families.family_config("falcon", 400), adapter)[1]
