"""The encoder against gguf and torch; the mixtures against counts derived by hand from upstream's rules."""

from __future__ import annotations

import _ctypes
import random
import tomllib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from myna.errors import MachineError, ModelError, UsageError
from myna.export import encoder
from myna.export.encoder import GGML_TYPES, encode, load_library, probe_row, row_bytes, self_test
from myna.export.quantize import QUANT_TYPES, TensorInfo, choose_types, tensor_bytes

QUANTIZED = [name for name, kind in GGML_TYPES.items() if kind.block_size > 1]


def rows_of(num_rows: int, num_columns: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal((num_rows, num_columns), np.float32)


# --- the encoder


@pytest.mark.parametrize("name", GGML_TYPES)
def test_type_numbers_and_sizes_are_ggufs(name: str) -> None:
    kind = gguf.GGMLQuantizationType[name]
    assert GGML_TYPES[name].number == kind.value
    assert (GGML_TYPES[name].block_size, GGML_TYPES[name].block_bytes) == gguf.GGML_QUANT_SIZES[kind]


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0", "Q5_1", "Q8_0"])
def test_simple_types_have_ggufs_bytes(name: str) -> None:
    rows = rows_of(9, 96)
    np.testing.assert_array_equal(
        encode(rows, name), gguf.quants.quantize(rows, gguf.GGMLQuantizationType[name])
    )


@pytest.mark.parametrize(
    ("name", "bound"), [("Q4_K", 0.09), ("Q5_K", 0.045), ("Q6_K", 0.025), ("Q5_1", 0.05), ("Q8_0", 0.008)]
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
    row = probe_row()
    for name in QUANTIZED:
        for _ in range(20):
            noise = random_.uniform(-3e-7, 3e-7, row.shape)
            noisy = (row * (1 + noise)).astype(np.float32)
            np.testing.assert_array_equal(encode(noisy, name), encode(row, name))


@pytest.mark.parametrize(
    ("fault", "said"),
    [("size", "takes"), ("short", "wrote"), ("bytes", "other bytes"), ("garbage", "relative error")],
)
def test_a_library_that_answers_wrongly_is_refused(fault: str, said: str) -> None:
    sound = encoder._library()

    def quantize(
        number: int, rows: int, out: int, start: int, num_rows: int, width: int, weights: None
    ) -> int:
        written: int = sound.ggml_quantize_chunk(number, rows, out, start, num_rows, width, weights)
        block = np.ctypeslib.as_array((np.ctypeslib.ctypes.c_uint8 * written).from_address(out))
        if fault == "bytes":
            block[-1] ^= 1
        if fault == "garbage":
            block[:] = 0
        return written - (fault == "short")

    library = SimpleNamespace(
        ggml_quantize_chunk=quantize,
        ggml_row_size=lambda number, width: sound.ggml_row_size(number, width) + (fault == "size"),
        ggml_validate_row_data=sound.ggml_validate_row_data,
    )
    with pytest.raises(MachineError, match=said) as refused:
        self_test(library)  # type: ignore[arg-type]
    assert refused.value.help and "pip install" in refused.value.help


def test_a_library_without_the_encoder_names_the_cure() -> None:
    with pytest.raises(MachineError, match="cannot quantize") as refused:
        load_library(Path(_ctypes.__file__))
    assert refused.value.help and "F16" in refused.value.help


def test_the_release_named_in_errors_is_the_one_installed() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extras = project.get("optional-dependencies", {}).values()
    assert encoder.XLLAMACPP in [*project["dependencies"], *(name for extra in extras for name in extra)]


# --- the mixtures


def model(
    layers: int, width: int, ffn: int, kv: int, vocab: int = 32000, tied: bool = False
) -> list[TensorInfo]:
    tensors = [TensorInfo("token_embd.weight", (vocab, width)), TensorInfo("output_norm.weight", (width,))]
    tensors += [] if tied else [TensorInfo("output.weight", (vocab, width))]
    for layer in range(layers):
        shapes = {
            "attn_norm": (width,),
            "attn_q": (width, width),
            "attn_k": (kv, width),
            "attn_v": (kv, width),
            "attn_output": (width, width),
            "ffn_norm": (width,),
            "ffn_gate": (ffn, width),
            "ffn_up": (ffn, width),
            "ffn_down": (width, ffn),
        }
        tensors += [TensorInfo(f"blk.{layer}.{name}.weight", shape) for name, shape in shapes.items()]
    return tensors


SMOLLM2 = model(30, 576, 1536, 192, vocab=49152, tied=True)
TINYLLAMA = model(22, 2048, 5632, 256)


def layers_with(types: dict[str, str], tensor: str, ggml_type: str) -> list[int]:
    return [layer for layer in range(80) if types.get(f"blk.{layer}.{tensor}.weight") == ggml_type]


def test_smollm2_as_q4_k_m_is_mostly_q5_0() -> None:
    """576 is no multiple of 256, the 1,536 of ffn_down is. An eighth of 30 is 3; the last begins at 26."""
    types = choose_types(SMOLLM2, "Q4_K_M", "llama")
    better = [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29]
    assert Counter(types.values()) == {"F32": 61, "Q5_0": 166, "Q4_K": 16, "Q6_K": 14, "Q8_0": 15}
    assert types["token_embd.weight"] == "Q8_0"  # the head too, as Q6_K, which 576 turns into Q8_0
    assert layers_with(types, "ffn_down", "Q6_K") == better
    assert layers_with(types, "attn_v", "Q8_0") == better
    assert types["blk.0.attn_q.weight"] == "Q5_0"


def test_tinyllama_as_q4_k_m() -> None:
    """22 blocks: 2 first, 3 last, every third from block 4 on. Upstream's own file has 135 Q4_K, 21 Q6_K."""
    types = choose_types(TINYLLAMA, "Q4_K_M", "llama")
    better = [0, 1, 4, 7, 10, 13, 16, 19, 20, 21]
    assert Counter(types.values()) == {"F32": 45, "Q4_K": 135, "Q6_K": 21}
    assert types["output.weight"] == "Q6_K" and types["token_embd.weight"] == "Q4_K"
    assert layers_with(types, "ffn_down", "Q6_K") == layers_with(types, "attn_v", "Q6_K") == better


@pytest.mark.parametrize(
    ("file_type", "counts"),
    [
        ("F32", {"F32": 201}),
        ("F16", {"F16": 156, "F32": 45}),
        ("BF16", {"BF16": 156, "F32": 45}),
        ("Q8_0", {"Q8_0": 156, "F32": 45}),
        ("Q6_K", {"Q6_K": 156, "F32": 45}),
        ("Q5_K_M", {"Q5_K": 135, "Q6_K": 21, "F32": 45}),
        ("Q5_K_S", {"Q5_K": 155, "Q6_K": 1, "F32": 45}),
        ("Q4_K_S", {"Q4_K": 149, "Q5_K": 6, "Q6_K": 1, "F32": 45}),  # attn_v of 4 blocks, ffn_down of 2
        ("Q4_0", {"Q4_0": 155, "Q6_K": 1, "F32": 45}),
    ],
)
def test_every_mixture_of_an_untied_model(file_type: str, counts: dict[str, int]) -> None:
    assert Counter(choose_types(TINYLLAMA, file_type, "llama").values()) == counts


def test_q4_k_s_favours_the_first_blocks() -> None:
    types = choose_types(TINYLLAMA, "Q4_K_S", "llama")
    assert layers_with(types, "attn_v", "Q5_K") == [0, 1, 2, 3]
    assert layers_with(types, "ffn_down", "Q5_K") == [0, 1]


@pytest.mark.parametrize(
    ("file_type", "head", "body"),
    [
        ("Q4_0", "Q8_0", "Q4_0"),
        ("Q6_K", "Q8_0", "Q8_0"),
        ("Q5_K_M", "Q8_0", "Q5_1"),
        ("Q8_0", "Q8_0", "Q8_0"),
    ],
)
def test_narrow_tied_models(file_type: str, head: str, body: str) -> None:
    types = choose_types(SMOLLM2, file_type, "llama")
    assert (types["token_embd.weight"], types["blk.9.attn_q.weight"]) == (head, body)


def test_embeddings_of_an_untied_narrow_model_are_no_head() -> None:
    types = choose_types(model(2, 576, 1536, 192), "Q4_K_M", "llama")
    assert (types["token_embd.weight"], types["output.weight"]) == ("Q5_0", "Q8_0")


def test_the_order_of_the_tensors_changes_nothing() -> None:
    shuffled = list(TINYLLAMA)
    random.Random(0).shuffle(shuffled)
    assert choose_types(shuffled, "Q4_K_M", "llama") == choose_types(TINYLLAMA, "Q4_K_M", "llama")
    assert list(choose_types(shuffled, "Q4_K_M", "llama")) == [tensor.name for tensor in shuffled]


@pytest.mark.parametrize(
    ("architecture", "kv", "bumped"),
    [("llama", 1024, "Q5_K"), ("llama", 8192, "Q4_K"), ("qwen2", 8192, "Q5_K")],
)
def test_seventy_billions_give_small_attn_v_more(architecture: str, kv: int, bumped: str) -> None:
    types = choose_types(model(80, 8192, 28672, kv), "Q4_K_M", architecture)
    assert types["blk.10.attn_v.weight"] == bumped  # (10 - 10) % 3 is 0: not among the better ones
    assert types["blk.12.attn_v.weight"] == "Q6_K"


def test_widths_that_no_block_divides() -> None:
    types = choose_types(model(2, 64, 80, 64), "Q4_K_M", "llama")
    assert types["blk.0.ffn_down.weight"] == "F16"
    assert types["blk.0.attn_q.weight"] == "Q5_0"
    with pytest.raises(ModelError, match=r"blk\.0\.ffn_down\.weight.*80"):
        choose_types(model(2, 64, 80, 64), "Q8_0", "llama")
    with pytest.raises(
        ModelError, match=r"output\.weight.*48"
    ):  # the head falls back to Q8_0, and that to none
        choose_types(model(2, 48, 64, 64), "Q4_K_M", "llama")


def test_biases_norms_and_single_rows_stay_f32() -> None:
    kept = [
        TensorInfo("blk.0.attn_q.bias", (256,)),
        TensorInfo("blk.0.attn_q_norm.weight", (4, 256)),
        TensorInfo("blk.0.attn_k.weight", (1, 256)),
        TensorInfo("rope_freqs.weight", (32,)),
    ]
    assert set(choose_types(kept, "Q8_0", "qwen3").values()) == {"F32"}


def test_an_unknown_file_type_names_the_known() -> None:
    with pytest.raises(UsageError, match="Q4_K") as refused:
        choose_types(SMOLLM2, "Q4_K", "llama")
    assert refused.value.help and all(name in refused.value.help for name in QUANT_TYPES)


@pytest.mark.parametrize("name", QUANT_TYPES)
def test_file_type_numbers_are_ggufs(name: str) -> None:
    upstream = {
        kind.name.removeprefix("MOSTLY_").removeprefix("ALL_"): kind.value for kind in gguf.LlamaFileType
    }
    assert QUANT_TYPES[name].number == upstream[name]


def test_bytes_of_a_tensor() -> None:
    assert tensor_bytes(TensorInfo("x.weight", (3, 512)), "Q4_K") == 3 * 2 * 144
    assert tensor_bytes(TensorInfo("x.bias", (5,)), "F32") == 20
