"""Weights into memory, through transformers: a folder becomes a model in the number format asked for."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from myna.errors import MachineError, ModelError

# torch on Windows, Linux, a GPU; C++ and cuBLAS through torch; the system
NO_MEMORY = r"not enough memory|[Cc]an(no|')t allocate memory|out of memory|bad_alloc|ALLOC_FAILED"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def quiet_libraries() -> None:
    """Turns off telemetry, progress bars and advice of the libraries beneath; call before importing them."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # weights one after another: threads would keep what they read ahead, and glibc gives back little of theirs
    os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")
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
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # what transformers raises for a foreign config.json is anything
        raise ModelError(f"its config.json is refused: {first_line(error)}", where=str(folder)) from error


def load_base(folder: Path, dtype: str, *, device: str = "cpu") -> Any:
    """The frozen base model (a transformers causal LM in evaluation mode) from a folder; `dtype` fp32, bf16 or fp16."""
    quiet_libraries()
    from transformers import AutoModelForCausalLM

    try:
        with files_read():
            model, loaded = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=DTYPES[dtype],
                local_files_only=True,
                output_loading_info=True,
                use_safetensors=True,
                trust_remote_code=False,
            )
            model.to(device)
    except Exception as error:  # what transformers raises for a foreign config.json is anything
        if isinstance(error, MemoryError) or re.search(NO_MEMORY, str(error)):
            raise MachineError(f"has no room in memory: {first_line(error)}", where=str(folder)) from error
        raise ModelError(f"could not be loaded: {first_line(error)}", where=str(folder)) from error
    missing = sorted(loaded["missing_keys"])
    if missing:  # transformers would fill them with random numbers
        raise ModelError(
            f"{len(missing)} of its weights are not in the files: {missing[0]}, …", where=str(folder)
        )
    refuse_not_finite(model.named_parameters(), folder)
    model.requires_grad_(False)
    return model.eval()


@contextlib.contextmanager
def files_read() -> Iterator[None]:
    """Inside, transformers reads weight files tensor by tensor, as it does on Windows, instead of mapping them.

    Every page of a mapped file that was looked at counts as this process's memory until all is loaded: the file stood in
    memory beside the weights made of it.
    """
    from transformers import modeling_utils

    mapped = getattr(modeling_utils, "safe_open", None)
    if (
        mapped is None
    ):  # another transformers opens them elsewhere: then they are mapped, which takes more and no less
        yield
        return
    modeling_utils.safe_open = functools.partial(_read, mapped)
    try:
        yield
    finally:
        modeling_utils.safe_open = mapped


def _read(safe_open: Any, *arguments: Any, **named: Any) -> Any:
    return safe_open(*arguments, **(named | {"backend": "pread"}))


def refuse_not_finite(tensors: Iterable[tuple[str, torch.Tensor]], place: Path) -> None:
    """ModelError naming the first tensor with a value that is NaN or infinite: a model with one talks nonsense at best."""
    for name, tensor in tensors:
        if not tensor.is_floating_point() or bool(torch.isfinite(tensor.sum())):
            continue
        # large sums may overflow where every value is finite
        bad = int(tensor.numel() - torch.isfinite(tensor).sum())
        if bad:
            raise ModelError(
                f"{bad:,} of the {tensor.numel():,} values of {name} are not finite (NaN or infinite) in {tensor.dtype}",
                where=str(place),
                help="take the weights from their publisher again; fp16 holds no value above 65,504, bf16 and fp32 do",
            )


def first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
