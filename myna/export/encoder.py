"""Quantized blocks by llama.cpp's own encoder, reached through ctypes in xllamacpp's library.

So there is no compiler and no second implementation (`gguf` only decodes K-quants). The C function trusts
its caller: rows that do not divide into blocks come back as garbage without an error, and a type it does
not know ends the process. So everything is checked here before the call, and the result after it.

    R rows · C columns (a row is what is cut into blocks)
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from myna.errors import MachineError, ModelError

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

# The release whose encoder was tried; `pyproject.toml` pins the same.
XLLAMACPP = "xllamacpp==2026.10.11549"


@dataclass(frozen=True)
class BlockType:
    """A ggml type: its number, how many values share a block, and the bytes of that block."""

    number: int
    block_size: int
    block_bytes: int
    error: float = (
        0.0  # a bound for the relative error by norm on the probe below, about twice what is measured
    )
    digest: str = ""  # how the sha-256 of the probe's bytes begins; empty where numpy does the work


# Block scales are halves too; a larger value becomes infinity there, or a block of zeros.
_LARGEST_HALF = 65504

# Numbers and sizes are ggml.h's and ggml-common.h's; they never change, files depend on them.
GGML_TYPES: dict[str, BlockType] = {
    "F32": BlockType(0, 1, 4),
    "F16": BlockType(1, 1, 2),
    "BF16": BlockType(30, 1, 2),
    "Q4_0": BlockType(2, 32, 18, 0.12, "20c58317fb5aef8ffc4a4b9bf1255457"),
    "Q5_0": BlockType(6, 32, 22, 0.06, "1b3e4e8e4f7c21db581d2f8564bf275c"),
    "Q5_1": BlockType(7, 32, 24, 0.06, "69ff1bf348a761fca14499ec5093da04"),
    "Q8_0": BlockType(8, 32, 34, 0.008, "d99f00f274335dab7c4cf678319a0141"),
    "Q4_K": BlockType(12, 256, 144, 0.11, "0c142b0fa5704275e390691512f04cc3"),
    "Q5_K": BlockType(13, 256, 176, 0.055, "0a1be5949118fabba6758e082f974dc4"),
    "Q6_K": BlockType(14, 256, 210, 0.028, "e9f334882dce2edaadf479dd0b2dce58"),
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

    `importance_C` weighs the columns; types that do not use it (F16, BF16, Q8_0) leave it alone.

    ModelError: C does not divide into blocks, the rows are not contiguous float32, a value is not finite or
    is beyond what the type can hold. MachineError: the library is missing, lacks the function, or fails its
    self-test.
    """
    if rows_RC.ndim != 2 or rows_RC.dtype != np.float32 or not rows_RC.flags.c_contiguous:
        raise ModelError("the encoder takes contiguous float32 rows [R, C]")
    num_bytes = row_bytes(rows_RC.shape[1], ggml_type)
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
    library = _library()
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
    importance_C: Floats | None = None,
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
    return MachineError(
        f"xllamacpp's encoder is not the one Myna knows: {what}",
        help=f"pip install --force-reinstall --no-deps {XLLAMACPP}",
    )


@functools.cache
def _library() -> ctypes.CDLL:
    """xllamacpp's library, loaded and tested once a process."""
    library = load_library(_library_path())
    self_test(library)
    return library


def load_library(path: Path) -> ctypes.CDLL:
    """A llama.cpp library with what `encode` calls declared; MachineError where it lacks a function."""
    try:
        library = ctypes.CDLL(str(path))
        quantize, row_size, validate = (
            getattr(library, name)
            for name in ("ggml_quantize_chunk", "ggml_row_size", "ggml_validate_row_data")
        )
    except (OSError, AttributeError) as error:
        raise MachineError(
            f"this build of llama.cpp cannot quantize: {error}",
            where=str(path),
            help="export F16, BF16 or F32 here (they need no encoder), or quantize the run on Linux",
        ) from error
    whole, pointer = ctypes.c_int64, ctypes.c_void_p
    quantize.restype, row_size.restype, validate.restype = ctypes.c_size_t, ctypes.c_size_t, ctypes.c_bool
    quantize.argtypes = [ctypes.c_int, pointer, pointer, whole, whole, whole, pointer]
    row_size.argtypes = [ctypes.c_int, whole]
    validate.argtypes = [ctypes.c_int, pointer, ctypes.c_size_t]
    return library


def _library_path() -> Path:
    """Found without importing the package: importing it starts a backend."""
    spec = importlib.util.find_spec("xllamacpp")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = [
        file
        for folder in folders
        for file in Path(folder).glob("xllamacpp*")
        if file.suffix in (".so", ".pyd")
    ]
    if not files:
        raise MachineError("quantizing needs the package xllamacpp", help=f"pip install {XLLAMACPP}")
    return files[0]


def probe_row() -> Floats:
    """[1, 256] values for the self-test, by whole numbers and one division: the same on every machine.

    2221 was picked because no value and no scale falls near a rounding edge for any type: relative noise of
    3e-7, what another compiler's fused multiply-add may do, leaves all bytes as they are.
    """
    index = np.arange(256, dtype=np.int64)
    spread = ((index * 2221) % 10007 - 5003).astype(np.float32) / np.float32(10007)
    row: Floats = (spread * (1 + (index // 32) % 3).astype(np.float32))[None]
    return row


def self_test(library: ctypes.CDLL) -> None:
    """MachineError unless the library knows each type's size and gives known bytes, which decode."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    row = probe_row()
    for name, kind in GGML_TYPES.items():
        if kind.block_size == 1:
            continue
        size = library.ggml_row_size(kind.number, row.size)
        if size != row_bytes(row.size, name):
            raise _broken(f"a row of {row.size} values takes {size} bytes as {name}")
        encoded = np.empty((1, size), np.uint8)
        _encode_slice(library, row, encoded, name)
        decoded = dequantize(encoded, GGMLQuantizationType[name])
        error = float(np.linalg.norm(decoded - row) / np.linalg.norm(row))
        if not error <= kind.error:
            raise _broken(f"{name} decodes with a relative error of {error:.3f}")
        if not hashlib.sha256(encoded.tobytes()).hexdigest().startswith(kind.digest):
            raise _broken(f"other bytes for the known row as {name}")
