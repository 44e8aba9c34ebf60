"""Writes safetensors files tensor by tensor: the library's own writer wants all tensors of a file in memory.

The format (https://huggingface.co/docs/safetensors): eight bytes with the header's length, little-endian; the header,
JSON padded with spaces; the tensors one after the other, where the header says.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from myna.export.weights import INDEX, SINGLE, Weights

SHARD_BYTES = 5_000_000_000  # a file of at most so many, or of one tensor: what the hub is used to
_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def write_folder(
    folder: Path,
    weights: Weights,
    names: Sequence[str],
    dtype: torch.dtype,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes the tensors `names` as `dtype` into model.safetensors, or shards and their index where that is too large.

    One tensor is in memory at a time. The bytes are those of safetensors' `save_file(…, metadata={"format": "pt"})`.
    """
    sizes = {name: math.prod(weights.shapes[name]) * dtype.itemsize for name in sorted(names)}
    shards = list(_split(sizes, shard_bytes))
    if len(shards) == 1:
        _write_file(folder / SINGLE, weights, shards[0], dtype)
        return
    placed: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / file, weights, shard, dtype)
        placed |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": placed}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _split(sizes: Mapping[str, int], shard_bytes: int) -> Iterator[list[str]]:
    """Names in their order, cut before each file would grow beyond `shard_bytes`."""
    shard: list[str] = []
    for name, size in sizes.items():
        if shard and sum(sizes[n] for n in shard) + size > shard_bytes:
            yield shard
            shard = []
        shard.append(name)
    yield shard


def _write_file(path: Path, weights: Weights, names: Sequence[str], dtype: torch.dtype) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in names:
        end = start + math.prod(weights.shapes[name]) * dtype.itemsize
        header[name] = {
            "dtype": _CODES[dtype],
            "shape": list(weights.shapes[name]),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = torch.from_numpy(weights.rows(name)).to(dtype)
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
