"""What a folder with a foreign model may hold: everything in it is looked at before a library opens any of it.

Files under their own names, links that stay inside, JSON objects of a sane size, safetensors headers that are sound, and a
config.json whose sizes are those of the weights: a library builds the model by config.json before it looks at the weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from myna.model.plain_files import parse_json, read_object, refuse, require_plain_file, shown
from myna.model.safetensors_header import TensorEntry, read_safetensors_header

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
READ_FILES = re.compile(
    r".*\.(json|safetensors|jinja|model)$"
)  # of a folder: everything else in it is never opened
PICKLED = re.compile(r".*\.(bin|pt|pth|ckpt|pkl|pickle)$|.*\.h5$|.*\.msgpack$")
READ = "a Hugging Face folder in fp32, bf16 or fp16, or a .gguf file, is read"
WHY_NO_PICKLE = "a pickle can run any program when it is opened, so Myna opens none"
MAX_TOKENIZER = 64_000_000  # bytes; the largest known has 34 MB
MAX_CONTEXT = 1 << 30
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
SIZES = (
    *(
        "hidden_size",
        "n_embd",
        "d_model",
        "vocab_size",
        "intermediate_size",
        "n_inner",
        "ffn_dim",
        "head_dim",
    ),
    *("num_attention_heads", "n_head", "num_heads", "num_key_value_heads", "num_kv_heads"),
    *("num_experts", "num_local_experts", "n_routed_experts"),
)
CONTEXTS = ("max_position_embeddings", "n_positions", "seq_length", "sliding_window")
MAY_BE_NONE = (*CONTEXTS, "num_experts", "num_local_experts", "n_routed_experts")  # 0: there are none
EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings)\.weight$")
LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d{1,6})\.")


def check_model_folder(folder: Path) -> None:
    """ModelError where a Hugging Face model folder is not one that can be read safely, or not one that is read at all."""
    if not (folder / "config.json").is_file():
        refuse(folder, "is no model folder: there is no config.json in it")
    check_entries(folder)
    if (folder / "adapter_config.json").is_file():
        cure = "move adapter_config.json out of it, or name the adapter's own folder"
        refuse(folder, "holds a model and an adapter_config.json: which of the two is meant?", cure)
    objects = {path.name: read_object(path) for path in _small_json(folder)}
    _refuse_code(folder, objects)
    _refuse_quantized(folder, objects["config.json"])
    tensors = _model_tensors(folder, objects)
    _check_dtypes(folder, tensors)
    _check_sizes(folder / "config.json", objects["config.json"], tensors)
    if (folder / "tokenizer.json").exists():
        _check_tokenizer(folder / "tokenizer.json", tensors)


def check_entries(folder: Path) -> None:
    """ModelError where a file of the folder that would be read is a link that leads out of it, or no plain file."""
    home = folder.resolve()
    homes = [home]
    if home.parent.name == "snapshots" and home.parent.parent.name.startswith(("models--", "datasets--")):
        homes.append(
            home.parent.parent / "blobs"
        )  # the hub's cache: each file of a snapshot is a link to its content
    for path in sorted(folder.iterdir()):
        if not READ_FILES.fullmatch(path.name):
            continue
        if path.is_symlink():
            try:
                target = path.resolve(strict=True)
            except (OSError, RuntimeError):
                refuse(path, "is a link that leads nowhere")
            if not any(target.is_relative_to(place) for place in homes):
                refuse(path, f"is a link out of its folder, to {target}", "put the file itself there")
        require_plain_file(path)


def refuse_pickles(folder: Path, wanted: str) -> None:
    """ModelError saying that `wanted` is missing, and why pickles beside it are no help."""
    pickled = sorted(path.name for path in folder.iterdir() if PICKLED.fullmatch(path.name))
    if not pickled:
        refuse(folder, f"there is no {wanted} in it")
    refuse(
        folder,
        f"its weights are pickled ({pickled[0]}): {WHY_NO_PICKLE}",
        "take the repository's *.safetensors, or have its author save it with save_pretrained(folder)",
    )


def _small_json(folder: Path) -> Iterator[Path]:
    names = (
        "config.json",
        "generation_config.json",
        INDEX,
        "tokenizer_config.json",
        "special_tokens_map.json",
    )
    return (folder / name for name in names if (folder / name).exists())


def _refuse_code(folder: Path, objects: Mapping[str, Mapping[str, Any]]) -> None:
    """Code of its own, which `trust_remote_code` would run; a config that names code for a model type that
    transformers itself knows is read without it."""
    if "transformers_weights" in objects["config.json"]:
        refuse(folder / "config.json", "names a weights file of its own (transformers_weights)")
    for name, value in objects.items():
        code = value.get("auto_map")
        if not code:
            continue
        if name == "config.json" and _is_known(value.get("model_type")):
            continue
        entry = next(iter(code.values()), None) if isinstance(code, dict) else code
        refuse(
            folder / name,
            f"needs code of its own (auto_map: {shown(entry)}), which trust_remote_code would run; Myna runs none",
            "choose a model that transformers knows by itself",
        )


def _is_known(model_type: Any) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return isinstance(model_type, str) and model_type in CONFIG_MAPPING_NAMES


def _refuse_quantized(folder: Path, config: Mapping[str, Any]) -> None:
    settings = config.get("quantization_config") or config.get("compression_config")
    if (folder / "quantize_config.json").exists():
        settings = settings or {"quant_method": "gptq"}
    if settings:
        method = settings.get("quant_method") if isinstance(settings, dict) else None
        kind = f"{method} " if isinstance(method, str) and len(method) < 40 else ""
        refuse(
            folder,
            f"its weights are {kind}quantized; {READ}",
            "name the model it was made from, or a .gguf of it",
        )


def _model_tensors(folder: Path, objects: Mapping[str, Mapping[str, Any]]) -> dict[str, TensorEntry]:
    """Every tensor of the model as the headers tell them."""
    if (folder / WEIGHTS).exists():
        return read_safetensors_header(folder / WEIGHTS)
    if INDEX not in objects:
        refuse_pickles(folder, f"{WEIGHTS} (or {INDEX})")
    index, shards = folder / INDEX, objects[INDEX].get("weight_map")
    if not isinstance(shards, dict) or not shards:
        refuse(index, "has no weight_map")
    if not isinstance(objects[INDEX].get("metadata"), dict):
        refuse(index, "has no metadata, without which transformers reads none", 'add "metadata": {} to it')
    found: dict[str, TensorEntry] = {}
    homes: dict[str, str] = {}
    for shard in sorted({str(name) for name in shards.values()}):
        if not re.fullmatch(r"[\w.-]+\.safetensors", shard) or shard.startswith("."):
            refuse(index, f"names a shard that is no file of its folder: {shown(shard)}")
        if not (folder / shard).exists():
            refuse(index, f"names the shard {shard}, which is missing", "fetch the model again, whole")
        for name, tensor in read_safetensors_header(folder / shard).items():
            if name in found:
                refuse(folder, f"tensor {shown(name)} is in {homes[name]} and in {shard}")
            found[name], homes[name] = tensor, shard
    for name, shard in shards.items():
        if homes.get(name) != shard:
            refuse(
                index, f"says that {shown(name)} is in {shown(shard)}; it is in {homes.get(name, 'no shard')}"
            )
    return found


def _check_dtypes(folder: Path, tensors: Mapping[str, TensorEntry]) -> None:
    if not tensors:
        refuse(folder, "holds no tensors")
    for name, tensor in tensors.items():
        whole = not tensor.dtype.startswith("F8") and tensor.dtype not in ("F4", "F6_E2M3", "F6_E3M2")
        if name.endswith(".qweight") or not whole or (name.endswith(".weight") and tensor.dtype[0] in "IUC"):
            refuse(folder, f"its weights are quantized ({shown(name)} is {tensor.dtype}); {READ}")


def _check_sizes(path: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> None:
    """Every size in config.json is one that the weights could have."""
    largest = max((max(tensor.shape, default=1) for tensor in tensors.values()), default=1)
    numbers = [int(found[1]) for name in tensors if (found := LAYER.search(name))]
    most = {key: max(numbers, default=-1) + 1 if numbers else largest for key in LAYERS}
    most |= dict.fromkeys(SIZES, largest) | dict.fromkeys(CONTEXTS, MAX_CONTEXT)
    for key, value in _walk(config):
        if key not in most or value is None:
            continue
        for size in value if isinstance(value, list) else [value]:
            if size is False and key == "sliding_window":
                continue
            if type(size) is not int or size < (0 if key in MAY_BE_NONE else 1):
                refuse(path, f"{key} is {shown(size)}, no size")
            if size > most[key]:
                what = (
                    "layers are in the weights" if key in LAYERS else "is the largest that fits the weights"
                )
                refuse(path, f"{key} is {size:,}; {most[key]:,} {what}")
    for name, tensor in tensors.items():
        if EMBEDDINGS.search(name) and "vocab_size" in config and "hidden_size" in config:
            wanted = (config["vocab_size"], config["hidden_size"])
            if len(tensor.shape) == 2 and tensor.shape[0] != wanted[0]:
                refuse(path, f"vocab_size is {wanted[0]:,}, {shown(name)} has the shape {list(tensor.shape)}")


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value of an object and of the objects in it."""
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from _walk(inner)
        else:
            yield key, inner


def _check_tokenizer(path: Path, tensors: Mapping[str, TensorEntry]) -> None:
    """A tokenizer.json is an object with a model, no token has two numbers or a number beyond the embeddings."""
    size = require_plain_file(path)
    if size > MAX_TOKENIZER:
        refuse(path, f"has {size:,} bytes; at most {MAX_TOKENIZER:,} are read of a tokenizer")
    value = parse_json(path, path.read_bytes(), "it")
    model = value.get("model")
    if not isinstance(model, dict):
        refuse(path, "is no tokenizer: it has no model")
    vocab, added = model.get("vocab"), value.get("added_tokens") or []
    ids = list(vocab.values()) if isinstance(vocab, dict) else list(range(len(vocab or [])))
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        refuse(path, "its added_tokens are no list of objects")
    numbers = ids + [token.get("id") for token in added]
    if not numbers or not all(type(number) is int and number >= 0 for number in numbers):
        refuse(path, "its vocabulary is empty, or has numbers that are none")
    if len(set(ids)) < len(ids):
        refuse(path, "two tokens of its vocabulary have the same number")
    rows = [tensor.shape[0] for name, tensor in tensors.items() if EMBEDDINGS.search(name) and tensor.shape]
    # added tokens may lie beyond: Gemma 3's image token in its text models, a [PAD] that nobody made room for
    named = {token.get("content") for token in added}
    own = [number for text, number in vocab.items() if text not in named] if isinstance(vocab, dict) else ids
    if rows and max(own, default=0) >= max(rows):
        refuse(path, f"has a token with the number {max(own):,}; the embeddings have {max(rows):,} rows")
