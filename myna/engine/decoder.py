"""A model's decoder as the engine runs it: the embedding, the layers' blocks, the last norm. All weights are transformers'.

Shapes: T tokens of the pack · d width · N target tokens · V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from myna.data.packing import Batch
from myna.engine.blocks import PackTools, run_block
from myna.engine.dropout import PackMasks
from myna.engine.families import FAST, DecoderLayer, layer_norm, rms_norm
from myna.engine.frozen import INT8_WEIGHTS, DenseWeight, Int8Products, Int8Weight, WatchedWeight
from myna.engine.kept import InputPlace, KeptInput, OnDevice
from myna.engine.kernels import Kernels, Norm, Rope
from myna.engine.layout import plan_layout
from myna.engine.lora import LoraGroup
from myna.engine.loss import target_loss
from myna.engine.memory import give_back_memory


class FastDecoder:
    """A peft model taken apart for packs. The adapter's parameters stay peft's; the base's weights move in here.

    `checkpoint_layers`: 0 keeps what the backward needs, n keeps every n-th layer's input alone and runs the layers again;
    `keep_inputs`: where those inputs wait (None: on the device).
    `head_tokens`: target tokens that the head projects at a time (see `engine.loss`).
    """

    def __init__(
        self,
        model: Any,
        kernels: Kernels,
        *,
        checkpoint_layers: int = 0,
        head_tokens: int | None = None,
        keep_inputs: InputPlace | None = None,
    ) -> None:
        causal_lm = model.get_base_model()
        self.config = causal_lm.config.get_text_config()
        self.kernels = kernels
        self.checkpoint_layers = checkpoint_layers
        self.head_tokens = head_tokens
        self._keep_inputs = keep_inputs or OnDevice()
        self._family = FAST[self.config.model_type]
        self._base = causal_lm.base_model
        self._head_Vd = causal_lm.get_output_embeddings().weight
        self._softcap = getattr(self.config, "final_logit_softcapping", None)
        self._embedding = getattr(self._base, self._family.embedding)
        self._final = _norm_of(self.config.model_type, getattr(self._base, self._family.final_norm))
        self.layers: list[DecoderLayer] = []
        for index, layer in enumerate(self._base.layers):
            self.layers.append(self._family.layer(layer, self.config, index))
            _let_go(layer)
            give_back_memory()  # else the layers' old places come to a second model
        self._num_adapters = 0
        for group in self.groups():
            group.first_adapter = self._num_adapters
            self._num_adapters += len(group.parts)

    def refresh(self) -> None:
        """Takes the adapter's present values into the products: after every optimizer step."""
        for group in self.groups():
            group.refresh()

    @torch.no_grad()
    def quantize_int8(self, calibration: Batch, products: Int8Products = "int8") -> None:
        """Turns every frozen weight to int8; `calibration` is a pack of the rows that will be trained on.

        A forward over it tells how large each input column gets. A layer is quantized once the pack is through it, so that
        never two copies of more than one layer are held.
        """
        x_Td, tools = self._enter(calibration)
        for layer in self.layers:
            x_Td = _quantize_layer(layer, x_Td, tools, INT8_WEIGHTS[products])
            give_back_memory()

    def groups(self) -> Iterator[LoraGroup]:
        """Every group of linears, in the order of the forward."""
        for layer in self.layers:
            yield from _groups_of(layer)

    def product_flops(self, batch: Batch) -> float:
        """Floating-point operations of the matrix products that a forward and backward over the pack runs.

        A product of [m, k] and [k, n] counts 2·m·k·n, also where it is done in int8. Attention's own are not counted.
        """
        tokens, flops, needs_input = len(batch.input_ids_T), 0.0, False
        for group in self.groups():
            frozen = group.frozen
            wide_in, wide_out = frozen.num_in + frozen.rank, frozen.num_out + frozen.rank
            low = sum(
                (p.rows.stop - p.rows.start + frozen.num_in) * (p.ranks.stop - p.ranks.start)
                for p in group.parts
            )
            flops += frozen.num_out * wide_in + 2 * low
            flops += frozen.num_in * wide_out if needs_input else 0
            needs_input = needs_input or bool(group.parts)
        # the head: logits and the gradient in the hidden states
        return 2.0 * (tokens * flops + 2.0 * len(batch.targets_N) * float(self._head_Vd.numel()))

    def loss(self, batch: Batch, scale: float = 1.0) -> torch.Tensor:
        """`scale` times the sum of the loss over the pack's target tokens, with a gradient to the adapter."""
        device = self._head_Vd.device
        # the last norm is per token, like the head: both see target tokens alone
        x_Nd = self.hidden(batch).index_select(0, batch.target_index_N.to(device))
        hidden_Nd = _FinalNorm.apply(x_Nd, self._final, self.kernels)
        assert isinstance(hidden_Nd, torch.Tensor)
        targets_N = batch.targets_N.to(device)
        chunk, softcap = self.head_tokens, self._softcap
        return target_loss(
            hidden_Nd, self._head_Vd, targets_N, self.kernels, chunk=chunk, softcap=softcap, scale=scale
        )

    def hidden(self, batch: Batch) -> torch.Tensor:
        """The residual stream after the last layer: [T, d]."""
        x_Td, tools = self._enter(batch)
        every = self.checkpoint_layers
        if not every or not torch.is_grad_enabled():
            return _run_layers(x_Td, self.layers, tools)
        kept: KeptInput | None = None
        for first in range(0, len(self.layers), every):
            kept = self._keep_inputs.keep(x_Td.detach(), before=kept)
            x_Td = _Checkpointed.run(x_Td, kept, self.layers[first : first + every], tools)
        return x_Td

    def masks(self, batch: Batch) -> PackMasks | None:
        """The dropout masks of a pack; None where nothing is dropped."""
        groups = [group for group in self.groups() if group.dropout]
        if batch.draw is None or not groups:
            return None
        widest = max(group.frozen.num_in for group in groups)
        device = self._head_Vd.device
        return PackMasks(batch.draw, len(batch.input_ids_T), self._num_adapters, widest, device)

    def _enter(self, batch: Batch) -> tuple[torch.Tensor, dict[str, PackTools]]:
        """What the first layer reads, [T, d], and what every block uses, by the name of its rotary embedding."""
        device = self._head_Vd.device
        x_Td: torch.Tensor = self._embedding(batch.input_ids_T[None].to(device))[0]
        layout = plan_layout(batch, device)
        ropes = self._ropes(x_Td, batch.position_ids_T.to(device))
        masks = self.masks(batch)
        return x_Td, {name: PackTools(self.kernels, rope, layout, masks) for name, rope in ropes.items()}

    def _ropes(self, x_Td: torch.Tensor, position_ids_T: torch.Tensor) -> dict[str, Rope]:
        """The rotary embedding by layer type ("" where the model has one for all), in float32 at least."""
        exact = x_Td.dtype if x_Td.dtype == torch.float64 else torch.float32
        like, positions = x_Td.new_empty(1, dtype=exact), position_ids_T[None]
        names = sorted(set(self.config.layer_types)) if self._family.rope_by_layer_type else [""]
        found = {}
        for name in names:
            cos, sin = self._base.rotary_emb(like, positions, *([name] if name else []))
            found[name] = Rope(cos[0].contiguous(), sin[0].contiguous())
        return found


def _groups_of(layer: DecoderLayer) -> tuple[LoraGroup, ...]:
    return layer.attention.inner, layer.attention.outer, layer.mlp.inner, layer.mlp.outer


def _quantize_layer(
    layer: DecoderLayer, x_Td: torch.Tensor, tools: dict[str, PackTools], make: type[Int8Weight]
) -> torch.Tensor:
    """The layer's answer as its weights were; on return nothing refers to them any more."""
    watched = []
    for group in _groups_of(layer):
        assert isinstance(group.frozen, DenseWeight), "the weights are quantized already"
        group.frozen = watch = WatchedWeight(group.frozen)
        watched.append((group, watch))
    y_Td = _run_layers(x_Td, [layer], tools)
    for group, watch in watched:
        group.frozen = make(watch.dense, watch.largest_K)
    return y_Td


def _run_layers(
    x_Td: torch.Tensor, layers: Sequence[DecoderLayer], tools: dict[str, PackTools]
) -> torch.Tensor:
    for layer in layers:
        own = tools[layer.attention.rope_name]
        if layer.parallel:
            attended = run_block(x_Td, layer.attention, own)
            x_Td = attended + run_block(x_Td, layer.mlp, own, residual=False)
        else:
            x_Td = run_block(run_block(x_Td, layer.attention, own), layer.mlp, own)
    return x_Td


class _Checkpointed(torch.autograd.Function):
    """Layers whose forward is run again in the backward (Chen et al. 2016): between them only their input is kept."""

    @staticmethod
    def run(
        x_Td: torch.Tensor, kept: KeptInput, layers: Sequence[DecoderLayer], tools: dict[str, PackTools]
    ) -> torch.Tensor:
        parts = (
            part
            for layer in layers
            for block in (layer.attention, layer.mlp)
            for part in (block.inner, block.outer)
        )
        parameters = [parameter for group in parts for parameter in group.parameters]
        y_Td = _Checkpointed.apply(x_Td, kept, layers, tools, *parameters)
        assert isinstance(y_Td, torch.Tensor)
        return y_Td

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        kept: KeptInput,
        layers: Sequence[DecoderLayer],
        tools: dict[str, PackTools],
        *_: Any,
    ) -> torch.Tensor:
        ctx.kept, ctx.layers, ctx.tools = kept, layers, tools
        with torch.no_grad():
            return _run_layers(x, layers, tools)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        needs_x = ctx.needs_input_grad[0]
        x = ctx.kept.fetch().requires_grad_(needs_x)
        ctx.kept = None
        with torch.enable_grad():
            y = _run_layers(x, ctx.layers, ctx.tools)
        y.backward(gradients[0])  # the blocks add to the adapters' gradients, x is a leaf
        return x.grad, *(None,) * (len(ctx.needs_input_grad) - 1)


class _FinalNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, norm: Norm, kernels: Kernels) -> torch.Tensor:
        y = torch.empty_like(x)
        ctx.x, ctx.norm, ctx.kernels = x, norm, kernels
        ctx.stats = kernels.norm(x, norm, y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.kernels.norm_back(gradients[0], ctx.x, ctx.norm, ctx.stats, None), None, None


def _norm_of(model_type: str, module: Any) -> Norm:
    if isinstance(module, torch.nn.LayerNorm):
        return layer_norm(module)
    return rms_norm(module, plus_one=model_type.startswith("gemma"))


def _let_go(layer: torch.nn.Module) -> None:
    """Frees a layer's own copy of the weights that moved behind the seam; the adapter and the norms stay."""
    for module in layer.modules():
        base = getattr(module, "base_layer", module)
        if isinstance(base, torch.nn.Linear) and not base.weight.requires_grad:
            base.weight = torch.nn.Parameter(base.weight.new_empty(0), requires_grad=False)
