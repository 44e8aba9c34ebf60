"""The tensors of a .gguf file, decoded one at a time. Its vocabulary, most of a header, is stepped over.

R rows · C columns
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from myna.model.headers import GgufHeader, read_gguf_header

ROWS_AT_ONCE = 1 << 20  # values that are decoded together where not all are wanted at once


@dataclass(frozen=True)
class GgufTensors:
    """A file whose header was checked."""

    path: Path
    header: GgufHeader

    @property
    def values(self) -> Mapping[str, Any]:
        """Keys of the header: scalars and short strings; of an array its length."""
        return self.header.values

    def blocks(self, name: str) -> npt.NDArray[np.uint8]:
        """[R, bytes of a row] as they stand in the file; outer dimensions are one. KeyError for no such tensor."""
        entry = self.header.tensors[name]
        num_rows = int(np.prod(entry.shape[1:]))
        start, shape = self.header.data_start + entry.begin, (num_rows, (entry.end - entry.begin) // num_rows)
        return np.memmap(self.path, np.uint8, "r", offset=start, shape=shape)

    def decode(self, name: str, blocks: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Rows of a tensor as float32 [R, C], by the `gguf` package. ValueError for a type that it does not decode."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        kind = GGMLQuantizationType[self.header.tensors[name].dtype]
        return np.asarray(dequantize(np.ascontiguousarray(blocks), kind), dtype=np.float32)

    def rows(self, name: str) -> npt.NDArray[np.float32]:
        """A whole tensor as float32 [R, C]; a vector is one row."""
        return self.decode(name, self.blocks(name))


def open_gguf(path: Path) -> GgufTensors:
    """Reads and checks the header; ModelError for one that is not sound."""
    return GgufTensors(path, read_gguf_header(path))
