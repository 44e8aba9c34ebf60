"""A model without its weights: what its tensors are called, their shapes, and which are tied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from myna.model.load import DTYPES, read_config


def skeleton(folder: Path, dtype: str = "fp32") -> Any:
    """The transformers causal LM of a folder's config.json on torch's meta device, which holds no numbers."""
    import torch
    from transformers import AutoModelForCausalLM

    config = read_config(folder)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])


def tensor_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Every tensor that a model keeps, by name, a tied one under each of its names."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
