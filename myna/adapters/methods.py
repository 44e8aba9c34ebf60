"""METHODS: one line a PEFT method. What a method is and does is peft's; what it is called and defaults to is here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from myna.errors import RecipeError
from myna.settings import AdapterSettings


@dataclass(frozen=True)
class Method:
    """A PEFT method: what it adds to peft's LoraConfig, and whether the fast path computes it."""

    description: str
    fast: bool
    config: Mapping[str, Any] = field(default_factory=dict)


METHODS: Mapping[str, Method] = {
    "lora": Method("LoRA (Hu et al. 2021): scale alpha / r", fast=True),
    "rslora": Method(
        "rank-stabilized LoRA (Kalajdzievski 2023): scale alpha / √r", fast=True, config={"use_rslora": True}
    ),
}


# The head and the embedding are often one tensor: an adapter on one of them could not be merged exactly.
NOT_TARGETS = frozenset({"lm_head", "embed_tokens", "embed_out", "wte"})


def add_adapter(model: Any, settings: AdapterSettings, *, seed: int, base_name: str) -> Any:
    """Puts a fresh adapter on a frozen base: the same settings and seed give the same weights.

    Returns the peft model. Raises RecipeError where the target modules are not in this model.
    """
    from peft import LoraConfig, get_peft_model

    targets = settings.target_modules
    named = set() if isinstance(targets, str) else set(targets)
    if named & NOT_TARGETS:
        raise RecipeError(
            f"adapter.target_modules: {', '.join(sorted(named & NOT_TARGETS))} cannot be trained yet",
            help=f"the linear layers: {', '.join(linear_layer_names(model))}; or all-linear",
        )
    config = LoraConfig(
        r=settings.r,
        lora_alpha=int(settings.alpha) if settings.alpha == int(settings.alpha) else settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets if isinstance(targets, str) else sorted(set(targets)),
        task_type="CAUSAL_LM",
        **METHODS[settings.method].config,
    )
    torch.manual_seed(seed)
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise RecipeError(
            f"adapter.target_modules {targets!r} fits no layer of this base",
            help=f"its linear layers: {', '.join(linear_layer_names(model))}; or all-linear",
        ) from error
    adapted.peft_config["default"].base_model_name_or_path = base_name
    return adapted


def linear_layer_names(model: torch.nn.Module) -> list[str]:
    """The last parts of the names of a model's linear layers, the head apart: what `target_modules` may name."""
    names = {name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    return sorted(names - {"lm_head"})


def trainable_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The adapter's parameters by name, in a fixed order."""
    return {name: p for name, p in sorted(model.named_parameters()) if p.requires_grad}
