"""The step: one pack through the model to the sum of its losses. Two paths, one answer.

Shapes: T tokens of the pack · D its documents · L the longest · d hidden width · V vocabulary · N target tokens.

fast        one row of tokens [T], attention inside documents, the head over the N target tokens only
reference   the plain padded forward [D, L] of transformers and peft, full logits: what the fast path must equal
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F

from myna.adapters.methods import METHODS
from myna.data.packing import Batch, Segment
from myna.data.render import IGNORE
from myna.engine.compiler import NotNative
from myna.engine.decoder import FastDecoder
from myna.engine.families import FAST
from myna.engine.flex import FlexKernels
from myna.engine.frozen import Int8Products
from myna.engine.kept import InputPlace
from myna.engine.kernels import Kernels
from myna.engine.native import load_native
from myna.engine.products import PlainProducts, WideProducts
from myna.engine.threads import usable_cores
from myna.engine.torch_kernels import TorchKernels
from myna.settings import AdapterSettings

PathName = Literal["fast", "reference"]
KernelsName = Literal["native", "torch", "flex"]
ProductsName = Literal["native", "torch"]

# oneDNN makes and keeps a kernel for every shape it meets, so each new length of a pack would cost time and memory
ROUND_TOKENS = 32

UNPACKED = "train.packed is false"


class Stepper(Protocol):
    """A path's way through one pack."""

    def loss(self, batch: Batch, scale: float = 1.0) -> torch.Tensor:
        """`scale` times the sum of the loss over the pack's target tokens, with a gradient to the adapter."""

    def refresh(self) -> None:
        """To be called after the adapter changed."""

    def product_flops(self, batch: Batch) -> float | None:
        """What the pack's matrix products come to, in FLOP; None where it is not known."""


def choose_kernels(
    name: KernelsName, threads: int, *, widen: bool = False, products: ProductsName = "torch"
) -> Kernels:
    """The kernels that a plan names, `widen` with products in float32, which may be in C too.

    NotNative where the C ones cannot be had here.
    """
    if name == "native" and widen and products == "native":
        return load_native(threads, widen=True)
    plain = WideProducts() if widen else PlainProducts()
    if name == "native":
        return load_native(threads, plain)
    return FlexKernels(plain) if name == "flex" else TorchKernels(plain)


def best_kernels(device: str, dtype: str) -> tuple[KernelsName, str]:
    """The kernels for this machine, and why where they are torch's."""
    if device != "cpu":
        return "torch", f"the C kernels are for a CPU, the device is {device}"
    if dtype not in ("bf16", "fp32"):
        return "torch", f"the C kernels compute in bf16 and fp32, not in {dtype}"
    try:
        load_native(usable_cores())
    except NotNative as error:
        return "torch", str(error)
    return "native", ""


def choose_path(config: Any, adapter: AdapterSettings, *, packed: bool = True) -> tuple[PathName, str]:
    """Which path a run takes, and why where it is the reference one."""
    if not packed:
        return "reference", UNPACKED
    if config.model_type not in FAST:
        return "reference", f"the family {config.model_type} has no fast path yet"
    if not METHODS[adapter.method].fast:
        return "reference", f"the method {adapter.method} has no fast path yet"
    if any(getattr(config, name, 0.0) for name in DROPOUTS):
        return "reference", "the base has dropout of its own"
    return "fast", ""


DROPOUTS = ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop")


def make_stepper(
    model: Any,
    path: PathName,
    *,
    kernels: Kernels | None = None,
    quantize_with: Batch | None = None,
    int8_products: Int8Products = "int8",
    checkpoint_layers: int = 0,
    round_tokens: int = ROUND_TOKENS,
    head_tokens: int | None = None,
    keep_inputs: InputPlace | None = None,
) -> Stepper:
    """Puts a peft model into training mode on a path. The settings are the fast path's; see FastDecoder and `round_up`.

    `keep_inputs` is where checkpointed layers' inputs are kept: the device where None.
    `quantize_with` is a pack to quantize the frozen weights to int8 by; without one they stay as they are.
    `int8_products` is what these are then multiplied in.
    On the reference path `checkpoint_layers` is 0 or 1: transformers runs each layer again, or none.
    """
    model.train()
    if path == "reference":
        assert checkpoint_layers <= 1 and quantize_with is None
        assert keep_inputs is None or keep_inputs.name == "device"
        if checkpoint_layers:
            base = model.get_base_model()
            # under its older name where transformers has no newer one; reentrant, it would ask the embeddings for a gradient
            enable = (
                getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
            )
            enable({"use_reentrant": False})
        return ReferenceStepper(model)
    decoder = FastDecoder(
        model,
        kernels or TorchKernels(),
        checkpoint_layers=checkpoint_layers,
        head_tokens=head_tokens,
        keep_inputs=keep_inputs,
    )
    assert any(group.parts for group in decoder.groups()), "the fast path found no LoRA layer"
    if quantize_with is not None:
        decoder.quantize_int8(round_up(quantize_with), int8_products)
    return FastStepper(decoder, round_tokens)


class FastStepper:
    """Packs through the engine's own decoder."""

    def __init__(self, decoder: FastDecoder, round_tokens: int) -> None:
        self.decoder = decoder
        self.round_tokens = round_tokens

    def loss(self, batch: Batch, scale: float = 1.0) -> torch.Tensor:
        return self.decoder.loss(round_up(batch, self.round_tokens), scale)

    def refresh(self) -> None:
        self.decoder.refresh()

    def product_flops(self, batch: Batch) -> float | None:
        return self.decoder.product_flops(round_up(batch, self.round_tokens))


class ReferenceStepper:
    """The plain forward of transformers and peft over padded rows."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def loss(self, batch: Batch, scale: float = 1.0) -> torch.Tensor:
        loss = _reference_loss(self.model, batch)
        return loss if scale == 1 else loss * scale

    def refresh(self) -> None:
        pass

    def product_flops(self, batch: Batch) -> float | None:
        return None


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
        # all at position 0: where a rotary embedding depends on the last position, it is the rows'
        position_ids_T=torch.cat([batch.position_ids_T, filler]),
        segments=(*batch.segments, Segment(num_tokens, missing)),
        documents=(*batch.documents, (len(batch.segments),)),
    )


def _reference_loss(model: Any, batch: Batch) -> torch.Tensor:
    device = next(model.parameters()).device
    assert all(len(path) == 1 for path in batch.documents), "the reference path takes rows that share nothing"
    num_documents, longest = len(batch.lengths), max(batch.lengths)
    input_ids_DL = torch.zeros(num_documents, longest, dtype=torch.long)
    mask_DL = torch.zeros(num_documents, longest, dtype=torch.long)
    targets_T = torch.full((len(batch.input_ids_T),), IGNORE)
    targets_T[batch.target_index_N] = batch.targets_N
    targets_DL = torch.full((num_documents, longest), IGNORE)
    for row, segment in enumerate(batch.segments):
        start, length = segment.start, segment.length
        input_ids_DL[row, :length] = batch.input_ids_T[start : start + length]
        targets_DL[row, :length] = targets_T[start : start + length]
        mask_DL[row, :length] = 1
    output = model(input_ids=input_ids_DL.to(device), attention_mask=mask_DL.to(device), use_cache=False)
    logits = output.logits
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(
        logits.flatten(0, 1), targets_DL.flatten().to(device), ignore_index=IGNORE, reduction="sum"
    )
