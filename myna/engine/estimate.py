"""How much memory training takes, by formula: from the base's shape and the longest pack, before anything is loaded.

Shapes: T tokens of the pack · d width · I of the MLP · A = heads · head_dim · B = kv heads · head_dim · V vocabulary ·
R ranks of a group. What is counted, and where it is made: blocks (`engine.blocks`), attention (`engine.kernels`,
`engine.native`), the loss (`engine.loss`), the frozen weights (`engine.frozen`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from myna.engine.frozen import Int8Products
from myna.engine.loss import chunk_tokens

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
PROCESS_MB = (
    600.0  # Python with torch, transformers, peft, the rows, and oneDNN's kernels (measured on Linux)
)
ADAPTER_BYTES = 16  # a number of the adapter: itself, its gradient, two moments, in float32
INPUTS_ON_THE_WAY = (
    2  # of those kept elsewhere: the one that layers run on, the one that is fetched beside them
)
UNGATED = frozenset({"gpt_neox", "falcon", "gpt2", "gptj", "opt", "phi", "bloom", "starcoder2"})


@dataclass(frozen=True)
class BaseShape:
    """What of a base's config the memory depends on."""

    layers: int
    width: int
    inner: int  # I, of one of gate and up
    gated: bool
    query: int  # A
    key_value: int  # B
    heads: int
    vocabulary: int
    tied: bool

    @property
    def num_weights(self) -> int:
        """Of the linear layers, the embedding and the head."""
        ends = (1 if self.tied else 2) * self.vocabulary * self.width
        return self.layers * sum(wide_in * wide_out for wide_in, wide_out in _linears(self)) + ends


@dataclass(frozen=True)
class MemoryEstimate:
    """In MB (10⁶ bytes), of the whole process."""

    loading: float  # until every weight is where it is computed with
    weights: float
    adapter: float
    activations: float
    temporaries: float

    @property
    def total(self) -> float:
        return PROCESS_MB + max(
            self.loading, self.weights + self.adapter + self.activations + self.temporaries
        )


def base_shape(config: Any) -> BaseShape:
    """Reads a transformers config; where a family names a size differently, transformers maps the names."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return BaseShape(
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        inner=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        gated=text.model_type not in UNGATED,
        query=heads * head_dim,
        key_value=(getattr(text, "num_key_value_heads", None) or heads) * head_dim,
        heads=heads,
        vocabulary=text.vocab_size,
        tied=bool(getattr(text, "tie_word_embeddings", False)),
    )


def estimate_memory(
    shape: BaseShape,
    *,
    dtype: str,
    rank: int,
    tokens: int,
    fast: bool,
    native: bool,
    quantize: str,
    checkpoint_layers: int,
    widen: bool = False,
    int8_products: Int8Products = "int8",
    checkpoint_to: str = "device",
) -> MemoryEstimate:
    """Of training with packs of at most `tokens` tokens (padded ones, off the fast path), every linear layer adapted."""
    size = BYTES[dtype]
    kept = _kept_by_a_layer(shape, size, rank, fast=fast, native=native)
    if checkpoint_layers:
        inputs = _num_inputs(shape, checkpoint_layers)
        if checkpoint_to != "device":
            inputs = min(inputs, INPUTS_ON_THE_WAY)
        by_token = inputs * shape.width * size + min(checkpoint_layers, shape.layers) * kept
    else:
        by_token = shape.layers * kept
    integers = quantize == "int8" and int8_products == "int8"
    widen = widen or (quantize == "int8" and not integers)
    passing = tokens * _passing(shape, size, native=native, integers=integers, widen=widen)
    layer = sum(wide_in * wide_out for wide_in, wide_out in _linears(shape))
    ends = (1 if shape.tied else 2) * shape.vocabulary * shape.width * size
    return MemoryEstimate(
        # files are read tensor by tensor; a layer stands twice while it moves behind the seam, the adapter beside it
        loading=((shape.layers + 1) * layer * size + ends + _adapter(shape, size, rank)) / 1e6,
        weights=(shape.layers * layer * (1 if quantize == "int8" else size) + ends) / 1e6,
        adapter=_adapter(shape, size, rank) / 1e6,
        activations=tokens * by_token / 1e6,
        temporaries=(passing + _head(shape, size, tokens, fast=fast, native=native)) / 1e6,
    )


def kept_input_bytes(shape: BaseShape, *, dtype: str, tokens: int, checkpoint_layers: int) -> int:
    """Of all the layers' inputs that gradient checkpointing keeps of a pack."""
    return _num_inputs(shape, checkpoint_layers) * tokens * shape.width * BYTES[dtype]


def _num_inputs(shape: BaseShape, checkpoint_layers: int) -> int:
    return -(-shape.layers // checkpoint_layers)


def _linears(shape: BaseShape) -> tuple[tuple[int, int], ...]:
    """(in, out) of a layer's linear layers."""
    d, up = shape.width, ((shape.width, shape.inner),) * (2 if shape.gated else 1)
    return (
        (d, shape.query),
        (d, shape.key_value),
        (d, shape.key_value),
        (shape.query, d),
        *up,
        (shape.inner, d),
    )


def _adapter(shape: BaseShape, size: int, rank: int) -> float:
    numbers = shape.layers * rank * sum(wide_in + wide_out for wide_in, wide_out in _linears(shape))
    return float(numbers * (ADAPTER_BYTES + 3 * size))  # as the products read it, a group's ranks together


def _kept_by_a_layer(shape: BaseShape, size: int, rank: int, *, fast: bool, native: bool) -> float:
    """Bytes a token that the backward of a layer needs."""
    fused = shape.query + 2 * shape.key_value
    middle = shape.inner * (2 if shape.gated else 1)
    if not fast:  # autograd keeps inputs of every norm, product, gate and rotation, some of them in float32
        return (
            size * (6 * shape.width + 3 * fused + shape.query + 2 * middle + 2 * shape.inner)
            + 4 * 4 * shape.width
        )
    kept = size * (2 * shape.width + fused + shape.query + middle + 7 * rank) + 4 * (shape.heads + 2)
    # torch's attention keeps its padded, rotated float32 inputs and its answer
    return kept if native else kept + 4 * 1.25 * (fused + 2 * shape.query)


def _passing(shape: BaseShape, size: int, *, native: bool, integers: bool, widen: bool) -> float:
    """Bytes a token that a block's backward holds while it runs."""
    fused = shape.query + 2 * shape.key_value
    middle = shape.inner * (2 if shape.gated else 1)
    blocks = size * (6 * shape.width + middle + 2 * shape.inner)
    attention = 4 * (5 * shape.query + 4 * shape.key_value + shape.heads) if native else 4 * 4 * fused
    sums = (4 + 1) * max(middle, shape.inner, fused) if integers else 0
    # what comes in and goes out of a product once more in float32
    wide = 4 * 2 * max(middle, shape.inner, fused) if widen else 0
    return blocks + attention + sums + wide


def _head(shape: BaseShape, size: int, tokens: int, *, fast: bool, native: bool) -> float:
    if not fast:  # full logits, and in float32 with their gradient
        return tokens * shape.vocabulary * (2 * size + 3 * 4)
    rows = min(tokens, chunk_tokens(shape.vocabulary, size))
    return rows * shape.vocabulary * (size + (0 if native else 8)) + 3 * tokens * shape.width * size
