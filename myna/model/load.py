"""Weights into memory, through transformers: a folder becomes a model in the number format asked for."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import warnings
from collections.abc import Iterator
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
        raise ModelError(f"its config.json is refused: {_first_line(error)}", where=str(folder)) from error


def load_base(folder: Path, dtype: str, *, attention: str = "sdpa", device: str = "cpu") -> Any:
    """The frozen base model (a transformers causal LM in evaluation mode) from a folder; `dtype` fp32, bf16 or fp16."""
    quiet_libraries()
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES[dtype], attn_implementation=attention, local_files_only=True
        )
    except (ValueError, KeyError, OSError, SafetensorError) as error:
        raise ModelError(f"could not be loaded: {_first_line(error)}", where=str(folder)) from error
    model.requires_grad_(False)
    return model.to(device).eval()


def dequantize_gguf(gguf_path: Path, folder: Path) -> None:
    """Writes a .gguf file's model, in float32, and its tokenizer into `folder`, as transformers reads them.

    transformers gives every BPE tokenizer the same splitting of text before merging; the file names its own
    (`tokenizer.ggml.pre`), and that one is written. Raises ModelError for files it cannot read.
    """
    quiet_libraries()
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        with warnings.catch_warnings(), _no_progress():
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_pretrained(
                gguf_path.parent,
                gguf_file=gguf_path.name,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        raise ModelError(
            f"cannot be read as a base model: {_first_line(error)}", where=str(gguf_path)
        ) from error
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = gguf_path.stem
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _write_pre_tokenizer(gguf_path, folder)


def _write_pre_tokenizer(gguf_path: Path, folder: Path) -> None:
    from gguf import GGUFReader

    from myna.model.families import pre_tokenizer_json

    field = GGUFReader(gguf_path).get_field("tokenizer.ggml.pre")
    wanted = pre_tokenizer_json(str(field.contents())) if field else None
    if wanted is None:
        return
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["pre_tokenizer"] = wanted
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


@contextlib.contextmanager
def _no_progress() -> Iterator[None]:
    """transformers draws the unpacking of a GGUF with tqdm itself, whatever it was told about progress bars."""
    from tqdm import tqdm

    before = tqdm.__init__
    tqdm.__init__ = functools.partialmethod(before, disable=True)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        tqdm.__init__ = before  # type: ignore[method-assign]


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
