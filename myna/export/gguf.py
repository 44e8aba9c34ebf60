"""write_gguf: a merged model (HF layout) as the one file that llama.cpp runs.

Keys and tensor layout are those of llama.cpp's converter (`conversion/base.py`, `conversion/llama.py`).
Tensors are read, turned and written one by one, so memory holds one tensor and not a model.

    R rows · C columns · H heads · D values a head
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from myna.errors import ModelError
from myna.export.encoder import Floats
from myna.export.gguf_file import new_writer, write_tensors
from myna.export.model_keys import add_model_keys, check_config, head_dim, llama3_factors, read_rope
from myna.export.quantize import TensorInfo, choose_types, quant_type, tensor_bytes
from myna.export.vocabulary import add_vocabulary, read_vocabulary
from myna.export.weights import Weights, open_weights
from myna.model.families import IGNORED, TOP, Family, family_of, gguf_name
from myna.run import file_sha256, read_json, require_room

_ROPE_FREQS = "rope_freqs.weight"


@dataclass(frozen=True)
class GgufSummary:
    """What was written. `types`: how many tensors of each ggml type, for a Q4_K_M is seldom all Q4_K."""

    path: Path
    bytes: int
    sha256: str
    types: dict[str, int]
    num_tensors: int


def write_gguf(
    model_dir: Path,
    tokenizer_dir: Path,
    gguf_path: Path,
    file_type: str,
    *,
    name: str,
    weights: Weights | None = None,
    importance: Mapping[str, Floats] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> GgufSummary:
    """Writes `model_dir` (config.json, safetensors in fp32, bf16 or fp16) with its tokenizer as `gguf_path`.

    `name` is what chat programs show; `weights` stand in for the folder's own (base + adapter, say); `importance`
    has a weight for each column [C] of a tensor, by GGUF's name; `progress` is given bytes done and bytes in all.
    The file appears under its name when it is whole. UsageError: an unknown file type. ModelError: a family, rope,
    tokenizer or weight that llama.cpp would not run alike. MachineError: no room, no encoder.
    """
    quant_type(file_type)
    config = read_json(model_dir / "config.json")
    where = str(model_dir / "config.json")
    family = family_of(config, where)
    check_config(config, where)
    rope = read_rope(config, family, where)
    vocabulary = read_vocabulary(tokenizer_dir, config)
    with contextlib.ExitStack() as stack:
        source = weights or stack.enter_context(open_weights(model_dir))
        names = _plan(source.shapes, family, config, model_dir)
        shapes = {tensor: source.shapes[theirs] for tensor, theirs in names.items()}
        if shapes["token_embd.weight"][0] != config["vocab_size"]:
            raise ModelError("vocab_size is not the number of embeddings", where=where)
        if rope.kind == "llama3":
            shapes[_ROPE_FREQS] = (head_dim(config) // 2,)
        infos = [TensorInfo(tensor, shape) for tensor, shape in shapes.items()]
        types = choose_types(infos, file_type, family.architecture)
        num_bytes = sum(tensor_bytes(info, types[info.name]) for info in infos)
        require_room(gguf_path, num_bytes + _overhead(tokenizer_dir), f"the {file_type} file")

        def tensor_rows(tensor: str) -> Floats:
            if tensor == _ROPE_FREQS:
                return llama3_factors(rope, head_dim(config))[None]
            return turned(family, config, tensor, source.rows(names[tensor]))

        with new_writer(gguf_path, family.architecture) as writer:
            add_model_keys(writer, config, rope, name, sum(int(np.prod(info.shape)) for info in infos))
            writer.add_file_type(quant_type(file_type).number)
            add_vocabulary(writer, vocabulary)
            write_tensors(writer, infos, types, tensor_rows, importance=importance, progress=progress)
    counts = {kind: list(types.values()).count(kind) for kind in sorted(set(types.values()))}
    return GgufSummary(gguf_path, gguf_path.stat().st_size, file_sha256(gguf_path), counts, len(infos))


def turned(family: Family, config: Mapping[str, Any], tensor: str, rows_RC: Floats) -> Floats:
    """The rows of a tensor (GGUF's name) in the order that llama.cpp wants them; `lora_B` [R, r] turns alike."""
    return _permuted(rows_RC, _num_heads(config, tensor)) if family.permuted else rows_RC


def _plan(
    shapes: Mapping[str, tuple[int, ...]], family: Family, config: Mapping[str, Any], model_dir: Path
) -> dict[str, str]:
    """GGUF name → transformers' name, in the order of the file; ModelError for tensors missing or unknown."""
    tied = config.get("tie_word_embeddings", "lm_head.weight" not in shapes)
    layers = [f"model.layers.{layer}." for layer in range(int(config["num_hidden_layers"]))]
    first, *last = [name for name in TOP if not (tied and name == "lm_head.weight")]
    wanted = [first, *(layer + tensor for layer in layers for tensor in family.tensors), *last]
    optional = [layer + tensor for layer in layers for tensor in family.optional]
    known = {*wanted, *optional, *TOP}
    missing = [name for name in wanted if name not in shapes]
    unknown = [name for name in shapes if name not in known and not IGNORED.search(name)]
    if missing or unknown:
        lacks = f"lacks {', '.join(missing[:3])}" if missing else ""
        extra = (
            f"has {', '.join(unknown[:3])}, which {family.architecture} has no place for" if unknown else ""
        )
        raise ModelError(f"the model {' and '.join(filter(None, (lacks, extra)))}", where=str(model_dir))
    names = [*wanted, *(name for name in optional if name in shapes)]
    return {gguf_name(family, name) or name: name for name in names}


def _num_heads(config: Mapping[str, Any], tensor: str) -> int | None:
    """The heads whose rows a `permuted` family wants turned: those of q and of k."""
    if ".attn_q." in tensor:
        return int(config["num_attention_heads"])
    if ".attn_k." in tensor:
        return int(config.get("num_key_value_heads") or config["num_attention_heads"])
    return None


def _permuted(rows_RC: Floats, num_heads: int | None) -> Floats:
    """Each head's rows from halves (x0, x1…, y0, y1…) to neighbours (x0, y0, x1, y1…); a bias alike."""
    if num_heads is None:
        return rows_RC
    shape = rows_RC.shape
    halves = rows_RC.reshape(num_heads, 2, -1, shape[1] if shape[0] > 1 else 1)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(shape)


def _overhead(tokenizer_dir: Path) -> int:
    """Bytes for all that is no tensor: in GGUF the tokenizer takes about the room of its JSON."""
    return (tokenizer_dir / "tokenizer.json").stat().st_size + (1 << 20)
