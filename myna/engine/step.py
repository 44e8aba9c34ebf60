"""The step: one pack through the model to the sum of its losses. Two paths, one answer.

Shapes: T tokens of the pack · D its documents · L the longest · d hidden width · V vocabulary · N target tokens.

fast        one row of tokens [1, T], attention inside documents, the head over the N target tokens only
reference   the plain padded forward [D, L] of transformers and peft, full logits: what the fast path must equal
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F

from myna.adapters.methods import METHODS
from myna.data.packing import Batch
from myna.data.render import IGNORE
from myna.engine.attention import ATTENTION_NAME, plan_layout, register_attention
from myna.engine.lora import use_fast_lora
from myna.engine.loss import target_loss
from myna.recipe import AdapterSettings

PathName = Literal["fast", "reference"]

# transformers' model types whose forward the packed path equals; a contract test runs over them
FAST_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


# oneDNN makes and keeps a kernel for every shape it meets, so each new length of a pack would cost time and memory
ROUND_TOKENS = 64


def choose_path(config: Any, adapter: AdapterSettings) -> tuple[PathName, str]:
    """Which path a run takes, and why where it is the reference one."""
    if config.model_type not in FAST_FAMILIES:
        return "reference", f"the family {config.model_type} has no fast path yet"
    if not METHODS[adapter.method].fast:
        return "reference", f"the method {adapter.method} has no fast path yet"
    if adapter.dropout > 0:
        return "reference", "adapter.dropout is above 0"
    if getattr(config, "attention_dropout", 0.0):
        return "reference", "the base has attention dropout"
    return "fast", ""


def attention_for(path: PathName) -> str:
    """The attention implementation a base is loaded with for a path."""
    if path == "fast":
        register_attention()
        return ATTENTION_NAME
    return "sdpa"


def prepare_model(model: Any, path: PathName) -> None:
    """Puts a peft model into training mode on a path."""
    model.train()
    if path == "fast":
        num_layers = use_fast_lora(model)
        assert num_layers > 0, "the fast path found no LoRA layer"


def pack_loss(model: Any, batch: Batch, path: PathName) -> torch.Tensor:
    """Sum of the loss over the pack's target tokens, a scalar with a gradient to the adapter."""
    return _fast_loss(model, batch) if path == "fast" else _reference_loss(model, batch)


def round_up(batch: Batch, multiple: int = ROUND_TOKENS) -> Batch:
    """The batch with a last document of token 0 that no loss looks at, so that T is a multiple of `multiple`."""
    num_tokens = len(batch.input_ids_T)
    missing = -num_tokens % multiple
    if not missing:
        return batch
    filler = torch.zeros(missing, dtype=batch.input_ids_T.dtype)
    return replace(
        batch,
        input_ids_T=torch.cat([batch.input_ids_T, filler]),
        position_ids_T=torch.cat([batch.position_ids_T, torch.arange(missing)]),
        starts=(*batch.starts, num_tokens),
        lengths=(*batch.lengths, missing),
    )


def _fast_loss(model: Any, batch: Batch) -> torch.Tensor:
    batch = round_up(batch)
    causal_lm = model.get_base_model()
    head_Vd = causal_lm.get_output_embeddings().weight
    device = head_Vd.device
    hidden_1Td = causal_lm.base_model(
        input_ids=batch.input_ids_T[None].to(device),
        position_ids=batch.position_ids_T[None].to(device),
        use_cache=False,
        pack_layout=plan_layout(batch, device),
    ).last_hidden_state
    hidden_Nd = hidden_1Td[0].index_select(0, batch.target_index_N.to(device))
    return target_loss(hidden_Nd, head_Vd, batch.targets_N.to(device))


def _reference_loss(model: Any, batch: Batch) -> torch.Tensor:
    device = next(model.parameters()).device
    num_documents, longest = len(batch.lengths), max(batch.lengths)
    input_ids_DL = torch.zeros(num_documents, longest, dtype=torch.long)
    mask_DL = torch.zeros(num_documents, longest, dtype=torch.long)
    targets_T = torch.full((len(batch.input_ids_T),), IGNORE)
    targets_T[batch.target_index_N] = batch.targets_N
    targets_DL = torch.full((num_documents, longest), IGNORE)
    for row, (start, length) in enumerate(zip(batch.starts, batch.lengths, strict=True)):
        input_ids_DL[row, :length] = batch.input_ids_T[start : start + length]
        targets_DL[row, :length] = targets_T[start : start + length]
        mask_DL[row, :length] = 1
    output = model(input_ids=input_ids_DL.to(device), attention_mask=mask_DL.to(device), use_cache=False)
    logits = output.logits
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(
        logits.flatten(0, 1), targets_DL.flatten().to(device), ignore_index=IGNORE, reduction="sum"
    )
