"""Which ggml type each tensor gets: llama.cpp's own mixtures (`src/llama-quant.cpp`).

So a file named Q4_K_M holds the types that a file of that name from upstream holds. A mixture gives more
bits to what is hurt most: the head, attn_v and ffn_down of some blocks, attn_output. Rows that a type's
blocks do not divide get a type whose blocks do, or F16.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from myna.errors import UsageError
from myna.export.encoder import GGML_TYPES, row_bytes


@dataclass(frozen=True)
class TensorInfo:
    """A tensor by GGUF's name; `shape` as numpy has it, rows last (the reverse of what GGUF tools print)."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class QuantType:
    """A file type: its `general.file_type` (llama.h, `llama_ftype`) and the type most of its tensors get.

    `needs_importance`: tensors of the main type are encoded with an importance matrix or not at all.
    """

    number: int
    main: str
    needs_importance: bool = False


QUANT_TYPES: dict[str, QuantType] = {
    "F32": QuantType(0, "F32"),
    "F16": QuantType(1, "F16"),
    "BF16": QuantType(32, "BF16"),
    "Q8_0": QuantType(7, "Q8_0"),
    "Q6_K": QuantType(18, "Q6_K"),
    "Q5_K_M": QuantType(17, "Q5_K"),
    "Q5_K_S": QuantType(16, "Q5_K"),
    "Q5_1": QuantType(9, "Q5_1"),
    "Q5_0": QuantType(8, "Q5_0"),
    "Q4_K_M": QuantType(15, "Q4_K"),
    "Q4_K_S": QuantType(14, "Q4_K"),
    "Q4_1": QuantType(3, "Q4_1"),
    "Q4_0": QuantType(2, "Q4_0"),
    "IQ4_NL": QuantType(25, "IQ4_NL"),
    "IQ4_XS": QuantType(30, "IQ4_XS"),
    "Q3_K_L": QuantType(13, "Q3_K"),
    "Q3_K_M": QuantType(12, "Q3_K"),
    "Q3_K_S": QuantType(11, "Q3_K"),
    "Q2_K": QuantType(10, "Q2_K"),
    "Q2_K_S": QuantType(21, "Q2_K", needs_importance=True),
}


@dataclass(frozen=True)
class _Place:
    """Where a tensor stands: the `index`th of `count` of its kind, in a model of which the rules ask three things.

    `shared`: at least four query heads use one key and value head. `falcon`: that architecture, which has rules of
    its own. `weighed`: there is an importance matrix.
    """

    index: int
    count: int
    shared: bool
    falcon: bool
    weighed: bool

    @property
    def often(self) -> bool:
        """In the first or the last eighth, or every third between."""
        first = self.count // 8
        return self.index < first or self.index >= 7 * self.count // 8 or (self.index - first) % 3 == 2

    def first(self, part: int) -> bool:
        """In the first `part`th, rounded down."""
        return self.index < self.count // part


# By file type: the type of a tensor where it stands, None for the main one. Rules not listed change nothing.
_Rule = Callable[[_Place], str | None]
_VALUES: dict[str, _Rule] = {
    "Q5_K_M": lambda at: "Q6_K" if at.often else None,
    "Q4_K_M": lambda at: "Q6_K" if at.often else None,
    "Q4_K_S": lambda at: "Q5_K" if at.index < 4 else None,
    "IQ4_NL": lambda at: "Q5_K" if at.shared else None,
    "IQ4_XS": lambda at: "Q5_K" if at.shared else None,
    "Q3_K_L": lambda at: "Q5_K",
    "Q3_K_M": lambda at: "Q5_K" if at.index < 2 else "Q4_K",
    "Q2_K": lambda at: "Q4_K" if at.shared else "Q3_K",
    "Q2_K_S": lambda at: "Q4_K" if at.shared else None,
}
_DOWNS: dict[str, _Rule] = {
    "Q5_K_M": lambda at: "Q6_K" if at.often else None,
    "Q5_0": lambda at: "Q5_1" if at.weighed and at.first(8) else None,
    "Q4_K_M": lambda at: _falcons_down(at) if at.falcon else "Q6_K" if at.often else None,
    "Q4_K_S": lambda at: "Q5_K" if at.first(8) and not at.falcon else None,
    "Q4_0": lambda at: "Q4_1" if at.weighed and at.first(8) else None,
    "IQ4_NL": lambda at: "Q5_K" if at.first(8) and not at.weighed else None,
    "IQ4_XS": lambda at: "Q5_K" if at.first(8) and not at.weighed else None,
    "Q3_K_L": lambda at: "Q4_K" if at.falcon else "Q5_K",
    "Q3_K_M": lambda at: "Q5_K" if at.first(16) else "Q4_K" if at.often or not at.falcon else None,
    "Q2_K": lambda at: "Q3_K",
    "Q2_K_S": lambda at: "Q4_K" if at.first(8) else None,
}
_OUTPUTS: dict[str, _Rule] = {
    "Q3_K_L": lambda at: "Q4_K" if at.falcon else "Q5_K",
    "Q3_K_M": lambda at: None if at.falcon else "Q4_K",
    "Q2_K": lambda at: None if at.falcon else "Q3_K",
}
_RULES = {"values": _VALUES, "downs": _DOWNS, "outputs": _OUTPUTS}
# What a name contains → its kind; a fused attn_qkv is worth what its attn_v is.
_KINDS = {
    "attn_qkv.weight": "values",
    "attn_v.weight": "values",
    "attn_output.weight": "outputs",
    "ffn_down": "downs",
}

# Where a type's blocks do not divide a row: the type to take instead.
_FALLBACK = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "IQ4_XS": "IQ4_NL",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}


def quant_type(name: str) -> QuantType:
    """A line of QUANT_TYPES; UsageError naming them all for an unknown one."""
    if name not in QUANT_TYPES:
        raise UsageError(
            f"{name!r} is no GGUF type that Myna writes", help=f"one of: {', '.join(QUANT_TYPES)}"
        )
    return QUANT_TYPES[name]


def choose_types(
    tensors: Sequence[TensorInfo],
    file_type: str,
    architecture: str,
    *,
    importance: Collection[str] | None = None,
) -> dict[str, str]:
    """The ggml type of each tensor in a file of `file_type`, by name, in the order given.

    `importance` names the tensors that the importance matrix weighs, None where there is no such matrix: some
    mixtures change with it. UsageError for an unknown file type, and for Q2_K_S where a tensor's importance is missing.
    """
    kind = quant_type(file_type)
    chosen = {tensor.name: kind.main if _is_quantized(tensor) else "F32" for tensor in tensors}
    if GGML_TYPES[kind.main].block_size > 1:
        quantized = [tensor for tensor in tensors if _is_quantized(tensor)]
        wanted = _mixture(tensors, quantized, file_type, architecture, importance is not None)
        chosen |= {tensor.name: _that_divides(tensor, wanted[tensor.name]) for tensor in quantized}
    if kind.needs_importance:
        _require_importance(chosen, file_type, importance or ())
    return chosen


def tensor_bytes(tensor: TensorInfo, ggml_type: str) -> int:
    """Bytes of a tensor's blocks in the file, without the padding between tensors."""
    num_rows = 1
    for length in tensor.shape[:-1]:
        num_rows *= length
    return num_rows * row_bytes(tensor.shape[-1], ggml_type)


def _mixture(
    tensors: Sequence[TensorInfo],
    quantized: Iterable[TensorInfo],
    file_type: str,
    architecture: str,
    weighed: bool,
) -> dict[str, str]:
    """Name → type by the mixture's rules, whatever the width of the rows."""
    main = QUANT_TYPES[file_type].main
    head = next((t.name for t in tensors if t.name == "output.weight"), "token_embd.weight")
    group = _heads_a_value(tensors)
    num_layers = 1 + max((_layer(tensor.name) for tensor in tensors), default=-1)
    num_values = sum(_kind(tensor.name) == "values" for tensor in tensors)
    counts = {"values": num_values, "downs": num_layers, "outputs": num_layers}
    seen = dict.fromkeys(counts, 0)
    bumped = _is_seventy_billions(architecture, num_layers, group)
    wanted: dict[str, str] = {}
    # Upstream walks its tensors by layer and then by name, and counts as it goes.
    for tensor in sorted(quantized, key=lambda tensor: (_layer(tensor.name), tensor.name)):
        wanted[tensor.name] = main
        kind = _kind(tensor.name)
        if tensor.name == head:
            wanted[head] = _head_type(tensor, main, architecture)
        elif kind:
            place = _Place(seen[kind], counts[kind], group >= 4, architecture == "falcon", weighed)
            seen[kind] += 1
            rule = _RULES[kind].get(file_type)
            chosen = (rule(place) if rule else None) or main
            bump = bumped and kind == "values" and chosen in ("Q3_K", "Q4_K")
            wanted[tensor.name] = "Q5_K" if bump else chosen
    return wanted


def _kind(name: str) -> str | None:
    return next((kind for part, kind in _KINDS.items() if part in name), None)


def _layer(name: str) -> int:
    """The block a tensor belongs to, -1 outside of them."""
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _is_quantized(tensor: TensorInfo) -> bool:
    """Matrices are, norms and biases are not. ggml drops outer dimensions of one: such a row is no matrix."""
    matrix = len(tensor.shape) >= 2 and any(length > 1 for length in tensor.shape[:-1])
    return matrix and tensor.name.endswith("weight") and "_norm.weight" not in tensor.name


def _head_type(tensor: TensorInfo, main: str, architecture: str) -> str:
    """The head is worth six bits at least; with tied embeddings they are the head."""
    if architecture == "falcon" or main == "Q8_0" or tensor.shape[-1] % GGML_TYPES[main].block_size:
        return "Q8_0"
    return "Q6_K"


def _falcons_down(at: _Place) -> str | None:
    return "Q6_K" if at.first(16) else "Q5_K" if at.often else None


def _heads_a_value(tensors: Iterable[TensorInfo]) -> int:
    """How many query heads share a key and value head, from the shapes of the first block (0: unknown)."""
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    query, key = shapes.get("blk.0.attn_q.weight"), shapes.get("blk.0.attn_k.weight")
    if query and key:
        return query[0] // key[0]
    fused, output = shapes.get("blk.0.attn_qkv.weight"), shapes.get("blk.0.attn_output.weight")
    if (
        fused and output
    ):  # attn_output reads what the query heads give: the rest of the fused rows are k and v
        return output[-1] // max(1, (fused[0] - output[-1]) // 2)
    return 0


def _is_seventy_billions(architecture: str, num_layers: int, group: int) -> bool:
    """Upstream's 70B rule: of 80 layers, where many heads share one attn_v, that is small and worth more bits."""
    return num_layers == 80 and (architecture == "qwen2" or (architecture == "llama" and group > 1))


def _that_divides(tensor: TensorInfo, wanted: str) -> str:
    """`wanted`, or what upstream takes where its blocks do not divide the rows: another type, then F16."""
    for ggml_type in (wanted, _FALLBACK.get(wanted, wanted)):
        if tensor.shape[-1] % GGML_TYPES[ggml_type].block_size == 0:
            return ggml_type
    return "F16"


def _require_importance(chosen: dict[str, str], file_type: str, importance: Collection[str]) -> None:
    """As upstream has it: two bits without an importance matrix are garbage. The head and the embeddings are free."""
    main = QUANT_TYPES[file_type].main
    lacking = [name for name, kind in chosen.items() if kind == main and name not in importance]
    lacking = [name for name in lacking if name not in ("output.weight", "token_embd.weight")]
    if lacking:
        raise UsageError(
            f"{file_type} needs an importance matrix, and {lacking[0]} has none",
            help="set export.importance: true in the recipe, or export Q2_K, which does without",
        )
