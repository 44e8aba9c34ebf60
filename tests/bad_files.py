"""Bad GGUF and safetensors files, byte by byte: part of the corpus of bad_models.py."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Settings = dict[str, Any]


@dataclass(frozen=True)
class Kit:
    """What bad files are made from: a sound model folder, a sound .gguf of it, a sound adapter, and where to write."""

    base: Path
    gguf: Path
    adapter: Path
    folder: Path


@dataclass(frozen=True)
class Bad:
    """One bad thing: `make` writes it and returns what to name; `says` is a regular expression for the one line."""

    says: str
    make: Callable[[Kit], Path]
    exit_code: int = 3


# GGUF, byte by byte

UINT32, FLOAT32, STRING, ARRAY, UINT64 = 4, 6, 8, 9, 10


def text(value: str | bytes) -> bytes:
    content = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(content)) + content


def key(name: str | bytes, kind: int, content: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + content


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


ARCHITECTURE = key("general.architecture", STRING, text("llama"))


def gguf_bytes(
    keys: list[bytes],
    tensors: list[bytes],
    data: int = 0,
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    num_tensors, num_keys = counts or (len(tensors), len(keys))
    head = b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32 + data)


def gguf(*args: Any, **named: Any) -> Callable[[Kit], Path]:
    def make(kit: Kit) -> Path:
        path = kit.folder / "bad.gguf"
        path.write_bytes(gguf_bytes(*args, **named))
        return path

    return make


def gguf_of(content: bytes) -> Callable[[Kit], Path]:
    def make(kit: Kit) -> Path:
        (kit.folder / "bad.gguf").write_bytes(content)
        return kit.folder / "bad.gguf"

    return make


def cut_gguf(part: float) -> Callable[[Kit], Path]:
    def make(kit: Kit) -> Path:
        content = kit.gguf.read_bytes()
        (kit.folder / "bad.gguf").write_bytes(content[: int(len(content) * part)])
        return kit.folder / "bad.gguf"

    return make


def gguf_fifo(kit: Kit) -> Path:
    os.mkfifo(kit.folder / "bad.gguf")
    return kit.folder / "bad.gguf"


# An array of 2^63 arrays of nothing: 49 bytes in which gguf's own reader stays for ever.
HANG = gguf_bytes([key("a", ARRAY, struct.pack("<IQ", ARRAY, 1 << 62))], [], counts=(0, 1))[:49]
EMBEDDING = tensor("token_embd.weight", (32, 8))


def array(kind: int, length: int, content: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, length) + content


GGUF: Mapping[str, Bad] = {
    "gguf-that-hangs-a-reader": Bad("holds arrays|cut short", gguf_of(HANG)),
    "gguf-empty": Bad("is no GGUF file", gguf_of(b"")),
    "gguf-magic-alone": Bad("cut short", gguf_of(b"GGUF")),
    "gguf-other-magic": Bad("is no GGUF file", gguf_of(b"GGML" + bytes(60))),
    "gguf-version-1": Bad("GGUF version 1", gguf([ARCHITECTURE], [EMBEDDING], 1024, version=1)),
    "gguf-big-endian": Bad("big-endian", gguf([ARCHITECTURE], [EMBEDDING], 1024, version=3 << 24)),
    "gguf-keys-2-to-60": Bad("claims .* keys", gguf([ARCHITECTURE], [], counts=(0, 1 << 60))),
    "gguf-tensors-2-to-60": Bad(
        "claims .* tensors", gguf([ARCHITECTURE], [EMBEDDING], 99, counts=(1 << 60, 1))
    ),
    "gguf-string-beyond-the-file": Bad(
        "cut short", gguf([text("a") + struct.pack("<IQ", STRING, 1 << 62)], [EMBEDDING])
    ),
    "gguf-array-beyond-the-file": Bad(
        "cut short", gguf([key("a", ARRAY, array(UINT32, 1 << 20))], [EMBEDDING])
    ),
    "gguf-array-2-to-62": Bad(
        "beyond 2,097,152", gguf([key("a", ARRAY, array(UINT32, 1 << 62))], [EMBEDDING])
    ),
    "gguf-strings-beyond-the-file": Bad(
        "cut short", gguf([key("a", ARRAY, array(STRING, 1 << 20))], [EMBEDDING])
    ),
    "gguf-nested-arrays": Bad(
        "holds arrays", gguf([key("a", ARRAY, array(ARRAY, 1, array(UINT32, 1, b"abcd")))], [EMBEDDING])
    ),
    "gguf-type-99": Bad("unknown type 99", gguf([key("a", 99, b"abcd")], [EMBEDDING])),
    "gguf-array-of-type-99": Bad(
        "unknown type 99", gguf([key("a", ARRAY, array(99, 1, b"abcd"))], [EMBEDDING])
    ),
    "gguf-key-twice": Bad("key .* twice", gguf([ARCHITECTURE, ARCHITECTURE], [EMBEDDING], 1024)),
    "gguf-key-no-utf-8": Bad("no UTF-8", gguf([key(b"\xff\xfe", UINT32, b"abcd")], [EMBEDDING], 1024)),
    "gguf-no-architecture": Bad("names no model", gguf([key("a", UINT32, b"abcd")], [EMBEDDING], 1024)),
    "gguf-architecture-a-number": Bad(
        "names no model", gguf([key("general.architecture", UINT32, b"abcd")], [EMBEDDING], 1024)
    ),
    "gguf-alignment-33": Bad(
        "power of two",
        gguf([ARCHITECTURE, key("general.alignment", UINT32, struct.pack("<I", 33))], [EMBEDDING], 1024),
    ),
    "gguf-alignment-0": Bad(
        "power of two", gguf([ARCHITECTURE, key("general.alignment", UINT32, bytes(4))], [EMBEDDING], 1024)
    ),
    "gguf-tensor-twice": Bad(
        "tensor .* twice", gguf([ARCHITECTURE], [EMBEDDING, tensor("token_embd.weight", (8,), 0, 1024)], 2048)
    ),
    "gguf-tensor-of-5-dimensions": Bad("5 dimensions", gguf([ARCHITECTURE], [tensor("a", (1,) * 5)], 1024)),
    "gguf-tensor-of-4-billion-dimensions": Bad(
        "4294967295 dimensions", gguf([ARCHITECTURE], [text("a") + b"\xff" * 4], 1024)
    ),
    "gguf-tensor-empty": Bad("empty shape", gguf([ARCHITECTURE], [tensor("a", (0, 4))], 1024)),
    "gguf-shape-that-overflows": Bad(
        "absurd shape", gguf([ARCHITECTURE], [tensor("a", (1 << 32, 1 << 32))], 1024)
    ),
    "gguf-shape-beyond-the-file": Bad("cut short", gguf([ARCHITECTURE], [tensor("a", (1 << 20, 64))], 1024)),
    "gguf-ggml-type-77": Bad("unknown type 77", gguf([ARCHITECTURE], [tensor("a", (32,), 77)], 1024)),
    "gguf-half-a-block": Bad("no whole blocks", gguf([ARCHITECTURE], [tensor("a", (33,), 8)], 1024)),
    "gguf-offset-unaligned": Bad("not aligned", gguf([ARCHITECTURE], [tensor("a", (8,), 0, 7)], 1024)),
    "gguf-offset-far": Bad("does not begin", gguf([ARCHITECTURE], [tensor("a", (8,), 0, 1 << 40)], 1024)),
    "gguf-tensors-overlap": Bad(
        "does not begin", gguf([ARCHITECTURE], [tensor("a", (32, 8)), tensor("b", (32, 8), 0, 32)], 2048)
    ),
    "gguf-no-tensors": Bad("holds no tensors", gguf([ARCHITECTURE], [], 64)),
    "gguf-name-of-a-megabyte": Bad("at most 63", gguf([ARCHITECTURE], [tensor("a" * 1_000_000, (8,))], 64)),
    "gguf-a-billion-blocks": Bad(
        "block_count is '1000000000'",
        gguf([ARCHITECTURE, key("llama.block_count", UINT32, struct.pack("<I", 10**9))], [EMBEDDING], 1024),
    ),
    "gguf-part-of-a-split": Bad(
        "split file",
        gguf([ARCHITECTURE, key("split.count", UINT32, struct.pack("<I", 3))], [EMBEDDING], 1024),
    ),
    "gguf-cut-in-the-header": Bad("cut short", cut_gguf(0.01)),
    "gguf-cut-in-the-data": Bad("cut short", cut_gguf(0.9)),
    "gguf-pipe": Bad("no plain file|no such file", gguf_fifo),
}


# safetensors


def safetensors_bytes(header: object, data: int = 0) -> bytes:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(content)) + content + bytes(data)


def entry(dtype: str = "F32", shape: object = (4,), offsets: object = (0, 16)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def model(**files: bytes | Settings | str) -> Callable[[Kit], Path]:
    """The sound folder with some files written anew: `model_safetensors` is model.safetensors."""

    def make(kit: Kit) -> Path:
        folder = kit.folder / "model"
        shutil.copytree(kit.base, folder)
        for name, content in files.items():
            head, _, suffix = name.rpartition("_")
            path = folder / f"{head}.{suffix}"
            if isinstance(content, dict):
                before = json.loads(path.read_text()) if path.exists() else {}
                path.write_text(json.dumps(before | content))
            else:
                path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return folder

    return make


def weights(header: object, data: int = 16) -> Callable[[Kit], Path]:
    return model(model_safetensors=safetensors_bytes(header, data))


def changed(change: Callable[[Path], None]) -> Callable[[Kit], Path]:
    """The sound folder after `change`."""

    def make(kit: Kit) -> Path:
        folder = model()(kit)
        change(folder)
        return folder

    return make


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def poisoned(folder: Path, value: float = float("nan")) -> None:
    """One value of one tensor is not finite."""
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    begin = 8 + length + header["model.layers.1.mlp.up_proj.weight"]["data_offsets"][0]
    content[begin + 400 : begin + 404] = np.float32(value).tobytes()
    path.write_bytes(content)


def sharded(folder: Path, index: object) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def linked_out(folder: Path) -> None:
    outside = folder.parent / "outside.safetensors"
    (folder / "model.safetensors").rename(outside)
    (folder / "model.safetensors").symlink_to(outside)


def linked_nowhere(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("tokenizer.json")


def piped(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


def large_tokenizer(folder: Path) -> None:
    with (folder / "tokenizer.json").open("wb") as file:
        file.truncate(1 << 33)  # sparse: nothing is written


SAFETENSORS: Mapping[str, Bad] = {
    "safetensors-empty": Bad("no whole safetensors", model(model_safetensors=b"")),
    "safetensors-length-2-to-63": Bad(
        "its header would have", model(model_safetensors=struct.pack("<Q", 1 << 63) + bytes(99))
    ),
    "safetensors-no-json": Bad("no JSON", weights(b"{]")),
    "safetensors-nested-json": Bad("nested too deeply", weights(b'{"a":' * 100_000)),
    "safetensors-a-list": Bad("no JSON object", weights([1, 2])),
    "safetensors-name-twice": Bad(
        "twice", weights(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2))
    ),
    "safetensors-dtype": Bad("unknown dtype", weights({"a": entry("F99")})),
    "safetensors-negative-shape": Bad("no possible shape", weights({"a": entry(shape=(-4, -1))})),
    "safetensors-shape-no-list": Bad("no possible shape", weights({"a": entry(shape="4")})),
    "safetensors-shape-that-overflows": Bad("absurd shape", weights({"a": entry(shape=(1 << 40, 1 << 40))})),
    "safetensors-size-does-not-fit": Bad("does not fill", weights({"a": entry(shape=(5,))})),
    "safetensors-offsets-backwards": Bad("no possible data_offsets", weights({"a": entry(offsets=(16, 0))})),
    "safetensors-overlap": Bad("overlap", weights({"a": entry(), "b": entry(offsets=(8, 24))}, 24)),
    "safetensors-hole": Bad("belong to no tensor", weights({"a": entry(offsets=(16, 32))}, 32)),
    "safetensors-beyond-the-file": Bad("cut short", weights({"a": entry(shape=(400,), offsets=(0, 1600))})),
    "safetensors-cut": Bad("cut short", changed(cut_weights)),
    "safetensors-entry-no-object": Bad("not by an object", weights({"a": 3})),
    "safetensors-nan": Bad("1 of the .*up_proj.weight are not finite", changed(poisoned)),
    "safetensors-infinite": Bad("not finite", changed(lambda folder: poisoned(folder, float("inf")))),
    "index-path-up": Bad(
        "no file of its folder",
        changed(lambda f: sharded(f, {"metadata": {}, "weight_map": {"a": "../outside.safetensors"}})),
    ),
    "index-path-absolute": Bad(
        "no file of its folder",
        changed(lambda f: sharded(f, {"metadata": {}, "weight_map": {"a": "/etc/passwd"}})),
    ),
    "index-missing-shard": Bad(
        "which is missing",
        changed(lambda f: sharded(f, {"metadata": {}, "weight_map": {"a": "model-9.safetensors"}})),
    ),
    "index-tensor-elsewhere": Bad(
        "no shard",
        changed(
            lambda f: sharded(f, {"metadata": {}, "weight_map": {"a": "model-00001-of-00001.safetensors"}})
        ),
    ),
    "index-no-map": Bad("no weight_map", changed(lambda f: sharded(f, {"weight_map": 3}))),
    "link-out-of-the-folder": Bad("link out of its folder", changed(linked_out)),
    "link-in-a-circle": Bad("leads nowhere", changed(linked_nowhere)),
    "pipe-for-weights": Bad("no plain file", changed(piped)),
}
