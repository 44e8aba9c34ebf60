"""Weights: a model's tensors by transformers' names, read one at a time, so that no model need fit into memory.

R rows · C columns
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from myna.errors import ModelError
from myna.export.encoder import Floats
from myna.run import read_json


class Weights(Protocol):
    """What `write_gguf` reads from. `shapes`: every tensor by name; `rows`: one of them, float32."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def rows(self, name: str) -> Floats:
        """[R, C] float32, contiguous; a vector is one row, outer dimensions are one."""
        ...


@dataclass(frozen=True)
class FolderWeights:
    """The safetensors files of a Hugging Face folder, open."""

    folder: Path
    shapes: Mapping[str, tuple[int, ...]]
    handles: Mapping[str, Any]

    def rows(self, name: str) -> Floats:
        import torch

        tensor = self.handles[name].get_tensor(name)
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ModelError(
                f"{name} is {tensor.dtype}; float32, bfloat16 and float16 can be written",
                where=str(self.folder),
            )
        rows: Floats = tensor.reshape(-1, tensor.shape[-1]).to(torch.float32).contiguous().numpy()
        return rows


@contextlib.contextmanager
def open_weights(folder: Path) -> Iterator[FolderWeights]:
    """The tensors of a folder, one file or shards; ModelError for a file that cannot be read."""
    from safetensors import SafetensorError, safe_open

    index_path = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index_path.is_file():
        names = sorted(set(read_json(index_path)["weight_map"].values()))
    with contextlib.ExitStack() as stack:
        handles: dict[str, Any] = {}
        for name in names:
            try:
                handle = stack.enter_context(safe_open(folder / name, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise ModelError(f"cannot be read: {error}", where=str(folder / name)) from error
            handles.update(dict.fromkeys(handle.keys(), handle))
        shapes = {name: tuple(handle.get_slice(name).get_shape()) for name, handle in handles.items()}
        yield FolderWeights(folder, shapes, handles)
