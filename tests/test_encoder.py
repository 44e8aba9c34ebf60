"""The encoder against gguf and torch, with importance and without, and what it refuses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from myna.errors import MachineError, ModelError
from myna.export import encoder
from myna.export.encoder import GGML_TYPES, encode, probe, row_bytes, self_test

QUANTIZED = [name for name, kind in GGML_TYPES.items() if kind.block_size > 1]


def rows_of(num_rows: int, num_columns: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal((num_rows, num_columns), np.float32)


@pytest.mark.parametrize("name", GGML_TYPES)
def test_type_numbers_and_sizes_are_ggufs(name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    assert GGML_TYPES[name].number == kind.value
    assert (GGML_TYPES[name].block_size, GGML_TYPES[name].block_bytes) == gguf.GGML_QUANT_SIZES[kind]


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_simple_types_have_ggufs_bytes(name: str) -> None:
    rows = rows_of(9, 96)
    np.testing.assert_array_equal(
        encode(rows, name), gguf.quants.quantize(rows, gguf.GGMLQuantizationType[name])
    )


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        *[("Q2_K", 0.32), ("Q3_K", 0.17), ("IQ4_NL", 0.1), ("IQ4_XS", 0.1), ("Q4_1", 0.1), ("Q4_K", 0.09)],
        *[("Q5_1", 0.05), ("Q5_K", 0.045), ("Q6_K", 0.025), ("Q8_0", 0.008)],
    ],
)
def test_blocks_decode_near_their_rows(name: str, bound: float) -> None:
    rows = rows_of(5, 512)
    decoded = gguf.quants.dequantize(encode(rows, name), gguf.GGMLQuantizationType[name])
    assert np.linalg.norm(decoded - rows) / np.linalg.norm(rows) < bound


def test_rows_encoded_by_many_threads_are_the_rows_encoded_alone() -> None:
    rows = rows_of(17, 256)
    alone = np.concatenate([encode(rows[index : index + 1], "Q4_K") for index in range(17)])
    np.testing.assert_array_equal(encode(rows, "Q4_K"), alone)


@pytest.mark.parametrize(("name", "dtype"), [("BF16", torch.bfloat16), ("F16", torch.float16)])
def test_half_types_round_as_torch_does(name: str, dtype: torch.dtype) -> None:
    ties = np.array(
        [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11, -1e-40, 3e-6, 0.0, -0.0], np.float32
    )
    rows = np.concatenate([ties, rows_of(1, 56)[0]])[None]
    expected = torch.from_numpy(rows).to(dtype).view(torch.int16).numpy()
    np.testing.assert_array_equal(encode(rows, name).view(np.int16), expected)


def test_f32_is_written_as_it_is() -> None:
    rows = rows_of(2, 7)
    assert encode(rows, "F32").tobytes() == rows.tobytes()


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_width_that_blocks_do_not_divide_is_refused(name: str) -> None:
    width = GGML_TYPES[name].block_size + 16
    with pytest.raises(ModelError, match="do not divide"):
        encode(rows_of(2, width), name)
    with pytest.raises(ModelError, match="do not divide"):
        row_bytes(width, name)


@pytest.mark.parametrize(
    "rows",
    [rows_of(64, 64).T, rows_of(4, 64)[:, ::2], rows_of(2, 64).astype(np.float64), rows_of(2, 64)[0]],
    ids=["transposed", "strided", "float64", "vector"],
)
def test_rows_that_are_not_contiguous_float32_are_refused(rows: np.ndarray[Any, Any]) -> None:
    with pytest.raises(ModelError, match="contiguous float32"):
        encode(rows, "Q8_0")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["F32", "BF16", "Q4_K"])
def test_values_that_are_not_finite_are_refused(name: str, value: float) -> None:
    rows = rows_of(2, 256)
    rows[1, 5] = value
    with pytest.raises(ModelError, match="not finite"):
        encode(rows, name)


@pytest.mark.parametrize("value", [7e4, -np.finfo(np.float32).max])
@pytest.mark.parametrize("name", [*QUANTIZED, "F16"])
def test_values_beyond_a_half_are_refused(name: str, value: float) -> None:
    """Block scales are halves; of such a value the C code makes infinities or zeros, mostly without a word."""
    rows = rows_of(2, 256)
    rows[1, 5] = value
    with pytest.raises(ModelError, match="larger than"):
        encode(rows, name)


def test_bfloat_holds_all_but_what_rounds_to_infinity() -> None:
    assert encode(np.full((1, 2), 3.38e38, np.float32), "BF16").view(np.uint16).tolist() == [[0x7F7E, 0x7F7E]]
    with pytest.raises(ModelError, match="larger than"):
        encode(np.full((1, 2), np.finfo(np.float32).max), "BF16")


def test_the_probe_stands_noise() -> None:
    """Another compiler's last digits must not make the self-test refuse a sound library."""
    random_ = np.random.default_rng(1)
    row, importance = probe()
    for name in QUANTIZED:
        for weights in (None, importance):
            expected = encode(row, name, weights)
            for _ in range(20):
                noisy, noisy_weights = (
                    value
                    if value is None
                    else (value * (1 + random_.uniform(-1e-6, 1e-6, value.shape))).astype(np.float32)
                    for value in (row, weights)
                )
                np.testing.assert_array_equal(encode(noisy, name, noisy_weights), expected)


# --- importance


@pytest.mark.parametrize("name", [name for name in QUANTIZED if GGML_TYPES[name].weighs])
def test_columns_of_importance_are_nearer_to_their_source(name: str) -> None:
    """What is asked for is a smaller weighted error; and it is had, at the cost of the columns that count less."""
    rows = rows_of(32, 512)
    importance = np.where(np.arange(512) % 8 == 0, 100, 0.01).astype(np.float32)
    errors = []
    for weights in (None, importance):
        decoded = gguf.quants.dequantize(encode(rows, name, weights), gguf.GGMLQuantizationType[name])
        errors.append(float((importance * np.square(decoded - rows)).sum()))
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("name", [name for name in GGML_TYPES if not GGML_TYPES[name].weighs])
def test_types_without_weights_leave_importance_alone(name: str) -> None:
    rows, importance = rows_of(3, 256), np.linspace(0, 9, 256, dtype=np.float32)
    np.testing.assert_array_equal(encode(rows, name, importance), encode(rows, name))


@pytest.mark.parametrize("name", ["F32", "Q8_0", "Q4_K"])
@pytest.mark.parametrize(
    ("importance", "said"),
    [
        (np.ones(255, np.float32), "shape"),  # the C function would read one float beyond it
        (np.ones((1, 256), np.float32), "shape"),
        (np.r_[np.ones(255), np.nan].astype(np.float32), "finite"),
        (np.r_[np.ones(255), np.inf].astype(np.float32), "finite"),
        (np.r_[np.ones(255), -1].astype(np.float32), "negative"),
    ],
)
def test_importance_that_does_not_fit_is_refused(
    name: str, importance: np.ndarray[Any, Any], said: str
) -> None:
    with pytest.raises(ModelError, match=said):
        encode(rows_of(2, 256), name, importance)


def test_importance_of_another_layout_is_read_alike() -> None:
    rows, importance = rows_of(2, 256), np.linspace(0.1, 9, 256, dtype=np.float32)
    strided = np.repeat(importance, 2)[::2]
    for other in (strided, importance.astype(np.float64)):
        np.testing.assert_array_equal(encode(rows, "Q4_K", other), encode(rows, "Q4_K", importance))


# --- a library that answers wrongly


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("size", "takes"),
        ("short", "wrote"),
        ("bytes", "known row as Q4_0$"),
        ("garbage", "known row as Q4_0$"),
        ("deaf", "known row as Q4_0 with importance"),
        ("one type", "known row as IQ4_XS$"),
    ],
)
def test_a_library_that_answers_wrongly_is_refused(fault: str, said: str) -> None:
    sound = encoder.found_library().library

    def quantize(
        number: int, rows: int, out: int, start: int, num_rows: int, width: int, weights: int | None
    ) -> int:
        weights = None if fault == "deaf" else weights
        written: int = sound.ggml_quantize_chunk(number, rows, out, start, num_rows, width, weights)
        block = np.ctypeslib.as_array((np.ctypeslib.ctypes.c_uint8 * written).from_address(out))
        if fault == "bytes" or (fault == "one type" and number == GGML_TYPES["IQ4_XS"].number):
            block[-1] ^= 1
        if fault == "garbage":
            block[:] = 0
        return written - (fault == "short")

    library = SimpleNamespace(
        ggml_quantize_chunk=quantize,
        ggml_row_size=lambda number, width: sound.ggml_row_size(number, width) + (fault == "size"),
        ggml_validate_row_data=sound.ggml_validate_row_data,
    )
    with pytest.raises(MachineError, match=said):
        self_test(library)  # type: ignore[arg-type]
