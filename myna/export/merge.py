"""Adapter + base → one model, summed in float32 and shown to be the same.

Shapes: T tokens of a row · d hidden width · V vocabulary.
"""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from myna.adapters.files import load_adapter, merge_adapter
from myna.engine.memory import forget_models, give_back_memory
from myna.errors import CheckFailed
from myna.export.lora_file import LoraFile, not_plain, read_lora
from myna.export.safetensors_file import write_folder
from myna.export.skeleton import skeleton, tensor_shapes
from myna.export.weights import AdaptedWeights, Weights, open_adapted, open_weights
from myna.model.families import HEADS, IGNORED
from myna.model.load import DTYPES, load_base, read_config
from myna.run import new_directory, require_room, tree_bytes

MERGED_BOUND = 1e-5  # relative difference of the logits by norm, in float32: rounding gives a tenth of it

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model")


@dataclass(frozen=True)
class MergedParity:
    """Merged against base + adapter over the rows' tokens. `relative` is ‖Δ‖ / ‖logits‖, in float32.

    `dtype_*` compare what was written in `dtype` with the float32 sum: the rounding that the recipe asked for.
    """

    num_tokens: int
    max_abs: float
    relative: float
    bound: float
    dtype: str
    dtype_max_abs: float
    dtype_relative: float

    def as_json(self) -> Mapping[str, Any]:
        return asdict(self)


@dataclass
class _Difference:
    """Sums of squares over rows, and the largest difference."""

    square: float = 0.0
    norm: float = 0.0
    largest: float = 0.0

    def add(self, reference: torch.Tensor, other: torch.Tensor) -> None:
        delta = (reference - other).double()
        self.square += float(delta.square().sum())
        self.norm += float(reference.double().square().sum())
        self.largest = max(self.largest, float(delta.abs().max()))

    @property
    def relative(self) -> float:
        return float((self.square / self.norm) ** 0.5) if self.norm else 0.0


@dataclass(frozen=True)
class _Answers:
    """What a model said to the rows: the final hidden states [T, d] of each, and a copy of its head."""

    hidden: Sequence[torch.Tensor]
    head: torch.nn.Module

    @torch.inference_mode()
    def logits(self, row: int) -> torch.Tensor:
        """[T, V] float32."""
        weight_Vd = next(self.head.parameters())
        logits_TV: torch.Tensor = self.head(self.hidden[row].to(weight_Vd.dtype)).float()
        return logits_TV


def merge(
    base_dir: Path,
    adapter_dir: Path,
    tokenizer_dir: Path,
    merged_dir: Path,
    *,
    dtype: str,
    rows: Sequence[Sequence[int]],
) -> MergedParity:
    """Writes merged/ (Hugging Face layout, with the run's tokenizer and template) and measures it on `rows` of ids.

    The sum is made in float32 from the base's float32 weights, never through a smaller copy. A plain LoRA is added
    tensor by tensor: writing takes the memory of the largest one. Other methods are peft's to merge, with the whole
    model in memory. The check loads the written folder from disk; it takes the memory of one model in float32, its
    head once more, and the rows' hidden states. Raises CheckFailed, and leaves no folder, where merged differs
    beyond MERGED_BOUND; ModelError where the adapter does not fit or cannot be merged.
    """
    with new_directory(merged_dir) as temporary:
        names = None if not_plain(adapter_dir) else _own_names(base_dir, read_lora(adapter_dir))
        if names is None:
            adapted, exact = _merge_in_memory(base_dir, adapter_dir, temporary, dtype, rows)
        else:
            adapted, exact = _merge_streamed(base_dir, adapter_dir, temporary, dtype, rows, names)
        for name in (*TOKENIZER_FILES, "chat_template.jinja"):
            if (tokenizer_dir / name).is_file():
                shutil.copyfile(tokenizer_dir / name, temporary / name)
        forget_models()
        written = _ask(load_base(temporary, dtype), rows)
        parity = _compare(adapted, written if exact is None else exact, written, rows, dtype)
        del written
        if not parity.relative <= MERGED_BOUND:
            raise CheckFailed(
                f"merged is not base + adapter: the logits differ by {parity.relative:.1e} (relative), "
                f"the bound is {MERGED_BOUND:.0e}",
                where=str(merged_dir),
                help="this should not happen: keep the adapter, which is whole, and report it",
                code="parity",
            )
    return parity


def _merge_streamed(
    base_dir: Path,
    adapter_dir: Path,
    folder: Path,
    dtype: str,
    rows: Sequence[Sequence[int]],
    names: list[str],
) -> tuple[_Answers, _Answers | None]:
    """Writes the sum tensor by tensor; (what base + adapter say, what the float32 sum says: None where it is on disk)."""
    with open_adapted(base_dir, adapter_dir) as weights:
        num_bytes = sum(math.prod(weights.shapes[name]) for name in names) * DTYPES[dtype].itemsize
        require_room(folder, num_bytes + (64 << 20), "the merged model")
        write_folder(folder, weights, names, DTYPES[dtype])
        _write_configs(base_dir, folder, dtype)
        model = load_adapter(load_base(base_dir, "fp32"), adapter_dir)
        adapted = _ask(model.get_base_model(), rows)
        if dtype == "fp32":
            return adapted, None
        bare = model.unload()
        del model
        forget_models()
        _put(bare, weights)
        return adapted, _ask(bare, rows)


def _merge_in_memory(
    base_dir: Path, adapter_dir: Path, folder: Path, dtype: str, rows: Sequence[Sequence[int]]
) -> tuple[_Answers, _Answers | None]:
    """The same through peft and `save_pretrained`, for every method that peft can merge."""
    require_room(folder, int(2.2 * tree_bytes(base_dir)), "the merged model")
    model = load_adapter(load_base(base_dir, "fp32"), adapter_dir)
    adapted = _ask(model.get_base_model(), rows)
    merged = merge_adapter(model, adapter_dir)
    del model
    exact = None if dtype == "fp32" else _ask(merged, rows)
    merged.to(DTYPES[dtype]).save_pretrained(folder)
    return adapted, exact


def _own_names(base_dir: Path, lora: LoraFile) -> list[str] | None:
    """The base's tensors that merged/ holds, where its files call them as the model itself does; None where not.

    transformers renames or splits tensors of some older folders as it loads them; those go through it. A tied head
    is no tensor of its own: it is not written, and a folder whose two copies differ is not tied.
    """
    if getattr(read_config(base_dir), "quantization_config", None) is not None:
        return None
    model = skeleton(base_dir)
    shapes = tensor_shapes(model)
    tied: Mapping[str, str] = model.all_tied_weights_keys
    with open_weights(base_dir) as base:
        for own in [
            name for name in HEADS if name in shapes and name not in {*tied, *base.shapes, *lora.pairs}
        ]:
            head = next(
                (name for name in HEADS if name in base.shapes), own
            )  # GPT-NeoX keeps its older name on disk
            shapes[head] = shapes.pop(own)
        names = [name for name in shapes if name not in tied]
        extra = [name for name in base.shapes if name not in names and not IGNORED.search(name)]
        fits = all(base.shapes.get(name) == shapes[name] for name in names)
        doubled = all(name in tied and _equal(base, name, tied[name]) for name in extra)
        return names if fits and doubled else None


def _equal(weights: Weights, first: str, second: str) -> bool:
    return np.array_equal(weights.rows(first), weights.rows(second))


def _write_configs(base_dir: Path, folder: Path, dtype: str) -> None:
    """config.json and generation_config.json as `save_pretrained` writes them."""
    from transformers import GenerationConfig

    model = skeleton(base_dir, dtype)
    model.config.dtype = str(DTYPES[dtype]).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if (base_dir / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(base_dir)
    model.generation_config.save_pretrained(folder)


def _put(model: Any, weights: AdaptedWeights) -> None:
    """Gives a float32 base the sums: each parameter is exchanged, for what is there may be the base's mapped file."""
    parameters = dict(model.named_parameters())
    for name in weights.lora.pairs:
        parameters[name].data = torch.from_numpy(weights.rows(name)).reshape(parameters[name].shape)
        give_back_memory()  # else the freed tensors stay with this process, a second model beside the sum


def _ask(causal_lm: Any, rows: Sequence[Sequence[int]]) -> _Answers:
    """The final hidden states of every row, and the head: a copy, so that the model itself can go."""
    hidden = [final_hidden(causal_lm, ids) for ids in rows]
    return _Answers(hidden, copy.deepcopy(causal_lm.get_output_embeddings()))


def _compare(
    adapted: _Answers, exact: _Answers, written: _Answers, rows: Sequence[Sequence[int]], dtype: str
) -> MergedParity:
    """Base + adapter against the float32 sum (as read back, where it was written in float32), and its rounding."""
    summed, rounded = _Difference(), _Difference()
    for row in range(len(rows)):
        exact_TV = exact.logits(row)
        summed.add(adapted.logits(row), exact_TV)
        rounded.add(exact_TV, written.logits(row))
    return MergedParity(
        num_tokens=sum(len(ids) for ids in rows),
        max_abs=summed.largest,
        relative=summed.relative,
        bound=MERGED_BOUND,
        dtype=dtype,
        dtype_max_abs=rounded.largest,
        dtype_relative=rounded.relative,
    )


def final_hidden(causal_lm: Any, ids: Sequence[int]) -> torch.Tensor:
    """[T, d] float32: what the head is multiplied with, for each token of one row."""
    device = next(causal_lm.parameters()).device
    with torch.inference_mode():
        output = causal_lm.base_model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False)
    hidden_Td: torch.Tensor = output.last_hidden_state[0].float().cpu()
    return hidden_Td
