"""Headers: sound files are read as others read them; any other bytes are refused, by ModelError alone and at once."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import pytest
from bad_files import ARCHITECTURE, STRING, UINT32, array, gguf_bytes, key, safetensors_bytes, tensor, text
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from myna.errors import ModelError
from myna.export.gguf import write_gguf
from myna.model.headers import GGML_TYPES, check_gguf_file, read_gguf_header
from myna.model.safetensors_header import BITS, read_safetensors_header

quick = settings(max_examples=150, deadline=1000, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def sound(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("headers") / "sound.gguf"
    write_gguf(tiny_base, tiny_base, path, "Q8_0", name="sound")
    return path


def test_block_sizes_are_ggufs() -> None:
    theirs = {int(kind): (kind.name, *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert theirs == GGML_TYPES


def test_a_gguf_header_is_what_gguf_reads(sound: Path) -> None:
    header, reader = read_gguf_header(sound), gguf.GGUFReader(sound)
    assert {n: (t.dtype, list(t.shape)) for n, t in header.tensors.items()} == {
        t.name: (t.tensor_type.name, t.shape.tolist()) for t in reader.tensors
    }
    for name, value in header.values.items():
        contents = reader.fields[name].contents()
        assert value == (len(contents) if isinstance(contents, list) else contents)
    check_gguf_file(sound)


def test_a_safetensors_header_is_what_safetensors_reads(tiny_base: Path) -> None:
    from safetensors import safe_open

    header = read_safetensors_header(tiny_base / "model.safetensors")
    with safe_open(tiny_base / "model.safetensors", framework="np") as tensors:
        assert {n: (t.dtype, t.shape) for n, t in header.items()} == {
            n: (tensors.get_slice(n).get_dtype(), tuple(tensors.get_slice(n).get_shape()))
            for n in tensors.keys()  # noqa: SIM118
        }


def test_49_bytes_that_hang_a_reader_are_refused_at_once(tmp_path: Path) -> None:
    from bad_files import HANG

    assert len(HANG) == 49
    (tmp_path / "a.gguf").write_bytes(HANG)
    started = time.thread_time()
    with pytest.raises(ModelError):
        check_gguf_file(tmp_path / "a.gguf")
    assert time.thread_time() - started < 0.05


def refused_or_read(path: Path, content: bytes) -> bool:
    """Whether a file of these bytes is read; anything but a ModelError of one line escapes, and so does slowness."""
    path.write_bytes(content)
    started = time.thread_time()
    try:
        check_gguf_file(path) if path.suffix == ".gguf" else read_safetensors_header(path)
    except ModelError as error:
        assert error.where and "\n" not in error.message and len(error.message) < 600
        return False
    finally:
        assert time.thread_time() - started < 1
    return True


@quick
@given(content=st.binary(max_size=300))
def test_any_bytes_behind_the_magic(content: bytes, tmp_path: Path) -> None:
    refused_or_read(tmp_path / "a.gguf", b"GGUF\3\0\0\0" + content)
    refused_or_read(tmp_path / "a.safetensors", content)


small = st.integers(0, 4)
any_length = st.one_of(small, st.integers(0, 2**64 - 1), st.sampled_from([2**31, 2**32, 2**62, 2**63]))


@st.composite
def gguf_files(draw: st.DrawFn) -> bytes:
    """Files that are nearly sound: each number may be a lie."""
    kinds = st.sampled_from([UINT32, STRING, 9, 10, 12, 13, 0, 7])
    keys = [ARCHITECTURE] if draw(st.booleans()) else []
    for number in range(draw(small)):
        kind = draw(kinds)
        content = (
            array(draw(kinds), draw(any_length), bytes(draw(small) * 8))
            if kind == 9
            else text("ab")[: draw(st.integers(0, 10))]
        )
        keys.append(key(f"k{number % 3}", kind, content))
    tensors = []
    for number in range(draw(small)):
        shape = tuple(draw(st.lists(any_length, max_size=5)))
        tensors.append(
            tensor(f"t{number % 3}", shape, draw(st.integers(0, 50)), draw(st.sampled_from([0, 32, 64, 7])))
        )
    counts = None if draw(st.booleans()) else (draw(any_length), draw(any_length))
    return gguf_bytes(keys, tensors, draw(st.integers(0, 200)), counts=counts)


@quick
@given(content=gguf_files())
def test_nearly_sound_gguf_files(content: bytes, tmp_path: Path) -> None:
    refused_or_read(tmp_path / "a.gguf", content)


json_values: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*BITS, "F99"]) | json_values,
        "shape": st.lists(any_length, max_size=4) | json_values,
        "data_offsets": st.lists(any_length, min_size=2, max_size=2) | json_values,
    }
)


@quick
@given(
    header=st.dictionaries(st.text(max_size=3), entries | json_values, max_size=4) | json_values,
    data=st.integers(0, 64),
)
def test_nearly_sound_safetensors_files(header: Any, data: int, tmp_path: Path) -> None:
    refused_or_read(tmp_path / "a.safetensors", safetensors_bytes(header, data))


def mutated(content: bytes, chance: random.Random) -> bytes:
    """One to four changes near the front: a flipped bit, a cut, an insertion, a number that is another."""
    made = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(min(len(made), 9000))
        change = chance.randrange(4)
        if change == 0:
            made[at] ^= 1 << chance.randrange(8)
        elif change == 1:
            del made[at : at + chance.choice((1, 8, len(made)))]
        elif change == 2:
            made[at:at] = chance.randbytes(chance.randint(1, 9))
        else:
            number = chance.choice((0, 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1))
            made[at : at + 8] = struct.pack("<Q", number)
        if not made:
            break
    return bytes(made)


def survivors(source: Path, folder: Path, count: int) -> list[Path]:
    """What of `count` mutations of a file is still read."""
    content, chance, kept = source.read_bytes(), random.Random(4), []
    for number in range(count):
        path = folder / f"{number}{source.suffix}"
        if refused_or_read(path, mutated(content, chance)):
            kept.append(path)
        else:
            path.unlink()
    return kept


def test_mutations_are_refused_or_read(sound: Path, tiny_base: Path, tmp_path: Path) -> None:
    assert 0 < len(survivors(sound, tmp_path, 200)) < 150
    assert 0 < len(survivors(tiny_base / "model.safetensors", tmp_path, 200)) < 150


READ = """
import sys, time
from pathlib import Path
import gguf, safetensors
for path in sys.argv[1:]:
    started = time.thread_time()
    try:
        if path.endswith("gguf"):
            gguf.GGUFReader(path)
        else:
            with safetensors.safe_open(path, framework="np") as tensors:
                [tensors.get_slice(name) for name in tensors.keys()]
    except Exception as error:
        print(path, repr(error))
    if time.thread_time() - started > 1:
        print(path, "took long")
"""


@pytest.mark.slow
def test_what_is_let_through_others_read_too(sound: Path, tiny_base: Path, tmp_path: Path) -> None:
    kept = survivors(sound, tmp_path, 1500) + survivors(tiny_base / "model.safetensors", tmp_path, 1500)
    done = subprocess.run(
        [sys.executable, "-c", READ, *map(str, kept)], capture_output=True, text=True, timeout=120, check=True
    )
    assert len(kept) > 100 and done.stdout == ""
