"""Our files against those of llama.cpp's own quantize tool (`llama_model_quantize`), made from the same source.

Types by its rules for architectures and depths that need no weights of their own; bytes on random models of real widths
and on the packaged model. `make test-oracle` builds llama-cpp-python and runs this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_gguf
from llama_oracle import Comparison, Floats, compare, random_importance, upstream_files
from safetensors.torch import load_file, save_file
from tiny_families import new_model
from tiny_tokenizers import write_family_tokenizer

from myna.export.gguf import write_gguf
from myna.export.gguf_file import new_writer, write_tensors
from myna.export.quantize import QUANT_TYPES, TensorInfo, choose_types
from myna.model.families import FAMILIES
from myna.model.sources import resolve_base

pytestmark = pytest.mark.oracle

UNWEIGHED = [name for name, kind in QUANT_TYPES.items() if not kind.needs_importance]


def types_for(weighed: bool) -> list[str]:
    return list(QUANT_TYPES) if weighed else UNWEIGHED


# --- layouts: the names, shapes and settings that the rules look at, in a file without a vocabulary


@dataclass(frozen=True)
class Layout:
    architecture: str
    layers: int
    heads: int = 8
    kv_heads: int = 2
    width: int = 256
    ffn: int = 512
    tied: bool = False
    fused: bool = False
    gated: bool = True
    extra: tuple[str, ...] = ()  # vectors of a block, by name


LAYOUTS = {
    "llama, 22 blocks": Layout("llama", 22, heads=8, kv_heads=1),
    "llama, 9 blocks, no sharing, tied": Layout("llama", 9, kv_heads=8, tied=True),
    "llama, 80 blocks": Layout("llama", 80),
    "llama, 80 blocks, no sharing": Layout("llama", 80, kv_heads=8),
    "qwen2, 80 blocks, no sharing": Layout("qwen2", 80, kv_heads=8),
    "qwen2, 24 blocks, narrow": Layout("qwen2", 24, width=288, ffn=96, heads=6, extra=("attn_q.bias",)),
    "qwen3, 36 blocks": Layout("qwen3", 36, kv_heads=4, extra=("attn_q_norm.weight", "attn_k_norm.weight")),
    "llama, no block divides": Layout("llama", 3, width=48, ffn=80),
    "llama, the heads of SmolLM2": Layout("llama", 30, heads=9, kv_heads=3, width=576, ffn=1536, tied=True),
    "gemma2, 26 blocks": Layout("gemma2", 26, tied=True, extra=("post_attention_norm.weight",)),
    "gemma3, 18 blocks": Layout("gemma3", 18, heads=4, kv_heads=1, tied=True),
    "phi3, 32 blocks": Layout("phi3", 32, kv_heads=8, fused=True, gated=False),
    "phi3, 40 blocks, 4 heads share": Layout("phi3", 40, fused=True, gated=False),
    "falcon, 32 blocks, one key": Layout("falcon", 32, kv_heads=1, fused=True, gated=False, tied=True),
    "falcon, 60 blocks": Layout("falcon", 60, fused=True, gated=False),
    "gptneox, 16 blocks": Layout(
        *("gptneox", 16), kv_heads=8, fused=True, gated=False, extra=("attn_qkv.bias", "ffn_down.bias")
    ),
}


def tensors_of(layout: Layout) -> list[TensorInfo]:
    """Real names and row widths, few rows. Of the rows only two ratios count: q to k, and a fused qkv to attn_output."""
    width, queries, keys = layout.width, 4 * layout.heads, 4 * layout.kv_heads
    shapes: dict[str, tuple[int, ...]] = {"ffn_up.weight": (2, width), "ffn_down.weight": (2, layout.ffn)}
    if layout.fused:
        shapes |= {"attn_qkv.weight": (queries + 2 * keys, width), "attn_output.weight": (2, queries)}
    else:
        shapes |= {
            f"attn_{x}.weight": (rows, width) for x, rows in zip("qkv", (queries, keys, keys), strict=True)
        }
        shapes |= {"attn_output.weight": (2, width)}
    if layout.gated:
        shapes["ffn_gate.weight"] = (2, width)
    shapes |= dict.fromkeys(("attn_norm.weight", *layout.extra), (width,))
    tensors = {"token_embd.weight": (7, width), "output_norm.weight": (width,)}
    tensors |= {} if layout.tied else {"output.weight": (7, width)}
    blocks = {f"blk.{i}.{name}": shape for i in range(layout.layers) for name, shape in shapes.items()}
    return [TensorInfo(name, shape) for name, shape in (tensors | blocks).items()]


def write_layout(
    path: Path, layout: Layout, file_type: str, importance: Mapping[str, Floats] | None = None
) -> None:
    """All that `llama_model_quantize` reads: the settings of the architecture, and random tensors."""
    infos = tensors_of(layout)
    random_ = np.random.default_rng(0)
    rows = {info.name: random_.standard_normal((1, *info.shape)[-2:], np.float32) for info in infos}
    types = choose_types(infos, file_type, layout.architecture, importance=importance)
    with new_writer(path, layout.architecture) as writer:
        writer.add_block_count(layout.layers)
        writer.add_context_length(128)
        writer.add_embedding_length(layout.width)
        writer.add_feed_forward_length(layout.ffn)
        writer.add_head_count(layout.heads)
        writer.add_head_count_kv(layout.kv_heads)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_layer_norm_eps(1e-5)
        writer.add_parallel_residual(True)
        writer.add_vocab_size(7)
        write_tensors(writer, infos, types, rows.__getitem__, importance=importance)


@pytest.mark.parametrize("weighed", [False, True], ids=["", "importance"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_is_quantized_as_upstream_does(name: str, weighed: bool, tmp_path: Path) -> None:
    source = tmp_path / "source.gguf"
    write_layout(source, LAYOUTS[name], "F32")
    importance = random_importance(source) if weighed else None
    for file_type, theirs in upstream_files(source, types_for(weighed), importance).items():
        ours = tmp_path / f"{file_type}.gguf"
        write_layout(ours, LAYOUTS[name], file_type, importance)
        assert_alike(file_type, compare(source, ours, theirs))


def assert_alike(file_type: str, found: Comparison) -> None:
    """Every tensor of upstream's type, and of its bytes or nearer to the source."""
    assert found.same_type == found.num_tensors and not found.worse, (file_type, found.differences[:5])


def test_upstream_refuses_q2_k_s_without_importance_too(tmp_path: Path) -> None:
    source = tmp_path / "source.gguf"
    write_layout(source, LAYOUTS["llama, 22 blocks"], "F32")
    with pytest.raises(AssertionError, match="requires an imatrix"):
        upstream_files(source, ["Q2_K_S"])


# --- models: transformers' folders written by us, width 512 and 1,024


def write_model(folder: Path, model_type: str, width: int, **changes: Any) -> Path:
    sizes = {
        "hidden_size": width,
        "intermediate_size": width * 3 // 2,
        "head_dim": 64,
        "num_attention_heads": width // 64,
        "num_key_value_heads": 2,
    }
    tiny_gguf.write_model(folder, model_type=model_type, **sizes | changes)
    tiny_gguf.write_tokenizer(folder)
    return folder


@pytest.mark.parametrize("weighed", [False, True], ids=["", "importance"])
@pytest.mark.parametrize("width", [64, 512, 1024])
def test_models_are_quantized_as_upstream_does(width: int, weighed: bool, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "llama", width)
    source = tmp_path / "source.gguf"
    write_gguf(folder, folder, source, "F32", name="random")
    compare_all(folder, source, weighed)


def compare_all(folder: Path, source: Path, weighed: bool, but: Sequence[str] = ()) -> None:
    """Each type of `folder` written by us, against upstream's from `source`, which we wrote of the same folder."""
    importance = random_importance(source) if weighed else None
    for file_type in (name for name in types_for(weighed) if name not in but):
        theirs = upstream_files(source, [file_type], importance)[file_type]
        ours = source.with_name(f"ours-{file_type}.gguf")
        write_gguf(folder, folder, ours, file_type, name="random", importance=importance)
        assert_alike(file_type, compare(source, ours, theirs))
        ours.unlink()
        theirs.unlink()


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if name not in ("llama", "mistral")])
def test_families_are_quantized_as_upstream_does(model_type: str, tmp_path: Path) -> None:
    """Models of transformers, 512 wide, with all that a family has: fused tensors, biases, four norms a block."""
    folder = tmp_path / "model"
    folder.mkdir()
    tokenizer = write_family_tokenizer(folder, "gemma2" if model_type == "gemma" else model_type)
    sizes: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8}
    if model_type == "phi3":  # the tiny one's long rope is as long as its head
        sizes["rope_parameters"] = {"rope_type": "default", "rope_theta": 500.0}
    new_model(folder, model_type, tokenizer.get_vocab_size(), **sizes)
    source = tmp_path / "source.gguf"
    write_gguf(folder, folder, source, "F32", name="random")
    compare_all(folder, source, weighed=True)


def test_from_halves_it_is_the_same(tmp_path: Path) -> None:
    """Upstream is mostly given a file of halves."""
    folder = write_model(tmp_path / "model", "llama", 512)
    weights = {name: rows.half() for name, rows in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors")
    source = tmp_path / "source.gguf"
    write_gguf(folder, folder, source, "F16", name="random")
    compare_all(folder, source, weighed=False, but=("F32",))  # upstream leaves halves and norms as they are


# Where importance changes types or is needed, and one of each kind of block.
WEIGHED = ("Q4_0", "Q4_K_M", "IQ4_XS", "Q3_K_M", "Q2_K_S")


@pytest.mark.slow
@pytest.mark.parametrize("weighed", [False, True], ids=["", "importance"])
def test_the_packaged_model_is_quantized_as_upstream_does(weighed: bool, tmp_path: Path) -> None:
    folder = resolve_base("smollm2-135m").folder
    source = tmp_path / "source.gguf"
    write_gguf(folder, folder, source, "F32", name="packaged")
    compare_all(
        folder, source, weighed, but=[name for name in QUANT_TYPES if weighed and name not in WEIGHED]
    )
