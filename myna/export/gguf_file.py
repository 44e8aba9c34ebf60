"""A .gguf file as it is written: a header, then tensors one by one. It appears under its name when it is whole."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from myna.errors import MachineError, ModelError
from myna.export.encoder import Floats, encode
from myna.export.quantize import TensorInfo, tensor_bytes
from myna.run import sync_dir, sync_file


@contextlib.contextmanager
def new_writer(path: Path, architecture: str) -> Iterator[Any]:
    """A GGUFWriter on a file beside `path`, which takes the name when all went well and is gone otherwise."""
    from gguf import GGUFWriter

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    writer = GGUFWriter(temporary, architecture)
    try:
        yield writer
        writer.close()
        sync_file(temporary)
        os.replace(temporary, path)
        sync_dir(path.parent)
    except OSError as error:
        raise MachineError(
            f"could not be written: {error}", where=str(path), help="look at the free room"
        ) from error
    finally:
        writer.close()
        temporary.unlink(missing_ok=True)


def write_tensors(
    writer: Any,
    infos: list[TensorInfo],
    types: Mapping[str, str],
    tensor_rows: Callable[[str], Floats],
    *,
    importance: Mapping[str, Floats] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """The header, then tensor by tensor as `tensor_rows` gives them.

    `importance`: [C] weights of a tensor's columns by GGUF's name, for the types that use them.
    """
    from gguf import GGMLQuantizationType

    sizes = {info.name: tensor_bytes(info, types[info.name]) for info in infos}
    for info in infos:
        kind = GGMLQuantizationType[types[info.name]]
        writer.add_tensor_info(info.name, info.shape, np.dtype(np.float32), sizes[info.name], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    done, total = 0, sum(sizes.values())
    for info in infos:
        try:
            weights_C = (importance or {}).get(info.name)
            blocks = encode(tensor_rows(info.name), types[info.name], weights_C)
        except ModelError as error:
            raise ModelError(f"{info.name}: {error.message}", where=error.where, help=error.help) from error
        writer.write_tensor_data(blocks)
        done += sizes[info.name]
        if progress is not None:
            progress(done, total)
