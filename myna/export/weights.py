"""Weights: a model's tensors by transformers' names, read one at a time, so that no model need fit into memory.

R rows · C columns · r rank
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from myna.errors import ModelError
from myna.export.encoder import Floats
from myna.export.lora_file import LoraFile, read_lora
from myna.run import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Weights(Protocol):
    """What `write_gguf` reads from. `shapes`: every tensor by name; `rows`: one of them, float32."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def rows(self, name: str) -> Floats:
        """[R, C] float32, contiguous; a vector is one row, outer dimensions are one."""
        ...


@dataclass(frozen=True)
class FolderWeights:
    """The safetensors files of a Hugging Face folder. `paths`: the file that each tensor lies in."""

    folder: Path
    shapes: Mapping[str, tuple[int, ...]]
    paths: Mapping[str, Path]

    def rows(self, name: str) -> Floats:
        import torch
        from safetensors import safe_open

        # Opened for this one tensor: while a file is open, every page that was read counts as this process's memory.
        with safe_open(self.paths[name], framework="pt") as handle:
            tensor = handle.get_tensor(name)
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ModelError(
                f"{name} is {tensor.dtype}; float32, bfloat16 and float16 can be written",
                where=str(self.folder),
            )
        rows: Floats = tensor.reshape(-1, tensor.shape[-1]).to(torch.float32).contiguous().numpy()
        return rows


@contextlib.contextmanager
def open_weights(folder: Path) -> Iterator[FolderWeights]:
    """The tensors of a folder, one file or shards, as transformers chooses between them.

    ModelError: a file that is missing or cannot be read, an index that names a tensor its file lacks or a file
    outside the folder, a tensor in two files.
    """
    placed: Mapping[str, str] = {}
    if not (folder / SINGLE).is_file() and (folder / INDEX).is_file():
        placed = _read_index(folder / INDEX)
    shapes: dict[str, tuple[int, ...]] = {}
    paths: dict[str, Path] = {}
    for path in [folder / name for name in sorted(set(placed.values()))] or [folder / SINGLE]:
        for name, shape in _read_shapes(path).items():
            if name in paths:
                raise ModelError(
                    f"{name} lies in two files: {paths[name].name} and {path.name}", where=str(folder)
                )
            shapes[name], paths[name] = shape, path
    lost = [name for name, file in placed.items() if paths.get(name) != folder / file]
    if lost:
        raise ModelError(
            f"the index says that {lost[0]} lies in {placed[lost[0]]}, where it is not",
            where=str(folder / INDEX),
        )
    yield FolderWeights(folder, shapes, paths)


def _read_index(path: Path) -> Mapping[str, str]:
    placed = read_json(path).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise ModelError("has no weight_map", where=str(path))
    for file in placed.values():
        if not isinstance(file, str) or file != Path(file).name:
            raise ModelError(f"names {file!r}, which is no file of this folder", where=str(path))
    return placed


def _read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as handle:
            return {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise ModelError(
            "there is no such file", where=str(path), help="fetch the model again: a part of it is missing"
        ) from None
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot be read: {error}", where=str(path)) from error


@dataclass(frozen=True)
class AdaptedWeights:
    """Base + adapter, summed tensor by tensor as it is asked for: W + scale · B @ A in float32."""

    base: Weights
    lora: LoraFile

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.base.shapes

    def rows(self, name: str) -> Floats:
        import numpy as np

        base_RC = self.base.rows(name)
        if name not in self.lora.pairs:
            return base_RC
        sum_RC = self.lora.delta(name)
        sum_RC += base_RC
        if not np.isfinite(sum_RC).all():
            raise ModelError(f"{name}: base + adapter is not finite", where=str(self.lora.path))
        return sum_RC


@contextlib.contextmanager
def open_adapted(base_dir: Path, adapter_dir: Path) -> Iterator[AdaptedWeights]:
    """The base's tensors with a plain LoRA or rsLoRA adapter added, with no merged copy in memory or on disk.

    Bit for bit what peft's `merge_and_unload` makes of the base in float32. ModelError: an adapter that is not
    plain (`lora_file.not_plain`) or not of this base.
    """
    with open_weights(base_dir) as base:
        lora = read_lora(adapter_dir)
        lora.require_fits(base.shapes, base_dir)
        yield AdaptedWeights(base, lora)
