"""Tiny bases of every family, and adapters on them whose B is not zero, as transformers and peft save them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from tiny_families import new_model
from tiny_gguf import VOCAB_SIZE


def new_base(folder: Path, model_type: str = "llama", **changes: Any) -> Path:
    """A model folder of random weights from a fixed seed, without a tokenizer."""
    new_model(folder, model_type, changes.pop("vocab_size", VOCAB_SIZE), **changes)
    return folder


def new_adapter(base_dir: Path, folder: Path, config: Any = None, **settings: Any) -> Path:
    """An adapter of `config` (peft's; LoRA by default) on a base, every trainable number moved away from its start."""
    from peft import LoraConfig, get_peft_model

    from myna.model.load import load_base

    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings
    with warnings.catch_warnings():  # peft warns of ends that are tied, which is what some tests are about
        warnings.simplefilter("ignore")
        model = get_peft_model(load_base(base_dir, "fp32"), config or LoraConfig(**settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def merged_by_peft(base_dir: Path, adapter_dir: Path) -> Any:
    """What peft itself makes of base + adapter in float32."""
    from myna.adapters.files import load_adapter
    from myna.model.load import load_base

    return load_adapter(load_base(base_dir, "fp32"), adapter_dir).merge_and_unload(safe_merge=True).eval()
