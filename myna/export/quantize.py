"""Which ggml type each tensor gets: llama.cpp's own mixtures (`src/llama-quant.cpp`, without importance
matrix).

So a file named Q4_K_M holds the types that a file of that name from upstream holds. A mixture gives more
bits to what is hurt most: the head, and attn_v and ffn_down of the first and last blocks and of every third
between. Rows that a K-quant's blocks of 256 do not divide get the next larger type with blocks of 32.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from myna.errors import ModelError, UsageError
from myna.export.encoder import GGML_TYPES, row_bytes


@dataclass(frozen=True)
class TensorInfo:
    """A tensor by GGUF's name; `shape` as numpy has it, rows last (the reverse of what GGUF tools print)."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class QuantType:
    """A file type: its `general.file_type` (llama.h, `llama_ftype`) and the type most of its tensors get."""

    number: int
    main: str


QUANT_TYPES: dict[str, QuantType] = {
    "F32": QuantType(0, "F32"),
    "F16": QuantType(1, "F16"),
    "BF16": QuantType(32, "BF16"),
    "Q8_0": QuantType(7, "Q8_0"),
    "Q6_K": QuantType(18, "Q6_K"),
    "Q5_K_M": QuantType(17, "Q5_K"),
    "Q5_K_S": QuantType(16, "Q5_K"),
    "Q4_K_M": QuantType(15, "Q4_K"),
    "Q4_K_S": QuantType(14, "Q4_K"),
    "Q4_0": QuantType(2, "Q4_0"),
}

# Where 256 does not divide a row: the type to take instead.
_FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


def quant_type(name: str) -> QuantType:
    """A line of QUANT_TYPES; UsageError naming them all for an unknown one."""
    if name not in QUANT_TYPES:
        raise UsageError(
            f"{name!r} is no GGUF type that Myna writes", help=f"one of: {', '.join(QUANT_TYPES)}"
        )
    return QUANT_TYPES[name]


def choose_types(tensors: Sequence[TensorInfo], file_type: str, architecture: str) -> dict[str, str]:
    """The ggml type of each tensor in a file of `file_type`, by name, in the order given.

    UsageError for an unknown file type; ModelError for a row that no type of this mixture can hold.
    """
    main = quant_type(file_type).main
    tied = all(tensor.name != "output.weight" for tensor in tensors)
    num_values = sum("attn_v.weight" in tensor.name for tensor in tensors)
    num_layers = 1 + max((_layer(tensor.name) for tensor in tensors), default=-1)
    large = _shares_values_widely(tensors, architecture, num_layers)
    chosen = {}
    values_seen = downs_seen = 0
    # Upstream walks its tensors by layer and then by name, and counts as it goes.
    for tensor in sorted(tensors, key=lambda tensor: (_layer(tensor.name), tensor.name)):
        if not _is_quantized(tensor):
            chosen[tensor.name] = "F32"
        elif main in ("F32", "F16", "BF16"):
            chosen[tensor.name] = main
        else:
            wanted = main
            if tensor.name == "output.weight" or (tied and tensor.name == "token_embd.weight"):
                wanted = _head_type(tensor, main)
            elif "attn_v.weight" in tensor.name:
                wanted = _value_type(file_type, values_seen, num_values, large)
                values_seen += 1
            elif "ffn_down" in tensor.name:
                wanted = _down_type(file_type, downs_seen, num_layers)
                downs_seen += 1
            chosen[tensor.name] = _that_divides(tensor, wanted)
    return {tensor.name: chosen[tensor.name] for tensor in tensors}


def tensor_bytes(tensor: TensorInfo, ggml_type: str) -> int:
    """Bytes of a tensor's blocks in the file, without the padding between tensors."""
    num_rows = 1
    for length in tensor.shape[:-1]:
        num_rows *= length
    return num_rows * row_bytes(tensor.shape[-1], ggml_type)


def _layer(name: str) -> int:
    """The block a tensor belongs to, -1 outside of them."""
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _is_quantized(tensor: TensorInfo) -> bool:
    """Matrices are, norms and biases are not. ggml drops outer dimensions of one: such a row is no matrix."""
    matrix = len(tensor.shape) >= 2 and any(length > 1 for length in tensor.shape[:-1])
    return matrix and tensor.name.endswith("weight") and "_norm.weight" not in tensor.name


def _head_type(tensor: TensorInfo, main: str) -> str:
    """The head is worth six bits at least; with tied embeddings they are the head."""
    if main == "Q8_0" or tensor.shape[-1] % GGML_TYPES[main].block_size:
        return "Q8_0"
    return "Q6_K"


def _value_type(file_type: str, index: int, count: int, large: bool) -> str:
    main = QUANT_TYPES[file_type].main
    if file_type in ("Q4_K_M", "Q5_K_M") and _gets_more_bits(index, count):
        return "Q6_K"
    if (file_type == "Q4_K_S" and index < 4) or (large and main == "Q4_K"):
        return "Q5_K"
    return main


def _down_type(file_type: str, index: int, count: int) -> str:
    if file_type in ("Q4_K_M", "Q5_K_M") and _gets_more_bits(index, count):
        return "Q6_K"
    if file_type == "Q4_K_S" and index < count // 8:
        return "Q5_K"
    return QUANT_TYPES[file_type].main


def _gets_more_bits(index: int, count: int) -> bool:
    """The first and the last eighth of the blocks, and every third between."""
    first = count // 8
    return index < first or index >= 7 * count // 8 or (index - first) % 3 == 2


def _shares_values_widely(tensors: Sequence[TensorInfo], architecture: str, num_layers: int) -> bool:
    """Upstream's 70B rule: of 80 layers, where many heads share one attn_v, that is small and worth more
    bits."""
    if num_layers != 80:
        return False
    if architecture == "llama":
        rows = {tensor.name: tensor.shape[0] for tensor in tensors}
        return rows.get("blk.0.attn_q.weight") != rows.get("blk.0.attn_k.weight")
    return architecture == "qwen2"


def _that_divides(tensor: TensorInfo, wanted: str) -> str:
    """`wanted`, or what upstream takes where its blocks do not divide the rows."""
    num_columns = tensor.shape[-1]
    if num_columns % GGML_TYPES[wanted].block_size == 0:
        return wanted
    if wanted not in _FALLBACK:
        raise ModelError(
            f"{tensor.name}: rows of {num_columns} values do not divide into {wanted} blocks of 32",
            help="export F16 or BF16 instead, which take any width",
        )
    instead = _FALLBACK[wanted]
    return instead if num_columns % GGML_TYPES[instead].block_size == 0 else "F16"
