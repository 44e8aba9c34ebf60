"""Weights into memory, through transformers: a folder becomes a model in the number format asked for."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch

from myna.errors import ModelError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def quiet_libraries() -> None:
    """Turns off telemetry, progress bars and advice of the libraries beneath; call before importing them."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # peft asks transformers for an attribute by its old name
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def read_config(folder: Path) -> Any:
    """The model's transformers config; ModelError where it is none."""
    quiet_libraries()
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, KeyError, OSError) as error:
        raise ModelError(f"its config.json is refused: {first_line(error)}", where=str(folder)) from error


def load_base(folder: Path, dtype: str, *, attention: str = "sdpa", device: str = "cpu") -> Any:
    """The frozen base model (a transformers causal LM in evaluation mode) from a folder; `dtype` fp32, bf16 or fp16."""
    quiet_libraries()
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=DTYPES[dtype],
            attn_implementation=attention,
            local_files_only=True,
            output_loading_info=True,
        )
    except (ValueError, KeyError, OSError, SafetensorError) as error:
        raise ModelError(f"could not be loaded: {first_line(error)}", where=str(folder)) from error
    missing = sorted(loaded["missing_keys"])
    if missing:  # transformers would fill them with random numbers
        raise ModelError(
            f"{len(missing)} of its weights are not in the files: {missing[0]}, …", where=str(folder)
        )
    model.requires_grad_(False)
    return model.to(device).eval()


def first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
