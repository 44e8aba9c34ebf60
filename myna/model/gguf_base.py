"""A .gguf file as a base model: its weights, through transformers, and its tokenizer as a Hugging Face folder."""

from __future__ import annotations

import contextlib
import functools
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from myna.errors import ModelError
from myna.model.gguf_tokenizer import write_gguf_tokenizer
from myna.model.load import first_line, quiet_libraries


def dequantize_gguf(gguf_path: Path, folder: Path) -> None:
    """Writes a .gguf file's model, in float32, and its tokenizer into `folder`, as transformers reads them.

    Raises ModelError for files it cannot read.
    """
    quiet_libraries()
    from transformers import AutoModelForCausalLM, GgufConfig

    with _reading_gguf(gguf_path):
        model = AutoModelForCausalLM.from_pretrained(
            gguf_path.parent,
            gguf_file=gguf_path.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = gguf_path.stem
    model.save_pretrained(folder)
    del model
    write_gguf_tokenizer(gguf_path, folder)


@contextlib.contextmanager
def _reading_gguf(path: Path) -> Iterator[None]:
    """Quiet, and with whatever a broken file makes the readers raise told as a ModelError."""
    try:
        with warnings.catch_warnings(), _no_progress():
            warnings.simplefilter("ignore")
            yield
    except (ValueError, KeyError, OSError, RuntimeError, IndexError, struct.error) as error:
        raise ModelError(f"cannot be read: {first_line(error)}", where=str(path)) from error


@contextlib.contextmanager
def _no_progress() -> Iterator[None]:
    """transformers draws the unpacking of a GGUF with tqdm itself, whatever it was told about progress bars."""
    from tqdm import tqdm

    before = tqdm.__init__
    tqdm.__init__ = functools.partialmethod(before, disable=True)
    try:
        yield
    finally:
        tqdm.__init__ = before
