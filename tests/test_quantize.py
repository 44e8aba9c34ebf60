"""The mixtures: which type each tensor gets, against counts derived by hand from upstream's rules."""

from __future__ import annotations

import random
from collections import Counter

import gguf
import pytest

from myna.errors import UsageError
from myna.export.quantize import QUANT_TYPES, TensorInfo, choose_types, tensor_bytes


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
        ("Q5_1", {"Q5_1": 155, "Q6_K": 1, "F32": 45}),
        ("Q5_0", {"Q5_0": 155, "Q6_K": 1, "F32": 45}),
        ("Q4_1", {"Q4_1": 155, "Q6_K": 1, "F32": 45}),
        ("Q4_0", {"Q4_0": 155, "Q6_K": 1, "F32": 45}),
        ("IQ4_NL", {"IQ4_NL": 131, "Q5_K": 24, "Q6_K": 1, "F32": 45}),  # every attn_v, ffn_down of 2
        ("IQ4_XS", {"IQ4_XS": 131, "Q5_K": 24, "Q6_K": 1, "F32": 45}),
        ("Q3_K_L", {"Q3_K": 89, "Q5_K": 66, "Q6_K": 1, "F32": 45}),  # attn_v, attn_output, ffn_down
        ("Q3_K_M", {"Q3_K": 89, "Q4_K": 63, "Q5_K": 3, "Q6_K": 1, "F32": 45}),  # attn_v of 2, ffn_down of 1
        ("Q3_K_S", {"Q3_K": 155, "Q6_K": 1, "F32": 45}),
        ("Q2_K", {"Q2_K": 89, "Q3_K": 44, "Q4_K": 22, "Q6_K": 1, "F32": 45}),
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
    for file_type in ("Q8_0", "Q4_0", "Q5_1", "IQ4_NL"):
        assert choose_types(model(2, 64, 80, 64), file_type, "llama")["blk.0.ffn_down.weight"] == "F16"
    types = choose_types(model(2, 48, 64, 64), "Q4_K_M", "llama")
    assert types["output.weight"] == "F16"  # the head falls back to Q8_0, and that to what takes any width


@pytest.mark.parametrize(
    ("file_type", "body"),
    [("Q2_K", "Q4_0"), ("Q3_K_S", "Q4_0"), ("IQ4_XS", "IQ4_NL"), ("IQ4_NL", "IQ4_NL"), ("Q4_1", "Q4_1")],
)
def test_what_small_types_fall_back_to(file_type: str, body: str) -> None:
    assert choose_types(SMOLLM2, file_type, "llama")["blk.9.attn_q.weight"] == body


def test_importance_changes_the_first_ffn_downs() -> None:
    """Q4_0 and Q5_0 get a safer type there, the IQ4 types need none any more."""
    weighed = {tensor.name for tensor in TINYLLAMA}
    for file_type, plain, changed in [
        ("Q4_0", "Q4_0", "Q4_1"),
        ("Q5_0", "Q5_0", "Q5_1"),
        ("IQ4_XS", "Q5_K", "IQ4_XS"),
        ("IQ4_NL", "Q5_K", "IQ4_NL"),
    ]:
        without = choose_types(TINYLLAMA, file_type, "llama")
        with_importance = choose_types(TINYLLAMA, file_type, "llama", importance=weighed)
        changes = {name for name in without if without[name] != with_importance[name]}
        assert changes == {f"blk.{i}.ffn_down.weight" for i in (0, 1)}
        assert {without[name] for name in changes} == {plain}
        assert {with_importance[name] for name in changes} == {changed}


def test_q2_k_s_needs_importance_for_each_of_its_tensors() -> None:
    blocks = {tensor.name for tensor in TINYLLAMA if tensor.name.startswith("blk.")}
    types = choose_types(TINYLLAMA, "Q2_K_S", "llama", importance=blocks)
    assert Counter(types.values()) == {"F32": 45, "Q2_K": 131, "Q4_K": 24, "Q6_K": 1}
    for importance in (None, blocks - {"blk.7.ffn_up.weight"}):
        with pytest.raises(UsageError, match="importance") as refused:
            choose_types(TINYLLAMA, "Q2_K_S", "llama", importance=importance)
        assert refused.value.help and "export.importance" in refused.value.help
    assert "blk.7.ffn_up.weight" in refused.value.message


def fused(architecture: str, queries: int, keys: int, layers: int = 32) -> dict[str, str]:
    """Types of a Q4_K_M, Q3_K_M or Q2_K with attn_qkv, by `file_type:tensor`."""
    shapes = {
        "attn_qkv": (64 * (queries + 2 * keys), 2048),
        "attn_output": (2048, 64 * queries),
        "ffn_up": (8192, 2048),
        "ffn_down": (2048, 8192),
    }
    tensors = [TensorInfo("token_embd.weight", (32000, 2048))]
    tensors += [
        TensorInfo(f"blk.{layer}.{name}.weight", shape)
        for layer in range(layers)
        for name, shape in shapes.items()
    ]
    found = {}
    for file_type in ("Q4_K_M", "Q3_K_M", "Q2_K"):
        for name, kind in choose_types(tensors, file_type, architecture).items():
            found[f"{file_type}:{name.removesuffix('.weight')}"] = kind
    return found


def test_a_fused_qkv_is_worth_what_its_values_are() -> None:
    found = fused("phi3", 32, 32)
    assert [found[f"Q4_K_M:blk.{i}.attn_qkv"] for i in (0, 4, 5, 6, 31)] == [
        "Q6_K",
        "Q4_K",
        "Q4_K",
        "Q6_K",
        "Q6_K",
    ]
    assert [found[f"Q3_K_M:blk.{i}.attn_qkv"] for i in (0, 1, 2)] == ["Q5_K", "Q5_K", "Q4_K"]
    assert found["Q2_K:blk.9.attn_qkv"] == "Q3_K"  # no head shares its values with another
    assert fused("phi3", 32, 8)["Q2_K:blk.9.attn_qkv"] == "Q4_K"  # four do
    assert fused("phi3", 30, 10)["Q2_K:blk.9.attn_qkv"] == "Q3_K"


def test_falcon_has_rules_of_its_own() -> None:
    found = fused("falcon", 32, 1)
    downs = [found[f"Q4_K_M:blk.{i}.ffn_down"] for i in (0, 1, 2, 3, 4, 6, 31)]
    assert downs == ["Q6_K", "Q6_K", "Q5_K", "Q5_K", "Q4_K", "Q5_K", "Q5_K"]
    assert [found[f"Q3_K_M:blk.{i}.ffn_down"] for i in (1, 2, 4)] == ["Q5_K", "Q4_K", "Q3_K"]
    assert found["Q3_K_M:blk.0.attn_output"] == "Q3_K" and found["Q2_K:blk.0.attn_output"] == "Q2_K"
    assert found["Q4_K_M:token_embd"] == "Q8_0"


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
