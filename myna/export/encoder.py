"""Quantized blocks by llama.cpp's own encoder, reached through ctypes in a library that `encoder_library` finds.

So there is no compiler and no second implementation (`gguf` only decodes K-quants). The C function trusts
its caller: rows that do not divide into blocks come back as garbage without an error, and a type it does
not know ends the process. So everything is checked here before the call, and the result after it.

    R rows · C columns (a row is what is cut into blocks)
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from myna.errors import MachineError, ModelError
from myna.export.encoder_library import Found, find_library

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class BlockType:
    """A ggml type: its number, how many values share a block, and the bytes of that block.

    `digests`: how the sha-256 of the probe's bytes begins, without importance and with it; none where numpy does the
    work, the same twice where the type does not use it.
    """

    number: int
    block_size: int
    block_bytes: int
    digests: tuple[str, str] | None = None

    @property
    def weighs(self) -> bool:
        """Whether the encoder uses importance."""
        return self.digests is not None and self.digests[0] != self.digests[1]


# Block scales are halves too; a larger value becomes infinity there, or a block of zeros.
_LARGEST_HALF = 65504

# Numbers and sizes are ggml.h's and ggml-common.h's; they never change, files depend on them.
GGML_TYPES: dict[str, BlockType] = {
    "F32": BlockType(0, 1, 4),
    "F16": BlockType(1, 1, 2),
    "BF16": BlockType(30, 1, 2),
    "Q4_0": BlockType(2, 32, 18, ("c0fd8de5a3cbe8fd", "631bf2f558ad5bb3")),
    "Q4_1": BlockType(3, 32, 20, ("efa9f9b6ad08ebec", "a5c465392d312d87")),
    "Q5_0": BlockType(6, 32, 22, ("1cc50c6ff90bf746", "3708a8750764eea5")),
    "Q5_1": BlockType(7, 32, 24, ("a342173fb8ae01fb", "dbe0112f140da0d3")),
    "Q8_0": BlockType(8, 32, 34, ("2713fc7d68e8cfbf", "2713fc7d68e8cfbf")),
    "Q2_K": BlockType(10, 256, 84, ("931f91aac9b893a1", "f10d8bb9199b6676")),
    "Q3_K": BlockType(11, 256, 110, ("5159e7557c9b8ea2", "541cb5bfff82ba36")),
    "Q4_K": BlockType(12, 256, 144, ("cb484d8a817b2fd0", "99b99761b93d7973")),
    "Q5_K": BlockType(13, 256, 176, ("4fdda79acc709a7f", "0ab65f64dc9459e8")),
    "Q6_K": BlockType(14, 256, 210, ("294a26cbdf22a585", "61438f7b342ee87c")),
    "IQ4_NL": BlockType(20, 32, 18, ("269bb2a346cc32ba", "1417411ea12270cc")),
    "IQ4_XS": BlockType(23, 256, 136, ("51f310c8dba367af", "35d3b8a8d26e3ec3")),
}


def row_bytes(num_columns: int, ggml_type: str) -> int:
    """Bytes of one row of `num_columns` values; ModelError where the type's blocks do not divide it."""
    kind = GGML_TYPES[ggml_type]
    if num_columns % kind.block_size:
        raise ModelError(
            f"rows of {num_columns} values do not divide into {ggml_type} blocks of {kind.block_size}",
            help="export as F16, which takes any width",
        )
    return num_columns // kind.block_size * kind.block_bytes


def encode(rows_RC: Floats, ggml_type: str, importance_C: Floats | None = None) -> Bytes:
    """`rows_RC` [R, C] float32 as [R, `row_bytes`] uint8, as it stands in a GGUF file.

    `importance_C` [C] weighs the squared error of each column (`importance.py` measures it); types that do not use it
    (F32, F16, BF16, Q8_0) leave it alone.

    ModelError: C does not divide into blocks, the rows are not contiguous float32, a value is not finite or
    is beyond what the type can hold, or the importance is not C finite numbers from 0. MachineError: no library that
    has the function and passes the self-test.
    """
    if rows_RC.ndim != 2 or rows_RC.dtype != np.float32 or not rows_RC.flags.c_contiguous:
        raise ModelError("the encoder takes contiguous float32 rows [R, C]")
    num_bytes = row_bytes(rows_RC.shape[1], ggml_type)
    if importance_C is not None:
        importance_C = _checked(importance_C, rows_RC.shape[1])
    largest = max(rows_RC.max(initial=0), -rows_RC.min(initial=0))
    if not np.isfinite(largest):
        raise ModelError(
            "weights that are not finite (NaN or infinity) cannot be written", help="train again"
        )
    if ggml_type == "F32":
        return rows_RC.view(np.uint8)
    if ggml_type == "BF16":
        return _to_bfloat(rows_RC)
    if largest > _LARGEST_HALF:
        raise _out_of_range(ggml_type)
    if ggml_type == "F16":
        return rows_RC.astype(np.float16).view(np.uint8)
    library = found_library().library
    num_rows = rows_RC.shape[0]
    encoded = np.empty((num_rows, num_bytes), np.uint8)
    num_slices = max(1, min(num_cores(), num_rows))
    edges = [num_rows * index // num_slices for index in range(num_slices + 1)]
    with ThreadPoolExecutor(num_slices) as pool:
        parts = [
            pool.submit(
                _encode_slice, library, rows_RC[start:end], encoded[start:end], ggml_type, importance_C
            )
            for start, end in itertools.pairwise(edges)
        ]
        for part in parts:
            part.result()
    return encoded


def num_cores() -> int:
    """The cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows do not tell
        return os.cpu_count() or 1


def _encode_slice(
    library: ctypes.CDLL,
    rows_RC: Floats,
    encoded: Bytes,
    ggml_type: str,
    importance_C: Floats | None,
) -> None:
    number = GGML_TYPES[ggml_type].number
    num_rows, num_columns = rows_RC.shape
    weights = None if importance_C is None else importance_C.ctypes.data
    written = library.ggml_quantize_chunk(
        number, rows_RC.ctypes.data, encoded.ctypes.data, 0, num_rows, num_columns, weights
    )
    if written != encoded.nbytes:
        raise _broken(f"it wrote {written} bytes of {ggml_type} where {encoded.nbytes} belong")
    if not library.ggml_validate_row_data(number, encoded.ctypes.data, encoded.nbytes):
        raise _out_of_range(ggml_type)


def _checked(importance_C: Floats, num_columns: int) -> Floats:
    """The importance as the C function reads it: it takes `num_columns` floats from where it is pointed to."""
    if importance_C.shape != (num_columns,):
        raise ModelError(f"importance of shape {importance_C.shape} for rows of {num_columns} values")
    if not np.isfinite(importance_C).all() or importance_C.min(initial=0) < 0:
        raise ModelError("importance must be finite and not negative", help="measure it again")
    return np.ascontiguousarray(importance_C, np.float32)


def _to_bfloat(rows_RC: Floats) -> Bytes:
    """The upper half of each float32, rounded to nearest, ties to even."""
    bits = rows_RC.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    if ((rounded & np.uint32(0x7F80)) == np.uint32(0x7F80)).any():
        raise _out_of_range("BF16")
    return rounded.astype(np.uint16).view(np.uint8)


def _out_of_range(ggml_type: str) -> ModelError:
    return ModelError(
        f"a weight is larger than {ggml_type} can hold",
        help="export as F32; weights that large are rarely sound",
    )


def _broken(what: str) -> MachineError:
    return MachineError(f"this encoder is not the one Myna knows: {what}")


@functools.cache
def found_library() -> Found:
    """The library that encodes, found, loaded and tested once a process; MachineError naming all that were refused."""
    return find_library(self_test)


def probe() -> tuple[Floats, Floats]:
    """[1, 256] values and [256] importance for the self-test, by whole numbers and one division: the same everywhere.

    2041 was picked because no value and no scale falls near a rounding edge for any type: relative noise of
    1e-6, more than another compiler's fused multiply-add does, leaves all bytes as they are.
    """
    index = np.arange(256, dtype=np.int64)
    spread = ((index * 2041) % 10007 - 5003).astype(np.float32) / np.float32(10007)
    row: Floats = (spread * (1 + (index // 32) % 3).astype(np.float32))[None]
    importance: Floats = ((index * 613) % 1009 + 1).astype(np.float32) / np.float32(1009)
    return row, importance


def self_test(library: ctypes.CDLL) -> None:
    """MachineError unless the library knows each type's size and gives known bytes, with importance and without."""
    row, importance = probe()
    for name, kind in GGML_TYPES.items():
        if kind.digests is None:
            continue
        size = library.ggml_row_size(kind.number, row.size)
        if size != row_bytes(row.size, name):
            raise _broken(f"a row of {row.size} values takes {size} bytes as {name}")
        for weights, digest in zip((None, importance), kind.digests, strict=True):
            encoded = np.empty((1, size), np.uint8)
            _encode_slice(library, row, encoded, name, weights)
            if not hashlib.sha256(encoded.tobytes()).hexdigest().startswith(digest):
                weighed = "" if weights is None else " with importance"
                raise _broken(f"other bytes for the known row as {name}{weighed}")
