"""Adapters as others save them: by plain peft, on a tiny base, with weights that change what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_adapter(folder: Path, base: Path, config: Any, *, num_tokens: int | None = None) -> Path:
    """A peft adapter of random weights, saved by `save_pretrained`; `num_tokens` makes the base larger before."""
    import torch
    from peft import get_peft_model

    from myna.model.load import load_base

    torch.manual_seed(1)
    model = load_base(base, "fp32")
    model.name_or_path = str(base)
    if num_tokens is not None:
        model.resize_token_embeddings(num_tokens, mean_resizing=False)
    adapted = get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    adapted.save_pretrained(str(folder))
    return folder


def lora(**settings: Any) -> Any:
    """peft's LoraConfig over the attention's linear layers."""
    from peft import LoraConfig

    defaults: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    return LoraConfig(task_type="CAUSAL_LM", **{**defaults, **settings})
