"""The header of a .gguf file, read and checked before any library opens the file: nothing in it is believed.

    magic · version · counts │ keys and values │ name, dimensions, type, offset of each tensor │ padding │ data

Time and memory are bounded by the size that the file really has, and by the limits below; nothing is allocated because a
number in the file asks for it. Format: ggml-org/ggml, docs/gguf.md; block sizes: ggml/src/ggml-common.h.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from myna.model.plain_files import TRUNCATED_CURE, refuse, require_plain_file, shown
from myna.model.safetensors_header import TensorEntry, num_elements, refuse_overlaps

MAX_ENTRIES = 1 << 16  # keys, or tensors, of one file; the largest models have some ten thousand
VERSIONS = (2, 3)
KEPT_TEXT = 1000
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MAX_NAME = 63  # bytes of a tensor's name: what llama.cpp keeps
MAX_KEY = 65_535  # bytes, as the format says
MAX_TEXT = 64_000_000  # bytes of one string value; some files carry a whole tokenizer.json
MAX_VALUES = (
    1 << 21
)  # elements of all arrays together: a vocabulary of 256k tokens, its scores, types and merges have 1.3 M
MAX_GGUF_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 16
# number of the type → name, values a block, bytes a block
GGML_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip


@dataclass(frozen=True)
class GgufHeader:
    """`values` by key: scalars, strings of at most KEPT_TEXT characters (longer ones cut), and of an array its length.

    `data_start`: the byte of the file that the tensors' offsets count from.
    """

    values: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]
    data_start: int


@dataclass(frozen=True)
class _Bytes:
    """A file mapped into memory: numbers and strings at an offset, or ModelError."""

    path: Path
    content: mmap.mmap

    def numbers(self, at: int, form: str, what: str) -> tuple[Any, ...]:
        """Little-endian numbers at an offset. ModelError where the file ends before them."""
        if at + struct.calcsize("<" + form) > len(self.content):
            self.cut(what)
        return struct.unpack_from("<" + form, self.content, at)

    def text(self, at: int, most: int, what: str) -> tuple[str, int]:
        """A string and where it ends."""
        (length,) = self.numbers(at, "Q", what)
        end = at + 8 + length
        if end > len(self.content):
            self.cut(what)
        if length > most:
            refuse(self.path, f"{what} has {length:,} bytes; at most {most:,} are read")
        try:
            return self.content[at + 8 : end].decode(), end
        except UnicodeDecodeError:
            refuse(self.path, f"{what} is no UTF-8")

    def cut(self, what: str) -> NoReturn:
        refuse(self.path, f"is cut short or broken: it ends within {what}", TRUNCATED_CURE)


def read_gguf_header(path: Path) -> GgufHeader:
    """The header of a .gguf file. ModelError for one that is not wholly sound."""
    size = require_plain_file(path)
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            refuse(path, "is no GGUF file")
        if size < 24:
            refuse(path, "is cut short: it ends within its first 24 bytes", TRUNCATED_CURE)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _gguf_header(_Bytes(path, content))


def _gguf_header(file: _Bytes) -> GgufHeader:
    version, num_tensors, num_keys = file.numbers(4, "IQQ", "its counts")
    if version not in VERSIONS:
        big_endian = version and not version & 0xFFFF
        what = "is written for big-endian machines" if big_endian else f"has the GGUF version {version}"
        refuse(
            file.path, f"{what}; little-endian files of version 2 and 3 are read", "convert the model again"
        )
    for count, what in ((num_keys, "keys"), (num_tensors, "tensors")):
        if count > MAX_ENTRIES or 13 * count > len(file.content):
            refuse(file.path, f"claims {count:,} {what} in {len(file.content):,} bytes")
    values, at = _gguf_values(file, num_keys)
    alignment = values.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        refuse(file.path, f"general.alignment is {shown(alignment)}, no power of two")
    tensors, at = _gguf_tensors(file, num_tensors, at, alignment)
    data_start = _padded(at, alignment)
    refuse_overlaps(file.path, tensors, len(file.content) - data_start)
    return GgufHeader(values, tensors, data_start)


def _gguf_values(file: _Bytes, num_keys: int) -> tuple[dict[str, Any], int]:
    values: dict[str, Any] = {}
    at, left = 24, MAX_VALUES
    for number in range(num_keys):
        key, at = file.text(at, MAX_KEY, f"the name of key {number + 1} of {num_keys}")
        if key in values:
            refuse(file.path, f"names the key {shown(key)} twice")
        (kind,) = file.numbers(at, "I", shown(key))
        at += 4
        if kind == STRING:
            text, at = file.text(at, MAX_TEXT, f"the value of {shown(key)}")
            values[key] = text[:KEPT_TEXT]
        elif kind == ARRAY:
            values[key], at = _array_length(file, at, key, left)
            left -= values[key]
        elif kind in SCALARS:
            (values[key],) = file.numbers(at, SCALARS[kind], shown(key))
            at += struct.calcsize(SCALARS[kind])
        else:
            refuse(file.path, f"the key {shown(key)} has the unknown type {kind}")
    return values, at


def _array_length(file: _Bytes, at: int, key: str, most: int) -> tuple[int, int]:
    """The number of elements of an array and where it ends; `most` elements may still come in this file."""
    kind, length = file.numbers(at, "IQ", f"the array {shown(key)}")
    at += 12
    if kind not in SCALARS and kind != STRING:
        what = "holds arrays" if kind == ARRAY else f"holds the unknown type {kind}"
        refuse(file.path, f"the array {shown(key)} {what}; numbers and strings are read")
    if length > most:
        refuse(file.path, f"the array {shown(key)} brings its values beyond {MAX_VALUES:,}")
    if kind in SCALARS:
        at += length * struct.calcsize(SCALARS[kind])
    else:
        at = _strings_end(file.content, at, length)
    if at > len(file.content):
        file.cut(f"the array {shown(key)}")
    return length, at


def _strings_end(content: mmap.mmap, at: int, count: int) -> int:
    """Where `count` strings end; past the end of the file where they would lie beyond it."""
    size, read = len(content) - 8, struct.Struct("<Q").unpack_from
    for _ in range(count):
        if at > size:
            return size + 9
        at += 8 + read(content, at)[0]
    return at


def _gguf_tensors(
    file: _Bytes, num_tensors: int, at: int, alignment: int
) -> tuple[dict[str, TensorEntry], int]:
    """Tensors in the order of the file, each right behind the padded one before it: llama.cpp wants them so."""
    tensors: dict[str, TensorEntry] = {}
    expected = 0
    for number in range(num_tensors):
        name, at = file.text(at, MAX_NAME, f"the name of tensor {number + 1} of {num_tensors}")
        if name in tensors:
            refuse(file.path, f"names the tensor {shown(name)} twice")
        (num_dimensions,) = file.numbers(at, "I", f"tensor {shown(name)}")
        if not 1 <= num_dimensions <= MAX_GGUF_DIMENSIONS:
            refuse(
                file.path,
                f"tensor {shown(name)} has {num_dimensions} dimensions; 1 to {MAX_GGUF_DIMENSIONS} are read",
            )
        form = f"{num_dimensions}QIQ"
        *shape, kind, begin = file.numbers(at + 4, form, f"tensor {shown(name)}")
        at += 4 + struct.calcsize("<" + form)
        dtype, num_bytes = _ggml_bytes(file.path, name, kind, shape)
        if begin != expected:
            what = "is not aligned" if begin % alignment else f"does not begin where it should ({expected})"
            refuse(file.path, f"tensor {shown(name)} at offset {begin} {what}")
        tensors[name] = TensorEntry(dtype, tuple(shape), begin, begin + num_bytes)
        expected = _padded(begin + num_bytes, alignment)
    return tensors, at


def _ggml_bytes(path: Path, name: str, kind: int, shape: list[int]) -> tuple[str, int]:
    """A tensor's type by name and its bytes."""
    if kind not in GGML_TYPES:
        refuse(
            path, f"tensor {shown(name)} has the unknown type {kind}", "a newer Myna or another file may do"
        )
    dtype, block, block_bytes = GGML_TYPES[kind]
    if min(shape) < 1:
        refuse(path, f"tensor {shown(name)} has the empty shape {shape}")
    elements = num_elements(path, name, shape)
    if shape[0] % block:
        refuse(path, f"tensor {shown(name)}: rows of {shape[0]} values are no whole blocks of {dtype}")
    return dtype, elements // block * block_bytes


def _padded(at: int, alignment: int) -> int:
    return -(-at // alignment) * alignment


# What a model's header must say beyond being sound; each of these sizes is that of some tensor.
GGUF_SIZES = (
    *("block_count", "embedding_length", "feed_forward_length", "vocab_size", "expert_count", "expert_used_count"),
    *(f"attention.{name}" for name in ("head_count", "head_count_kv", "key_length", "value_length")),
    "rope.dimension_count",
)  # fmt: skip


def check_gguf_file(path: Path) -> None:
    """ModelError where a file is no .gguf file that llama.cpp and the `gguf` package can be given. Reads the header only."""
    header = read_gguf_header(path)
    values, wrong = header.values, partial(refuse, path)
    architecture = values.get("general.architecture")
    if not isinstance(architecture, str) or not re.fullmatch(r"[\w.-]{1,64}", architecture):
        wrong("names no model: general.architecture is missing or no name")
    if type(values.get("split.count")) is int and values["split.count"] > 1:
        wrong("is one part of a split file", "llama-gguf-split --merge FIRST-PART WHOLE.gguf")
    if not header.tensors:
        wrong("holds no tensors")
    if values.get("general.type", "model") == "model":
        _check_gguf_sizes(path, architecture, header)


def _check_gguf_sizes(path: Path, architecture: str, header: GgufHeader) -> None:
    """The sizes in the keys are those of tensors: a reader builds the model by them before it looks at any tensor."""
    largest = max(max(tensor.shape) for tensor in header.tensors.values())
    for name in GGUF_SIZES:
        size = header.values.get(f"{architecture}.{name}", 0)
        if type(size) is not int or not 0 <= size <= largest:
            refuse(path, f"{architecture}.{name} is {shown(size)}; its largest tensor dimension is {largest}")
    blocks = {int(found[1]) for name in header.tensors if (found := re.match(r"blk\.(\d{1,6})\.", name))}
    count = header.values.get(f"{architecture}.block_count", 0)
    if count > max(blocks, default=-1) + 1:
        refuse(path, f"{architecture}.block_count is {count}, the file has {len(blocks)} blocks")
    embedding = header.tensors.get("token_embd.weight")
    tokens = header.values.get("tokenizer.ggml.tokens")
    if embedding and isinstance(tokens, int) and embedding.shape[1:] != (tokens,):
        refuse(path, f"has {tokens} tokens and a token_embd.weight of shape {list(embedding.shape)}")
