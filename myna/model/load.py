"""Weights into memory, through transformers: a folder becomes a model in the number format asked for."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import struct
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
        raise ModelError(f"its config.json is refused: {_first_line(error)}", where=str(folder)) from error


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
        raise ModelError(f"could not be loaded: {_first_line(error)}", where=str(folder)) from error
    missing = sorted(loaded["missing_keys"])
    if missing:  # transformers would fill them with random numbers
        raise ModelError(
            f"{len(missing)} of its weights are not in the files: {missing[0]}, …", where=str(folder)
        )
    model.requires_grad_(False)
    return model.to(device).eval()


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


def write_gguf_tokenizer(gguf_path: Path, folder: Path) -> None:
    """Writes the tokenizer inside a .gguf file into `folder`, with its chat template.

    transformers gives every BPE tokenizer the same splitting of text before merging; the file names its own
    (`tokenizer.ggml.pre`), and that one is written.
    """
    quiet_libraries()
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    from myna.model.families import PRE_TOKENIZERS, pre_tokenizer_json

    with _reading_gguf(gguf_path):
        tokenizer = AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
        tokenizer.save_pretrained(folder)
        field = GGUFReader(gguf_path).get_field("tokenizer.ggml.pre")
    pre = str(field.contents()) if field else ""
    if pre not in PRE_TOKENIZERS:
        return
    path = folder / "tokenizer.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["pre_tokenizer"] = pre_tokenizer_json(pre)
    settings["model"]["ignore_merges"] = PRE_TOKENIZERS[pre].ignores_merges
    path.write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")


@contextlib.contextmanager
def _reading_gguf(path: Path) -> Iterator[None]:
    """Quiet, and with whatever a broken file makes the readers raise told as a ModelError."""
    try:
        with warnings.catch_warnings(), _no_progress():
            warnings.simplefilter("ignore")
            yield
    except (ValueError, KeyError, OSError, RuntimeError, IndexError, struct.error) as error:
        raise ModelError(f"cannot be read: {_first_line(error)}", where=str(path)) from error


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


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
