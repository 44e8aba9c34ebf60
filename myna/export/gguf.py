"""write_gguf: a merged model (HF layout) as the one file that llama.cpp runs.

Keys and tensor layout are those of llama.cpp's converter (`conversion/*.py`).
Tensors are read, turned and written one by one, so memory holds one tensor and not a model.

    R rows · C columns
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from myna.errors import ModelError
from myna.export.encoder import Floats
from myna.export.gguf_file import new_writer, write_tensors
from myna.export.model_keys import add_model_keys, read_model_config
from myna.export.quantize import TensorInfo, choose_types, quant_type, tensor_bytes
from myna.export.rope import Rope, read_rope, rope_tensors
from myna.export.vocabulary import add_vocabulary, read_vocabulary, shown_name
from myna.export.weights import Weights, open_weights
from myna.model.families import HEADS, IGNORED, Family, block_tensors, gguf_name, num_kv_heads
from myna.run import file_sha256, require_room


@dataclass(frozen=True)
class GgufSummary:
    """What was written. `types`: how many tensors of each ggml type, for a Q4_K_M is seldom all Q4_K."""

    path: Path
    bytes: int
    sha256: str
    types: dict[str, int]
    num_tensors: int


def write_gguf(
    model_dir: Path,
    tokenizer_dir: Path,
    gguf_path: Path,
    file_type: str,
    *,
    name: str,
    weights: Weights | None = None,
    importance: Mapping[str, Floats] | None = None,
    keys: Mapping[str, str | int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> GgufSummary:
    """Writes `model_dir` (config.json, safetensors in fp32, bf16 or fp16) with its tokenizer as `gguf_path`.

    `name` is what chat programs show; `weights` stand in for the folder's own (base + adapter, say); `importance`
    has a weight for each column [C] of a tensor, by GGUF's name; `progress` is given bytes done and bytes in all.
    The file appears under its name when it is whole. UsageError: an unknown file type. ModelError: a family, rope,
    tokenizer or weight that llama.cpp would not run alike. MachineError: no room, no encoder.
    """
    quant_type(file_type)
    with open_source(model_dir, weights) as source:
        vocabulary = read_vocabulary(tokenizer_dir, source.config)
        architecture = source.family.architecture
        types = choose_types(source.infos, file_type, architecture, importance=importance)
        num_bytes = sum(tensor_bytes(info, types[info.name]) for info in source.infos)
        require_room(gguf_path, num_bytes + _overhead(tokenizer_dir), f"the {file_type} file")
        with new_writer(gguf_path, architecture) as writer:
            shown = shown_name(name, vocabulary)
            add_model_keys(writer, source.config, source.family, source.rope, shown, source.num_parameters)
            writer.add_file_type(quant_type(file_type).number)
            add_vocabulary(writer, vocabulary)
            for key, value in (keys or {}).items():
                writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)
            write_tensors(writer, source.infos, types, source.rows, importance=importance, progress=progress)
    counts = {kind: list(types.values()).count(kind) for kind in sorted(set(types.values()))}
    return GgufSummary(gguf_path, gguf_path.stat().st_size, file_sha256(gguf_path), counts, len(types))


@dataclass(frozen=True)
class Source:
    """A model as GGUF has it: its tensors by GGUF's names, in the order of the file, read one at a time."""

    config: Mapping[str, Any]
    family: Family
    rope: Rope
    infos: list[TensorInfo]
    names: Mapping[str, str]
    made: Mapping[str, Floats]
    weights: Weights

    @property
    def num_parameters(self) -> int:
        return sum(int(np.prod(info.shape)) for info in self.infos)

    def rows(self, tensor: str) -> Floats:
        """[R, C] float32 of a tensor by GGUF's name, its rows where llama.cpp wants them."""
        if tensor in self.made:
            return self.made[tensor]
        rows_RC = turned(self.family, self.config, tensor, self.weights.rows(self.names[tensor]))
        offset = np.float32(self.family.norm_offset)
        return rows_RC + offset if tensor.endswith("norm.weight") else rows_RC


@contextlib.contextmanager
def open_source(model_dir: Path, weights: Weights | None = None) -> Iterator[Source]:
    """The model of a folder, or its config with other `weights`; ModelError for what llama.cpp would not run alike."""
    family, config = read_model_config(model_dir)
    where = str(model_dir / "config.json")
    rope = read_rope(config, family, where)
    made = rope_tensors(rope)
    with contextlib.ExitStack() as stack:
        weights = weights or stack.enter_context(open_weights(model_dir))
        names = _plan(weights.shapes, family, config, model_dir)
        shapes = {tensor: weights.shapes[theirs] for tensor, theirs in names.items()}
        if tuple(shapes["token_embd.weight"]) != (config["vocab_size"], config["hidden_size"]):
            raise ModelError(
                f"vocab_size {config['vocab_size']} is not the number of embeddings or hidden_size "
                f"{config['hidden_size']} not their width: they are {tuple(shapes['token_embd.weight'])}",
                where=where,
            )
        shapes |= {tensor: (factors.shape[1],) for tensor, factors in made.items()}
        infos = [TensorInfo(tensor, shape) for tensor, shape in shapes.items()]
        yield Source(config, family, rope, infos, names, made, weights)


def turned(family: Family, config: Mapping[str, Any], tensor: str, rows_RC: Floats) -> Floats:
    """The rows of a tensor (GGUF's name) in the order that llama.cpp wants them.

    C is any number of columns, so `lora_B` [R, r] turns like its weight; a bias is one row [1, R] of R values.
    """
    is_bias = tensor.endswith(".bias")
    order_R = _row_order(family, config, tensor, rows_RC.shape[1] if is_bias else rows_RC.shape[0])
    if order_R is None:
        return rows_RC
    return np.ascontiguousarray(rows_RC[:, order_R] if is_bias else rows_RC[order_R])


def _row_order(
    family: Family, config: Mapping[str, Any], tensor: str, num_rows: int
) -> npt.NDArray[np.int64] | None:
    """Which row of transformers' comes where: [R] indices; None where they stay.

    neighbours  each head of q and k from halves (x0, x1…, y0, y1…) to pairs (x0, y0, x1, y1…)
    grouped     qkv from a group for each head of k and v (its heads of q, then k, then v) to all q, all k, all v
    """
    kind = tensor.rsplit(".", 2)[-2]
    num_heads, num_groups = int(config["num_attention_heads"]), num_kv_heads(family, config)
    rows_R = np.arange(num_rows)
    if family.row_order == "neighbours" and kind in ("attn_q", "attn_k"):
        heads = num_heads if kind == "attn_q" else num_groups
        return rows_R.reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)
    if family.row_order == "grouped" and kind == "attn_qkv":
        groups = rows_R.reshape(num_groups, num_heads // num_groups + 2, -1)
        return np.concatenate([part.reshape(-1) for part in (groups[:, :-2], groups[:, -2], groups[:, -1])])
    return None


def _plan(
    shapes: Mapping[str, tuple[int, ...]], family: Family, config: Mapping[str, Any], model_dir: Path
) -> dict[str, str]:
    """GGUF name → transformers' name, in the order of the file; ModelError for tensors missing or unknown."""
    layers = [f"{family.layers}{layer}." for layer in range(int(config["num_hidden_layers"]))]
    embeddings, *norms = family.top
    head = next((name for name in HEADS if name in shapes), HEADS[0])
    tied = bool(config.get("tie_word_embeddings", head not in shapes))
    block = block_tensors(family, config)
    wanted = [embeddings, *(layer + tensor for layer in layers for tensor in block), *norms]
    wanted += [] if tied else [head]
    optional = [layer + tensor for layer in layers for tensor in family.optional]
    known = {*wanted, *optional, head}
    missing = [name for name in wanted if name not in shapes]
    unknown = [name for name in shapes if name not in known and not IGNORED.search(name)]
    if missing or unknown:
        lacks = f"lacks {', '.join(missing[:3])}" if missing else ""
        extra = (
            f"has {', '.join(unknown[:3])}, which {family.architecture} has no place for" if unknown else ""
        )
        raise ModelError(f"the model {' and '.join(filter(None, (lacks, extra)))}", where=str(model_dir))
    names = [*wanted, *(name for name in optional if name in shapes)]
    plan = {gguf_name(family, name) or name: name for name in names}
    if family.head == "needed":
        plan.setdefault("output.weight", embeddings)
    return plan


def _overhead(tokenizer_dir: Path) -> int:
    """Bytes for all that is no tensor: in GGUF the tokenizer takes about the room of its JSON."""
    return (tokenizer_dir / "tokenizer.json").stat().st_size + (1 << 20)
