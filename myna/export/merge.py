"""Adapter + base → one model, summed in float32 and shown to be the same.

Shapes: T tokens of a row · d hidden width · V vocabulary.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from myna.adapters.files import load_adapter
from myna.errors import CheckFailed
from myna.model.load import DTYPES, load_base
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

    The sum is made in float32 from the base's float32 weights, never through a smaller copy. The check loads the
    written folder from disk. Raises CheckFailed, and leaves no folder, where it differs beyond MERGED_BOUND.
    """
    require_room(merged_dir, int(2.2 * tree_bytes(base_dir)), "the merged model")
    model = load_adapter(load_base(base_dir, "fp32"), adapter_dir)
    hidden = [final_hidden(model.get_base_model(), ids) for ids in rows]
    head_Vd = model.get_base_model().get_output_embeddings().weight.detach().clone()
    merged = model.merge_and_unload(safe_merge=True)
    exact = [final_hidden(merged, ids) for ids in rows]
    exact_head_Vd = merged.get_output_embeddings().weight.detach().clone()
    with new_directory(merged_dir) as temporary:
        merged.to(DTYPES[dtype]).save_pretrained(temporary)
        for name in (*TOKENIZER_FILES, "chat_template.jinja"):
            if (tokenizer_dir / name).is_file():
                shutil.copyfile(tokenizer_dir / name, temporary / name)
        del model, merged
        gc.collect()
        written = load_base(temporary, dtype)
        parity = _compare(written, dtype, rows, hidden, head_Vd, exact, exact_head_Vd)
        del written  # its files are mapped into memory, and Windows renames no folder with such files in it
        if not parity.relative <= MERGED_BOUND:
            raise CheckFailed(
                f"merged is not base + adapter: the logits differ by {parity.relative:.1e} (relative), "
                f"the bound is {MERGED_BOUND:.0e}",
                where=str(merged_dir),
                help="this should not happen: keep the adapter, which is whole, and report it",
                code="parity",
            )
    return parity


def _compare(
    written: Any,
    dtype: str,
    rows: Sequence[Sequence[int]],
    hidden: Sequence[torch.Tensor],
    head_Vd: torch.Tensor,
    exact: Sequence[torch.Tensor],
    exact_head_Vd: torch.Tensor,
) -> MergedParity:
    """Base + adapter against the float32 sum (as read back, where it was written in float32), and its rounding."""
    summed, rounded = _Difference(), _Difference()
    written_head_Vd = written.get_output_embeddings().weight.detach()
    for ids, adapted_Td, merged_Td in zip(rows, hidden, exact, strict=True):
        logits_TV = adapted_Td @ head_Vd.T
        on_disk_TV = (final_hidden(written, ids).to(written_head_Vd.dtype) @ written_head_Vd.T).float()
        merged_TV = on_disk_TV if dtype == "fp32" else merged_Td @ exact_head_Vd.T
        summed.add(logits_TV, merged_TV)
        rounded.add(merged_TV, on_disk_TV)
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
