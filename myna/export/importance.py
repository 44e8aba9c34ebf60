"""The importance matrix: how much each column of a weight is used, measured over rows.

A quantized weight is wrong by a little in every column, and what that does to a layer's answer grows with the square
of what the column is multiplied with. So the encoder is told the mean square of each column's input, and spends its
precision there. What llama.cpp's `tools/imatrix` measures, and its `llama-quantize --imatrix` reads.

    T tokens of a row · C columns
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from myna.errors import DataError, ModelError
from myna.export.encoder import Floats
from myna.model.families import Family, gguf_name


def measure_importance(
    model: Any,
    family: Family,
    rows: Sequence[Sequence[int]],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Floats]:
    """[C] mean squared input of each column, for the linear weights of all blocks by GGUF's names.

    `model`: a causal model of transformers, without adapters, on any device, in any float type; it is left in the mode
    it was in. `rows`: token ids; every token counts alike, as upstream has it. The head and the embeddings have no
    entry, as upstream's default is. `progress` is given rows done and rows in all.

    DataError: no tokens. ModelError: no linear layer that GGUF has a name for, an activation that is not finite, or a
    layer that no token reached.
    """
    import torch

    rows = [row for row in rows if len(row)]
    if not rows:
        raise DataError("importance needs rows with tokens")
    layers = _linear_layers(model, family)
    squares = {
        name: torch.zeros(layer.weight.shape[1], dtype=torch.float64) for name, layer in layers.items()
    }
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        with torch.inference_mode(), _watched(layers, squares):
            for done, row in enumerate(rows, 1):
                ids_1T = torch.tensor([list(row)], device=device)
                # The blocks alone: the head's logits, the largest product by far of a small model, are not asked for.
                model.base_model(input_ids=ids_1T, use_cache=False)
                if progress is not None:
                    progress(done, len(rows))
    finally:
        model.train(was_training)
    num_tokens = sum(len(row) for row in rows)
    return {name: _mean(name, total / num_tokens) for name, total in squares.items()}


def importance_keys(importance: Mapping[str, Floats], num_rows: int, rows_name: str) -> dict[str, str | int]:
    """What upstream writes into a file that was quantized with importance (`tools/quantize/quantize.cpp`).

    A chunk is a text that was read in one go: here a row. `quantize.imatrix.file` is left out, there is no such file.
    """
    return {
        "quantize.imatrix.dataset": rows_name,
        "quantize.imatrix.entries_count": len(importance),
        "quantize.imatrix.chunks_count": num_rows,
    }


def _linear_layers(model: Any, family: Family) -> dict[str, Any]:
    """The linear layers of the blocks, by GGUF's names for their weights."""
    import torch

    named = {
        gguf_name(family, f"{name}.weight"): module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    layers = {name: module for name, module in named.items() if name and name.startswith("blk.")}
    if not layers:
        raise ModelError(
            f"the model has no linear layer that {family.architecture} has a name for",
            help="merge an adapter first; importance is measured on a plain model",
        )
    return layers


@contextlib.contextmanager
def _watched(layers: Mapping[str, Any], squares: Mapping[str, Any]) -> Iterator[None]:
    """While this is open each layer adds what it is given, squared, to its line of `squares`."""

    def adds_to(total_C: Any) -> Callable[[Any, tuple[Any, ...]], None]:
        def hook(layer: Any, inputs: tuple[Any, ...]) -> None:
            input_TC = inputs[0].reshape(-1, total_C.shape[0]).float()
            total_C.add_(input_TC.square().sum(0).double().cpu())

        return hook

    handles = [layer.register_forward_pre_hook(adds_to(squares[name])) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _mean(name: str, mean_C: Any) -> Floats:
    if not mean_C.isfinite().all():
        raise ModelError(f"{name}: its input is not finite for these rows", help="train again")
    if not mean_C.any():
        raise ModelError(f"{name}: no token reached this layer")
    values: Floats = mean_C.float().numpy()
    return values
