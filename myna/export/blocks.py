"""The weights gate: what a file's tensors decode to, against what they were made from, block by block.

The decoder is the `gguf` package's, written in numpy, and not the encoder's library: what both get wrong alike is what
nobody can see. Divergence over tokens (`export/parity.py`) cannot see one wrong block among millions; this can.

    R rows · C columns · B blocks of 256 values (of a whole row where it has fewer)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from myna.export.encoder import Floats
from myna.model.gguf_tensors import ROWS_AT_ONCE, GgufTensors, open_gguf

BLOCK = 256


@dataclass(frozen=True)
class BlockBound:
    """How far a block may be: root mean square of the error ≤ `relative` · its largest value + `slack`.

    `slack` is what is lost where a block's scale, a half, is so small that it has few bits left.
    """

    relative: float
    slack: float


# About twice the worst block of SmolLM2's weights and of normal, t-distributed, uniform, sparse and outlier-ridden ones.
BLOCK_BOUNDS: Mapping[str, BlockBound] = {
    "F32": BlockBound(0.0, 0.0),
    "F16": BlockBound(2**-11, 3e-8),
    "BF16": BlockBound(2**-8, 0.0),
    "Q8_0": BlockBound(0.006, 4e-6),
    "Q6_K": BlockBound(0.016, 1.3e-4),
    "Q5_K": BlockBound(0.03, 1.3e-4),
    "Q5_1": BlockBound(0.04, 1e-6),
    "Q5_0": BlockBound(0.04, 1e-6),
    "Q4_K": BlockBound(0.06, 1e-4),
    "Q4_1": BlockBound(0.07, 1e-6),
    "Q4_0": BlockBound(0.08, 1e-6),
    "IQ4_NL": BlockBound(0.08, 1e-5),
    "IQ4_XS": BlockBound(0.08, 2e-4),
    "Q3_K": BlockBound(0.14, 1e-4),
    "Q2_K": BlockBound(0.27, 1e-4),
}
# With importance the encoder spends its precision on some columns, at the cost of others: the worst block of SmolLM2,
# whose ffn_down has a few inputs a hundred times larger than the rest, is 2.8 times beyond the plain bound.
IMPORTANCE_FACTOR = 8.0


@dataclass(frozen=True)
class BlockParity:
    """All blocks of a file. `worst` is the largest error as a share of what its type may have: at most 1 passes."""

    num_blocks: int
    worst: float
    worst_tensor: str

    @property
    def passes(self) -> bool:
        return self.worst <= 1.0

    def sentence(self) -> str:
        if not self.num_blocks:
            return f"{self.worst_tensor} is not in the file as it is in the model"
        if self.passes:
            where = f"the worst, in {self.worst_tensor}, at" if self.worst else "all at"
            return f"{self.num_blocks:,} blocks decode to their source, {where} {self.worst:.2f} of the bound"
        return f"a block of {self.worst_tensor} is not its source: {self.worst:.1f} times the error its type may have"


def compare_blocks(
    gguf_path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    source_rows: Callable[[str], Floats],
    *,
    with_importance: bool = False,
) -> BlockParity:
    """Decodes a file tensor by tensor; `source_rows` gives the [R, C] float32 rows that a tensor was made from.

    `shapes`: every tensor that should be there, rows last. llama.cpp itself does without some (biases, rope factors).
    """
    factor = IMPORTANCE_FACTOR if with_importance else 1.0
    file = open_gguf(gguf_path)
    there = {name: tuple(reversed(entry.shape)) for name, entry in file.header.tensors.items()}
    for name in sorted(there.keys() | shapes.keys()):
        if _bare(there.get(name)) != _bare(shapes.get(name)):
            return BlockParity(0, math.inf, name)
    num_blocks, worst, worst_tensor = 0, 0.0, ""
    for name in there:
        for count, share in _tensor_shares(file, name, source_rows(name), factor):
            num_blocks += count
            if share > worst:
                worst, worst_tensor = share, name
    return BlockParity(num_blocks, worst, worst_tensor)


def _tensor_shares(
    file: GgufTensors, name: str, source_RC: Floats, factor: float
) -> Iterator[tuple[int, float]]:
    """(blocks, the largest error over its bound) for a few rows at a time, so that memory stays small."""
    bound, blocks = BLOCK_BOUNDS[file.header.tensors[name].dtype], file.blocks(name)
    step = max(1, ROWS_AT_ONCE // source_RC.shape[1])
    for start in range(0, len(source_RC), step):
        source = source_RC[start : start + step]
        error_B, largest_B = block_errors(source, file.decode(name, blocks[start : start + step]))
        allowed_B = factor * (bound.relative * largest_B + bound.slack)
        # where nothing may differ, nothing does: 0 / 0 is no error
        share_B = np.where(error_B == 0, 0.0, error_B / np.maximum(allowed_B, 1e-30))
        share_B = np.where(np.isfinite(share_B), share_B, np.inf)
        yield len(error_B), float(share_B.max(initial=0.0))


def _bare(shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """A shape without outer dimensions of one, which GGUF drops."""
    while shape and len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


def block_errors(
    source_RC: Floats, decoded_RC: Floats
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """(root mean square error [B], largest absolute source value [B]) of each block of 256 values along the rows."""
    num_columns = source_RC.shape[1]
    starts = np.arange(0, num_columns, BLOCK)
    lengths = np.diff(np.append(starts, num_columns))
    square = np.add.reduceat((source_RC - decoded_RC) ** 2, starts, axis=1) / lengths
    largest = np.maximum.reduceat(np.abs(source_RC), starts, axis=1)
    return np.sqrt(square).reshape(-1).astype(np.float32), largest.reshape(-1)
