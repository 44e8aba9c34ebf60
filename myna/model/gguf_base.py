"""A .gguf file as a base model: its weights and its tokenizer, through transformers, as a Hugging Face folder."""

from __future__ import annotations

import contextlib
import functools
import json
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from myna.errors import ModelError
from myna.model.load import first_line, quiet_libraries
from myna.model.pre_tokenizers import PRE_TOKENIZERS, pre_tokenizer_json


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
