"""The compiled kernels against torch's, before their first use: a compiler that miscompiles must not train a model.

Every function of the protocol on small random tensors, with widths that are no multiple of a vector, a shared beginning, a
window, a cap, grouped heads. Some 50 ms, and ten times that in a process whose torch has not worked yet. The draws are from
a generator of their own: torch's global state stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from myna.data.packing import Batch, Segment
from myna.engine.compiler import NotNative
from myna.engine.dropout import PackMasks
from myna.engine.kernels import ActivationName, AttentionSpec, Kernels, LowRankTerm, Norm, Rope
from myna.engine.layout import PackLayout, plan_layout
from myna.engine.torch_kernels import TorchKernels

TOLERANCE: Final = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # |difference| over |what torch says|, norms
ROWS: Final = 9
WIDTH: Final = 75  # four vectors of 16 and some
# The low-rank products take 16 rows, 64 tokens, 128 columns at a time and up to 48 ranks: more than one of each, and a rest.
MANY_ROWS: Final = 69
LONG: Final = 133
NARROW: Final = (5, 53)
BLOCKS: Final = ((0, 7, 0, 3), (20, 49, 3, 9), (49, 75, 9, 21))  # from column, to column, from rank, to rank
# rows, what is summed, columns: 16 rows, 48 columns and up to 640 of a sum at a time; more than one of each, and a rest
PRODUCTS: Final = ((MANY_ROWS, 700, LONG), (5, 53, 700), (ROWS, 27, 10))
INT8_PRODUCTS: Final = ((MANY_ROWS, 700, LONG), (5, 53, 700), (ROWS, 27, WIDTH))
SEGMENTS: Final = (Segment(0, 41), Segment(41, 6, 0), Segment(47, 37, 0), Segment(84, 3, 2), Segment(87, 80))
DOCUMENTS: Final = ((0, 1), (0, 2), (0, 2, 3), (4,))
NUM_TOKENS: Final = 167


Answers = Iterator[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class Draw:
    """Random tensors that are the same for every kernel."""

    generator: torch.Generator
    dtype: torch.dtype

    def typed(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def exact(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator) + 0.5

    def norm(self, width: int) -> Norm:
        return Norm(self.exact(width), None, 0.1)  # large enough that to forget it is seen

    def room(self, rows: int, width: int) -> torch.Tensor:
        """An `out`: rows further apart than they are wide, as the engine's are."""
        return torch.zeros(rows, width + 5, dtype=self.dtype)[:, :width]


def check_native(kernels: Kernels) -> None:
    """NotNative with what differed, where any function answers otherwise than torch's kernels."""
    for dtype, tolerance in TOLERANCE.items():
        for name, mine, theirs in compared(kernels, TorchKernels(), dtype):
            error = float((mine - theirs).norm() / theirs.norm().clamp(min=1e-30))
            if not error <= tolerance:
                told = f"{str(dtype).removeprefix('torch.')}: {error:.1e} by norm, allowed is {tolerance:.0e}"
                raise NotNative(f"the compiled {name} differs from torch's in {told}")


def compared(
    kernels: Kernels, reference: Kernels, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(what, one kernel's answer, the other's) in float64, of every function."""
    for work in WORK:
        draws = (Draw(torch.Generator().manual_seed(0), dtype) for _ in range(2))
        mine, theirs = (work(k, draw) for k, draw in zip((kernels, reference), draws, strict=True))
        for (name, a), (_, b) in zip(mine, theirs, strict=True):
            yield name, a.double(), b.double()


def _norms(kernels: Kernels, draw: Draw) -> Answers:
    x, g, norm, out = (
        draw.typed(ROWS, WIDTH),
        draw.typed(ROWS, WIDTH),
        draw.norm(WIDTH),
        draw.room(ROWS, WIDTH),
    )
    stats = kernels.norm(x, norm, out)
    yield "norm", out
    yield "norm_back", kernels.norm_back(g, x, norm, stats, None)
    yield "norm_back with an addend", kernels.norm_back(g, x, norm, stats, g)


def _gates(kernels: Kernels, draw: Draw) -> Answers:
    activations: tuple[ActivationName, ...] = ("silu", "gelu_tanh")
    for activation in activations:
        h, g = 3 * draw.typed(ROWS, 2 * WIDTH), draw.typed(ROWS, WIDTH)
        out, back, again = draw.room(ROWS, WIDTH), draw.room(ROWS, 2 * WIDTH), draw.room(ROWS, WIDTH)
        kernels.gate(h, activation, True, out)
        yield f"gate {activation}", out
        kernels.gate_back(g, h, activation, True, back, again)
        yield f"gate_back {activation}", back
        yield f"gate_back {activation}, its second answer", again


def _int8(kernels: Kernels, draw: Draw) -> Answers:
    x, bias = draw.typed(ROWS, WIDTH), draw.typed(WIDTH)
    for fold in (None, draw.exact(WIDTH)):
        quants, scale = kernels.quantize_rows(x, fold)
        yield "quantize_rows", quants * scale[:, None]
        yield "the scales of quantize_rows", scale
    sums = torch.randint(-9_999, 9_999, (ROWS, WIDTH), generator=draw.generator, dtype=torch.int32)
    row, column = draw.exact(ROWS) / 1_000, draw.exact(WIDTH)
    yield "dequantize by rows alone", kernels.dequantize(sums, row, None, None, None, draw.dtype)
    for name, blocks in {"dequantize": BLOCKS, "dequantize with one block": BLOCKS[:1]}.items():
        term = low_rank_term(draw, ROWS, WIDTH, blocks)
        yield name, kernels.dequantize(sums, row, column, term, bias, draw.dtype)


def _int8_products(kernels: Kernels, draw: Draw) -> Answers:
    """In float32: with all that may come to them and with nothing, by one block of ranks and by several."""
    for rows, depth, columns in INT8_PRODUCTS:
        quants = torch.randint(-127, 128, (columns, depth), generator=draw.generator, dtype=torch.int8)
        x, g, bias = draw.typed(rows, depth), draw.typed(rows, columns), draw.typed(columns)
        fold, scale = draw.exact(depth), draw.exact(columns) / 1_000
        low = low_rank_term(draw, rows, columns, BLOCKS)
        whole = low_rank_term(draw, rows, depth, ((0, depth, 0, 5),))
        name = f"int8 product of {depth} in float32"
        yield name, kernels.product_int8(x, quants, fold, scale, low, bias, back=False)
        yield f"{name}, alone", kernels.product_int8(x, quants, None, None, None, None, back=False)
        yield f"{name}, back", kernels.product_int8(g, quants, scale, fold, whole, None, back=True)


def _low_ranks(kernels: Kernels, draw: Draw) -> Answers:
    for ranks in NARROW:
        x, m, out = draw.typed(MANY_ROWS, LONG), draw.typed(LONG, ranks), draw.room(MANY_ROWS, ranks)
        kernels.low_rank(x, m, out)
        yield f"low_rank of {ranks}", out
        g = draw.typed(MANY_ROWS, ranks)
        into = torch.ones(ranks, LONG)
        kernels.add_outer(g, x, into.split(2), 0.7)
        yield f"add_outer of {ranks}", into
        turned = torch.ones(LONG, ranks)
        kernels.add_outer(x, g, [turned], 0.7)
        yield f"add_outer of {ranks}, turned", turned


def _products(kernels: Kernels, draw: Draw) -> Answers:
    for rows, depth, columns in PRODUCTS:
        weight, x, bias = draw.typed(columns, depth), draw.typed(rows, depth), draw.typed(columns)
        g, out = draw.typed(rows, columns), draw.room(rows, depth)
        yield f"product of {depth}", kernels.products.linear(x, weight, bias)
        kernels.products.back(g, weight, out)
        yield f"product of {depth}, back", out


def _drops(kernels: Kernels, draw: Draw) -> Answers:
    mask = PackMasks((0,), ROWS, 2, WIDTH, torch.device("cpu")).of(1, WIDTH, 0.4)
    x, out, onto = draw.typed(ROWS, WIDTH), draw.room(ROWS, WIDTH), draw.typed(ROWS, WIDTH).clone()
    kernels.drop(x, mask, out)
    yield "dropout", out
    kernels.drop(x, mask, onto, add=True)
    yield "dropout onto something", onto


def _losses(kernels: Kernels, draw: Draw) -> Answers:
    for softcap in (None, 4.0):
        logits = 3 * draw.typed(ROWS, WIDTH)
        targets = torch.randint(0, WIDTH, (ROWS,), generator=draw.generator)
        yield "loss", kernels.loss_back(logits, targets, softcap)[None]
        yield "the gradient of the loss", logits


def _attentions(kernels: Kernels, draw: Draw) -> Answers:
    layout, width = plan_layout(small_pack()), 80
    norm = draw.norm(width)
    specs = {
        "attention": attention_spec(2, 1, width, width, scale=0.3),
        "attention with a window": attention_spec(2, 2, width, 16, scale=0.2, window=13, norm=norm),
        "narrow attention with a window": attention_spec(1, 1, width, 16, scale=0.2, window=13, norm=norm),
        "attention with a cap": attention_spec(1, 1, width, width, scale=0.3, softcap=5.0),
    }
    if draw.dtype == torch.bfloat16:  # the scores themselves are float32 in both: two say what differs
        specs = {name: specs[name] for name in ("attention", "narrow attention with a window")}
    for name, spec in specs.items():
        yield from attend(kernels, draw, spec, layout, name)


WORK: Final[tuple[Callable[[Kernels, Draw], Answers], ...]] = (
    _norms,
    _gates,
    _low_ranks,
    _products,
    _drops,
    _int8,
    _int8_products,
    _losses,
    _attentions,
)


def low_rank_term(
    draw: Draw, rows: int, width: int, blocks: Sequence[tuple[int, int, int, int]]
) -> LowRankTerm:
    """Random h and m, m zero outside of its blocks: (from column, to column, from rank, to rank)."""
    h, whole = draw.typed(rows, blocks[-1][3]), draw.typed(blocks[-1][3], width)
    m = torch.zeros_like(whole)
    for start, stop, first, last in blocks:
        m[first:last, start:stop] = whole[first:last, start:stop]
    return LowRankTerm(h, m, torch.tensor(blocks))


def attend(kernels: Kernels, draw: Draw, spec: AttentionSpec, layout: PackLayout, name: str) -> Answers:
    """One attention of random q, k, v and its gradient in each of the three."""
    num_tokens, queries = len(layout.batch.input_ids_T), spec.num_heads * spec.head_dim
    qkv, g = draw.typed(num_tokens, spec.value_at + queries), draw.typed(num_tokens, queries)
    qkv = qkv[:, : spec.value_at + spec.num_kv_heads * spec.head_dim]
    half = torch.randn(num_tokens, spec.rotary_dim // 2, generator=draw.generator)
    angle = torch.cat((half, half), -1)
    rope = Rope(angle.cos(), angle.sin())
    out, back = draw.room(num_tokens, queries), draw.room(*qkv.shape)
    saved = kernels.attention(qkv, spec, rope, layout, out)
    yield name, out
    kernels.attention_back(g, qkv, out, saved, spec, rope, layout, back)
    bounds = {
        "queries": (0, spec.key_at),
        "keys": (spec.key_at, spec.value_at),
        "values": (spec.value_at, None),
    }
    for part, (start, end) in bounds.items():
        yield f"{name}: the gradient of the {part}", back[:, start:end]


def attention_spec(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    norm: Norm | None = None,
) -> AttentionSpec:
    """Queries, then keys, then values, head by head."""
    key_at = num_heads * head_dim
    return AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        scale=scale,
        query_at=0,
        query_step=head_dim,
        key_at=key_at,
        value_at=key_at + num_kv_heads * head_dim,
        kv_step=head_dim,
        window=window,
        softcap=softcap,
        query_norm=norm,
        key_norm=norm,
    )


def small_pack() -> Batch:
    """Four rows, three of them with a shared beginning, two with a longer one; every length modulo 4."""
    none = torch.empty(0, dtype=torch.int64)
    tokens = torch.arange(NUM_TOKENS)
    return Batch(tokens, tokens, none, none, SEGMENTS, DOCUMENTS)
