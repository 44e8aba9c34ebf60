"""write_adapter_gguf: a LoRA alone as the file that llama.cpp and Ollama load beside a base.

Keys, names and orientation are those of llama.cpp's loader (`src/llama-adapter.cpp`) and its converter
(`convert_lora_to_gguf.py`). To W it adds alpha / r · B @ A, with one alpha for the file and the r of each tensor.

    R rows · C columns · r rank · V vocabulary · d hidden width
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from myna.errors import ModelError
from myna.export.encoder import Floats
from myna.export.gguf import GgufSummary, turned
from myna.export.gguf_file import new_writer, write_tensors
from myna.export.lora_file import MERGE_CURE, LoraFile, Pair, read_lora
from myna.export.model_keys import read_model_config
from myna.export.quantize import TensorInfo, quant_type, tensor_bytes
from myna.export.skeleton import skeleton, tensor_shapes
from myna.model.families import Family, gguf_name
from myna.run import file_sha256, require_room


def write_adapter_gguf(
    adapter_dir: Path, base_config_dir: Path, gguf_path: Path, *, name: str
) -> GgufSummary:
    """Writes a plain LoRA or rsLoRA adapter as `gguf_path`, in float32; of the base only config.json is read.

    It goes with a GGUF of the same base, of any type, at scale 1. A layer whose alpha is not the file's has the
    ratio of the two in its B. The file appears under its name when it is whole. ModelError: an adapter that is more
    than LoRA pairs or of another base, a family or layer that llama.cpp adapts not. MachineError: no room.
    """
    family, config = read_model_config(base_config_dir)
    lora = read_lora(adapter_dir)
    shapes = tensor_shapes(skeleton(base_config_dir))
    lora.require_fits(shapes, base_config_dir)
    names = _plan(lora, family, [name for name in shapes if name in lora.pairs])
    alpha = _file_alpha(lora)
    infos = [info for ours, theirs in names.items() for info in _infos(ours, lora.pairs[theirs])]

    def tensor_rows(tensor: str) -> Floats:
        ours, side = tensor.rsplit(".", 1)
        a_rows, b_rows = _factors(lora, names[ours], alpha)
        return a_rows if side == "lora_a" else turned(family, config, ours, b_rows)

    types = dict.fromkeys((info.name for info in infos), "F32")
    num_bytes = sum(tensor_bytes(info, "F32") for info in infos)
    require_room(gguf_path, num_bytes + (1 << 20), "the adapter's file")
    with new_writer(gguf_path, family.architecture) as writer:
        writer.add_type("adapter")
        writer.add_name(name)
        writer.add_file_type(quant_type("F32").number)
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        write_tensors(writer, infos, types, tensor_rows)
    digest = file_sha256(gguf_path)
    return GgufSummary(gguf_path, gguf_path.stat().st_size, digest, {"F32": len(infos)}, len(infos))


def _plan(lora: LoraFile, family: Family, order: Sequence[str]) -> dict[str, str]:
    """GGUF's name → transformers' for each adapted tensor; ModelError for one that has none."""
    names = {theirs: gguf_name(family, theirs) for theirs in order}
    homeless = [theirs for theirs, ours in names.items() if ours is None]
    if homeless:
        raise ModelError(
            f"{family.architecture} of llama.cpp has no place for an adapter of {homeless[0]}",
            where=str(lora.path),
            help=MERGE_CURE,
        )
    return {ours: theirs for theirs, ours in names.items() if ours}


def _infos(ours: str, pair: Pair) -> tuple[TensorInfo, TensorInfo]:
    a_shape = pair.a_shape[::-1] if pair.embedding else pair.a_shape
    return TensorInfo(f"{ours}.lora_a", a_shape), TensorInfo(f"{ours}.lora_b", pair.b_shape)


def _file_alpha(lora: LoraFile) -> float:
    """The alpha of the file: of its first layer that has one, √r times as large for rsLoRA. 0 would be read as scale 1."""
    alphas = [pair.alpha for pair in lora.pairs.values() if pair.alpha]
    if not alphas:
        raise ModelError("alpha is 0: the adapter adds nothing", where=str(lora.path))
    return alphas[0]


def _factors(lora: LoraFile, name: str, alpha: float) -> tuple[Floats, Floats]:
    """(A, B) as llama.cpp wants them: A [r, C], B [R, r]; for the embeddings A [V, r], B [d, r]."""
    a_tensor, b_tensor = lora.factors(name)
    pair = lora.pairs[name]
    a_rows, b_rows = a_tensor.numpy(), b_tensor.numpy()
    if np.float32(pair.alpha) != np.float32(alpha):
        b_rows = (b_rows.astype(np.float64) * (pair.alpha / alpha)).astype(np.float32)
    return (np.ascontiguousarray(a_rows.T) if pair.embedding else a_rows), b_rows
