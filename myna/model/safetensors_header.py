"""The header of a .safetensors file, read and checked before any library opens the file: nothing in it is believed.

    length (8 bytes) │ JSON: name → dtype, shape, data_offsets │ data

Format and limits: huggingface/safetensors, safetensors/src/tensor.rs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from myna.model.plain_files import MAX_JSON, TRUNCATED_CURE, parse_json, refuse, require_plain_file, shown

MAX_DIMENSIONS = 8
MAX_ELEMENTS = 1 << 50  # of one tensor: far beyond any file, and products stay small numbers


@dataclass(frozen=True)
class TensorEntry:
    """A tensor as a header tells it: its type, its shape (as the file orders it) and its bytes [begin, end) in the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def num_elements(path: Path, name: str, shape: tuple[int, ...] | list[int]) -> int:
    """The product of a shape. ModelError where it is absurd."""
    elements = 1
    for dimension in shape:
        elements *= dimension
        if elements > MAX_ELEMENTS:
            refuse(path, f"tensor {shown(name)} has the absurd shape {list(shape)}")
    return elements


def refuse_overlaps(path: Path, tensors: Mapping[str, TensorEntry], data_bytes: int) -> None:
    """Every tensor lies inside the data and no two share bytes."""
    before = ("", 0)
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.end > data_bytes:
            refuse(
                path,
                f"is cut short: tensor {shown(name)} ends at byte {tensor.end} of its data, the file has {data_bytes}",
                TRUNCATED_CURE,
            )
        if tensor.begin < before[1]:
            refuse(path, f"tensors {shown(before[0])} and {shown(name)} overlap")
        before = (name, tensor.end)


BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


def read_safetensors_header(path: Path) -> dict[str, TensorEntry]:
    """What the tensors of a .safetensors file are, by name. ModelError for a header that is not wholly sound."""
    size = require_plain_file(path)
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            what = (
                f"its header would have {length:,} bytes, the file has {size:,}"
                if len(start) == 8
                else "it is empty"
            )
            refuse(path, f"is no whole safetensors file: {what}", TRUNCATED_CURE)
        if length > MAX_JSON:
            refuse(path, f"its header has {length:,} bytes; at most {MAX_JSON:,} are read")
        header = parse_json(path, file.read(length), "its header", unique=True)
    data_bytes = size - 8 - length
    header.pop("__metadata__", None)
    tensors = {name: _safetensors_entry(path, name, entry) for name, entry in header.items()}
    refuse_overlaps(path, tensors, data_bytes)
    held = sum(tensor.end - tensor.begin for tensor in tensors.values())
    if held != data_bytes:  # nothing overlaps, so every byte is some tensor's or nobody's
        refuse(path, f"{data_bytes - held:,} bytes of its data belong to no tensor", TRUNCATED_CURE)
    return tensors


def _safetensors_entry(path: Path, name: str, entry: Any) -> TensorEntry:
    if not isinstance(entry, dict):
        refuse(path, f"tensor {shown(name)} is described by {type(entry).__name__}, not by an object")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in BITS:
        refuse(path, f"tensor {shown(name)} has the unknown dtype {shown(str(dtype))}")
    if not _are_counts(shape) or len(shape) > MAX_DIMENSIONS:
        refuse(path, f"tensor {shown(name)} has no possible shape: {shown(str(shape))}")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        refuse(path, f"tensor {shown(name)} has no possible data_offsets: {shown(str(offsets))}")
    elements = num_elements(path, name, shape)
    if elements * BITS[dtype] != 8 * (offsets[1] - offsets[0]):
        refuse(
            path,
            f"tensor {shown(name)}: {dtype} of shape {shape} does not fill its {offsets[1] - offsets[0]:,} bytes",
        )
    return TensorEntry(dtype, tuple(shape), offsets[0], offsets[1])


def _are_counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 1 << 63 for number in value)
