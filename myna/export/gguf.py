"""write_gguf: a merged model (HF layout) as the one file that llama.cpp runs.

Keys and tensor layout are those of llama.cpp's converter (`conversion/base.py`, `conversion/llama.py`).
Tensors are read, turned and written one by one, so memory holds one tensor and not a model.

    R rows · C columns · H heads · D values a head
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from myna.errors import MachineError, ModelError
from myna.export.encoder import Floats, encode
from myna.export.quantize import TensorInfo, choose_types, quant_type, tensor_bytes
from myna.export.vocabulary import add_vocabulary, read_vocabulary
from myna.model.families import IGNORED, TOP, Family, family_of, gguf_name
from myna.run import file_sha256, read_json, require_room, sync_dir, sync_file

# What transformers assumes where a yarn setting is left out, and llama.cpp always does.
_YARN_DEFAULTS = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "attention_factor": None}
_ROPE_FREQS = "rope_freqs.weight"
_NEEDED = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("max_position_embeddings", "rms_norm_eps", "vocab_size"),
)


@dataclass(frozen=True)
class GgufSummary:
    """What was written. `types`: how many tensors of each ggml type, for a Q4_K_M is seldom all Q4_K."""

    path: Path
    bytes: int
    sha256: str
    types: dict[str, int]
    num_tensors: int


@dataclass(frozen=True)
class Rope:
    """A model's rotary positions: transformers' `rope_parameters`, older spellings resolved."""

    kind: str
    theta: float
    settings: Mapping[str, Any]


def write_gguf(
    model_dir: Path,
    tokenizer_dir: Path,
    gguf_path: Path,
    file_type: str,
    *,
    name: str,
    progress: Callable[[int, int], None] | None = None,
) -> GgufSummary:
    """Writes `model_dir` (config.json, safetensors in fp32, bf16 or fp16) with its tokenizer as `gguf_path`.

    `name` is what chat programs show; `progress` is given bytes done and bytes in all. The file appears
    under its name when it is whole. UsageError: an unknown file type. ModelError: a family, rope, tokenizer
    or weight that llama.cpp would not run alike. MachineError: no room, no encoder.
    """
    quant_type(file_type)
    config = read_json(model_dir / "config.json")
    where = str(model_dir / "config.json")
    family = family_of(config, where)
    _check_config(config, where)
    rope = read_rope(config, family, where)
    vocabulary = read_vocabulary(tokenizer_dir, config)
    with _open_tensors(model_dir) as handles:
        sources = _plan(handles, family, config, model_dir)
        shapes = {
            tensor: tuple(handles[source].get_slice(source).get_shape()) for tensor, source in sources.items()
        }
        if shapes["token_embd.weight"][0] != config["vocab_size"]:
            raise ModelError("vocab_size is not the number of embeddings", where=where)
        if rope.kind == "llama3":
            shapes[_ROPE_FREQS] = (head_dim(config) // 2,)
        infos = [TensorInfo(tensor, shape) for tensor, shape in shapes.items()]
        types = choose_types(infos, file_type, family.architecture)
        num_bytes = sum(tensor_bytes(info, types[info.name]) for info in infos)
        require_room(gguf_path, num_bytes + _overhead(tokenizer_dir), f"the {file_type} file")

        def tensor_rows(tensor: str) -> Floats:
            if tensor == _ROPE_FREQS:
                return llama3_factors(rope, head_dim(config))[None]
            rows = _read_rows(handles[sources[tensor]], sources[tensor], model_dir)
            return _permuted(rows, _num_heads(config, tensor)) if family.permuted else rows

        with _new_writer(gguf_path, family.architecture) as writer:
            _add_model_keys(writer, config, rope, name, sum(int(np.prod(info.shape)) for info in infos))
            writer.add_file_type(quant_type(file_type).number)
            add_vocabulary(writer, vocabulary)
            _write_tensors(writer, infos, types, tensor_rows, progress)
    counts = {kind: list(types.values()).count(kind) for kind in sorted(set(types.values()))}
    return GgufSummary(gguf_path, gguf_path.stat().st_size, file_sha256(gguf_path), counts, len(infos))


def read_rope(config: Mapping[str, Any], family: Family, where: str) -> Rope:
    """The rope of a config; ModelError naming a scaling that the family's architecture in llama.cpp lacks."""
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = settings.get("rope_type", settings.get("type", "default"))
    if any(isinstance(value, Mapping) for value in settings.values()):
        kind = "one for each kind of layer"
    elif settings.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        kind = "over a part of each head"
    elif kind == "yarn":
        odd = [key for key, value in _YARN_DEFAULTS.items() if settings.get(key, value) != value]
        odd += [key for key in ("mscale", "mscale_all_dim") if settings.get(key)]
        kind = f"yarn with {' and '.join(odd)}" if odd else kind
    if kind not in family.rope_types:
        known = ", ".join(family.rope_types)
        raise ModelError(
            f"rope {kind!r} cannot be written for {family.architecture}; known: {known}", where=where
        )
    return Rope(kind, float(settings.get("rope_theta", config.get("rope_theta", 10000.0))), settings)


def llama3_factors(rope: Rope, num_dims: int) -> Floats:
    """[D/2]: what each rotary frequency is divided by, as transformers' `_compute_llama3_parameters` has
    it."""
    wavelengths = 2 * np.pi * rope.theta ** (np.arange(0, num_dims, 2) / num_dims)
    factor, low, high = (
        float(rope.settings[key]) for key in ("factor", "low_freq_factor", "high_freq_factor")
    )
    turns = float(rope.settings["original_max_position_embeddings"]) / wavelengths
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    factors: Floats = (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
    return factors


def head_dim(config: Mapping[str, Any]) -> int:
    """D: values of one attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _check_config(config: Mapping[str, Any], where: str) -> None:
    """ModelError where a config lacks a size or asks for what these architectures of llama.cpp do not do."""
    missing = [key for key in _NEEDED if config.get(key) is None]
    if missing:
        raise ModelError(f"the config has no {', '.join(missing)}", where=where)
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ModelError(
            f"hidden_act {activation!r}: llama.cpp runs these families with silu only", where=where
        )


def _add_model_keys(
    writer: Any, config: Mapping[str, Any], rope: Rope, name: str, num_parameters: int
) -> None:
    from gguf import GGML_QUANT_VERSION, RopeScalingType, size_label

    num_heads = int(config["num_attention_heads"])
    writer.add_type("model")
    writer.add_name(name)
    writer.add_size_label(size_label(num_parameters, 0, 0, 0))
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_context_length(_context_length(config))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(num_heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or num_heads))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_vocab_size(int(config["vocab_size"]))
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_rope_freq_base(rope.theta)
    # Not only where it differs from hidden_size / heads, so that a reader need not know the family's own default.
    if config.get("head_dim") is not None:
        writer.add_key_length(head_dim(config))
        writer.add_value_length(head_dim(config))
    if rope.kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(rope.kind))
        writer.add_rope_scaling_factor(float(rope.settings["factor"]))
    if rope.kind == "yarn":
        original = rope.settings.get("original_max_position_embeddings") or config["max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(int(original))


def _context_length(config: Mapping[str, Any]) -> int:
    """Tokens the file is good for: with a sliding window, as many as it spans.

    In these architectures llama.cpp looks back over all tokens, which is the same only up to there.
    """
    window = config.get("sliding_window")
    windowed = config.get("use_sliding_window", config["model_type"] == "mistral")
    return min(int(config["max_position_embeddings"]), int(window) if window and windowed else 1 << 31)


@contextlib.contextmanager
def _open_tensors(model_dir: Path) -> Iterator[dict[str, Any]]:
    """The open safetensors file of each tensor, by its name in transformers."""
    from safetensors import SafetensorError, safe_open

    index_path = model_dir / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index_path.is_file():
        names = sorted(set(read_json(index_path)["weight_map"].values()))
    with contextlib.ExitStack() as stack:
        handles: dict[str, Any] = {}
        for name in names:
            try:
                handle = stack.enter_context(safe_open(model_dir / name, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise ModelError(f"cannot be read: {error}", where=str(model_dir / name)) from error
            handles.update(dict.fromkeys(handle.keys(), handle))
        yield handles


def _plan(
    handles: Mapping[str, Any], family: Family, config: Mapping[str, Any], model_dir: Path
) -> dict[str, str]:
    """GGUF name → transformers' name, in the order of the file; ModelError for tensors missing or unknown."""
    tied = config.get("tie_word_embeddings", "lm_head.weight" not in handles)
    layers = [f"model.layers.{layer}." for layer in range(int(config["num_hidden_layers"]))]
    first, *last = [name for name in TOP if not (tied and name == "lm_head.weight")]
    wanted = [first, *(layer + tensor for layer in layers for tensor in family.tensors), *last]
    optional = [layer + tensor for layer in layers for tensor in family.optional]
    known = {*wanted, *optional, *TOP}
    missing = [name for name in wanted if name not in handles]
    unknown = [name for name in handles if name not in known and not IGNORED.search(name)]
    if missing or unknown:
        lacks = f"lacks {', '.join(missing[:3])}" if missing else ""
        extra = (
            f"has {', '.join(unknown[:3])}, which {family.architecture} has no place for" if unknown else ""
        )
        raise ModelError(f"the model {' and '.join(filter(None, (lacks, extra)))}", where=str(model_dir))
    names = [*wanted, *(name for name in optional if name in handles)]
    return {gguf_name(family, name) or name: name for name in names}


def _read_rows(handle: Any, name: str, model_dir: Path) -> Floats:
    """One tensor as float32 [R, C]; a vector is one row."""
    import torch

    tensor = handle.get_tensor(name)
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ModelError(
            f"{name} is {tensor.dtype}; float32, bfloat16 and float16 can be written", where=str(model_dir)
        )
    rows: Floats = tensor.reshape(-1, tensor.shape[-1]).to(torch.float32).numpy()
    return rows


def _num_heads(config: Mapping[str, Any], tensor: str) -> int | None:
    """The heads whose rows a `permuted` family wants turned: those of q and of k."""
    if ".attn_q." in tensor:
        return int(config["num_attention_heads"])
    if ".attn_k." in tensor:
        return int(config.get("num_key_value_heads") or config["num_attention_heads"])
    return None


def _permuted(rows_RC: Floats, num_heads: int | None) -> Floats:
    """Each head's rows from halves (x0, x1…, y0, y1…) to neighbours (x0, y0, x1, y1…); a bias alike."""
    if num_heads is None:
        return rows_RC
    shape = rows_RC.shape
    halves = rows_RC.reshape(num_heads, 2, -1, shape[1] if shape[0] > 1 else 1)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(shape)


def _overhead(tokenizer_dir: Path) -> int:
    """Bytes for all that is no tensor: in GGUF the tokenizer takes about the room of its JSON."""
    return (tokenizer_dir / "tokenizer.json").stat().st_size + (1 << 20)


@contextlib.contextmanager
def _new_writer(path: Path, architecture: str) -> Iterator[Any]:
    """A GGUFWriter on a file beside `path`, which takes the name when all went well and is gone otherwise."""
    from gguf import GGUFWriter

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    writer = GGUFWriter(temporary, architecture)
    try:
        yield writer
        writer.close()
        sync_file(temporary)
        os.replace(temporary, path)
        sync_dir(path.parent)
    except OSError as error:
        raise MachineError(
            f"could not be written: {error}", where=str(path), help="look at the free room"
        ) from error
    finally:
        writer.close()
        temporary.unlink(missing_ok=True)


def _write_tensors(
    writer: Any,
    infos: list[TensorInfo],
    types: Mapping[str, str],
    tensor_rows: Callable[[str], Floats],
    progress: Callable[[int, int], None] | None,
) -> None:
    """The header, then tensor by tensor as `tensor_rows` gives them."""
    from gguf import GGMLQuantizationType

    sizes = {info.name: tensor_bytes(info, types[info.name]) for info in infos}
    for info in infos:
        kind = GGMLQuantizationType[types[info.name]]
        writer.add_tensor_info(info.name, info.shape, np.dtype(np.float32), sizes[info.name], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    done, total = 0, sum(sizes.values())
    for info in infos:
        try:
            blocks = encode(tensor_rows(info.name), types[info.name])
        except ModelError as error:
            raise ModelError(f"{info.name}: {error.message}", where=error.where, help=error.help) from error
        writer.write_tensor_data(blocks)
        done += sizes[info.name]
        if progress is not None:
            progress(done, total)
