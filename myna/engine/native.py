"""The kernels in C: compiled once by this machine's own compiler, kept in the cache, tried against torch before use.

Where there is no compiler, or what it makes does not answer as torch does, the torch kernels serve: the same numbers up to
rounding, slower.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch

from myna.engine.compiler import NotNative
from myna.engine.dropout import DropoutMask
from myna.engine.kernels import ActivationName, AttentionSpec, LowRankTerm, Norm, Rope
from myna.engine.layout import PackLayout
from myna.engine.native_call import WIDEST_VECTOR, NativeCall, in_rows, whole_vectors
from myna.engine.native_library import NativeLibrary, native_library
from myna.engine.native_products import NativeProducts
from myna.engine.products import Products
from myna.engine.threads import gomp_parallel
from myna.engine.torch_kernels import TorchKernels

WIDEST_HEAD = 1024
NO_WINDOW = 1 << 40


class _Job(ctypes.Structure):
    """attention_job of native_attention.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("T", "H", "KV", "D", "R")),
        *((n, ctypes.c_int64) for n in ("query_at", "query_step", "key_at", "value_at", "kv_step")),
        *((name, ctypes.c_int64) for name in ("window", "num_places")),
        ("segments", ctypes.c_void_p),
        ("blocks", ctypes.c_void_p),
        ("num_blocks", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("below", "below_at", "places", "roots")),
        ("num_roots", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("cos", "sin", "query_norm", "key_norm")),
        *((name, ctypes.c_float) for name in ("query_eps", "key_eps", "scale", "softcap")),
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "kt", "vt", "lse", "o", "delta")),
        *((name, ctypes.c_void_p) for name in ("gq", "gk", "gv")),
    )


class NativeKernels(TorchKernels):
    """The protocol in C for float32 and bfloat16 on a CPU; what C does not cover is torch's."""

    name = "native"

    def __init__(
        self,
        library: NativeLibrary,
        threads: int,
        products: Products | None = None,
    ) -> None:
        super().__init__(products)
        self._call = NativeCall(library)
        self._scratch: dict[str, torch.Tensor] = {}
        parallel = gomp_parallel()
        if parallel is None and threads > 1:
            raise NotNative("the OpenMP that torch runs on has no GOMP_parallel")
        library.functions.myna_threads(ctypes.c_void_p(parallel), threads)

    def _room(self, name: str, *shape: int) -> torch.Tensor:
        """Memory kept from call to call; what is in it is not."""
        size = math.prod(shape)
        held = self._scratch.get(name)
        if held is None or held.numel() < size:
            held = self._scratch[name] = torch.empty(size)
        return held

    def norm(self, x: torch.Tensor, norm: Norm, out: torch.Tensor) -> Any:
        if norm.centred or norm.bias_d is not None:
            return super().norm(x, norm, out)
        inverse_T = torch.empty(len(x))
        x = in_rows(x)
        self._call(
            "myna_norm", x, x, x.stride(0), norm.weight_d, norm.eps, inverse_T, out, out.stride(0), *x.shape
        )
        return inverse_T

    def norm_back(
        self, g: torch.Tensor, x: torch.Tensor, norm: Norm, stats: Any, plus: torch.Tensor | None
    ) -> torch.Tensor:
        if norm.centred or norm.bias_d is not None:
            return super().norm_back(g, x, norm, stats, plus)
        g, x = in_rows(g), in_rows(x)
        plus = None if plus is None else in_rows(plus)
        gx = torch.empty(x.shape, dtype=x.dtype)
        added = (None, 0) if plus is None else (plus, plus.stride(0))
        self._call(
            "myna_norm_back",
            x,
            g,
            g.stride(0),
            x,
            x.stride(0),
            norm.weight_d,
            stats,
            *added,
            gx,
            gx.stride(0),
            *x.shape,
        )
        return gx

    def gate(self, h: torch.Tensor, activation: ActivationName, gated: bool, out: torch.Tensor) -> None:
        if not gated or activation == "gelu":
            super().gate(h, activation, gated, out)
            return
        h, kind = in_rows(h), 0 if activation == "silu" else 1
        self._call("myna_gate", h, h, h.stride(0), out, out.stride(0), len(h), h.shape[1] // 2, kind)

    def gate_back(
        self,
        g: torch.Tensor,
        h: torch.Tensor,
        activation: ActivationName,
        gated: bool,
        out: torch.Tensor,
        again: torch.Tensor,
    ) -> None:
        if not gated or activation == "gelu":
            super().gate_back(g, h, activation, gated, out, again)
            return
        g, h, kind = in_rows(g), in_rows(h), 0 if activation == "silu" else 1
        width = h.shape[1] // 2
        tensors = (g, h, out, again)
        self._call("myna_gate_back", h, *(v for t in tensors for v in (t, t.stride(0))), len(h), width, kind)

    def attention(
        self, qkv: torch.Tensor, spec: AttentionSpec, rope: Rope, layout: PackLayout, out: torch.Tensor
    ) -> Any:
        if not _fits(spec):
            return super().attention(qkv, spec, rope, layout, out)
        lse_HT = torch.empty(spec.num_heads, len(qkv))
        job = self._job(qkv, spec, rope, layout, lse_HT, back=False)
        self._call("myna_attention", qkv, job, qkv, qkv.stride(0), out, out.stride(0))
        return lse_HT

    def attention_back(
        self,
        g: torch.Tensor,
        qkv: torch.Tensor,
        answer: torch.Tensor,
        saved: Any,
        spec: AttentionSpec,
        rope: Rope,
        layout: PackLayout,
        out: torch.Tensor,
    ) -> None:
        if not _fits(spec):
            super().attention_back(g, qkv, answer, saved, spec, rope, layout, out)
            return
        g = in_rows(g)
        job = self._job(qkv, spec, rope, layout, saved, back=True)
        tensors = (g, qkv, answer, out)
        self._call("myna_attention_back", qkv, job, *(v for t in tensors for v in (t, t.stride(0))))

    def _job(
        self,
        qkv: torch.Tensor,
        spec: AttentionSpec,
        rope: Rope,
        layout: PackLayout,
        lse_HT: torch.Tensor,
        *,
        back: bool,
    ) -> _Job:
        tokens, heads, kv, width = len(qkv), spec.num_heads, spec.num_kv_heads, spec.head_dim
        tree = layout.tree
        norms = [None if n is None else n for n in (spec.query_norm, spec.key_norm)]
        rooms = {
            name: self._room(name, h, tokens, width)
            for name, h in (("q", heads), ("k", kv), ("v", kv), ("o", heads))
        }
        rooms["kt"] = self._room("kt", kv, width, tree.num_places)
        if back:
            rooms |= {n: self._room(n, heads, tokens, width) for n in ("gq", "gk", "gv")}
            rooms["vt"] = self._room("vt", kv, width, tree.num_places)
            rooms["delta"] = self._room("delta", heads, tokens)
        return _Job(
            T=tokens,
            H=heads,
            KV=kv,
            D=width,
            R=spec.rotary_dim,
            query_at=spec.query_at,
            query_step=spec.query_step,
            key_at=spec.key_at,
            value_at=spec.value_at,
            kv_step=spec.kv_step,
            window=spec.window or NO_WINDOW,
            num_places=tree.num_places,
            num_blocks=len(tree.blocks),
            num_roots=len(tree.roots),
            scale=spec.scale,
            softcap=spec.softcap or 0.0,
            query_eps=norms[0].eps if norms[0] else 0.0,
            key_eps=norms[1].eps if norms[1] else 0.0,
            query_norm=norms[0].weight_d.data_ptr() if norms[0] else None,
            key_norm=norms[1].weight_d.data_ptr() if norms[1] else None,
            cos=rope.cos_TR.data_ptr(),
            sin=rope.sin_TR.data_ptr(),
            lse=lse_HT.data_ptr(),
            **{
                n: getattr(tree, n).data_ptr()
                for n in ("segments", "blocks", "below", "below_at", "places", "roots")
            },
            **{name: room.data_ptr() for name, room in rooms.items()},
        )

    def drop(self, x: torch.Tensor, mask: DropoutMask, out: torch.Tensor, *, add: bool = False) -> None:
        x, words = in_rows(x), (mask.rows_T, mask.columns_K, mask.threshold)
        tensors = (x, x.stride(0), *words, mask.scale, out, out.stride(0))
        self._call("myna_drop", x, *tensors, *x.shape, int(add))

    def quantize_rows(self, x: torch.Tensor, fold: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        x = in_rows(x)
        quants, scale_T = torch.empty(x.shape, dtype=torch.int8), torch.empty(len(x))
        self._call("myna_quantize_rows", x, x, x.stride(0), fold, quants, scale_T, *x.shape)
        return quants, scale_T

    def dequantize(
        self,
        sums: torch.Tensor,
        row_scale: torch.Tensor,
        column_scale: torch.Tensor | None,
        low: LowRankTerm | None,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        y = torch.empty(sums.shape, dtype=dtype)
        added: tuple[Any, ...] = (None, 0, None, 0, 0, None, 0, None, None)
        if low is not None:
            h, m = in_rows(low.h_TR), in_rows(low.m_RN)
            panels = self._room("panels", len(m), whole_vectors(m.shape[1]))
            wide = self._room("h", whole_vectors(len(h)), len(m) + WIDEST_VECTOR)
            blocks = low.blocks_B4
            added = (h, h.stride(0), m, m.stride(0), len(m), blocks, len(blocks), panels, wide)
        self._call("myna_dequantize", y, sums, row_scale, column_scale, bias, *added, y, *y.shape)
        return y

    def product_int8(
        self,
        x: torch.Tensor,
        quants_NK: torch.Tensor,
        fold: torch.Tensor | None,
        column_scale: torch.Tensor | None,
        low: LowRankTerm | None,
        bias: torch.Tensor | None,
        *,
        back: bool,
    ) -> torch.Tensor:
        x, quants_NK = in_rows(x), in_rows(quants_NK)
        y = torch.empty(len(x), quants_NK.shape[1 if back else 0], dtype=x.dtype)
        added: tuple[Any, ...] = (None, 0, None, 0, 0, None, 0)
        if low is not None:
            h, m = in_rows(low.h_TR), in_rows(low.m_RN)
            added = (h, h.stride(0), m, m.stride(0), len(m), low.blocks_B4, len(low.blocks_B4))
        wide = self._room("x", len(x), whole_vectors(x.shape[1]) + whole_vectors(added[4]))
        weight = (quants_NK, quants_NK.stride(0), int(not back), column_scale)
        shape = (*x.shape, y.shape[1])
        self._call(
            "myna_product_int8", x, x, x.stride(0), fold, *weight, bias, *added, wide, y, y.stride(0), *shape
        )
        return y

    def low_rank(self, x: torch.Tensor, m: torch.Tensor, out: torch.Tensor) -> None:
        x, m = in_rows(x), in_rows(m)
        assert m.dtype == out.dtype == x.dtype
        panels = self._room("panels", len(m), whole_vectors(m.shape[1]))
        strides = (x, x.stride(0), m, m.stride(0), panels, out, out.stride(0))
        self._call("myna_low_rank", x, *strides, *x.shape, m.shape[1])

    def add_outer(self, g: torch.Tensor, x: torch.Tensor, into: Sequence[torch.Tensor], scale: float) -> None:
        if any(rows.dtype != torch.float32 for rows in into):
            super().add_outer(g, x, into, scale)
            return
        assert g.dtype == x.dtype and all(rows.stride(1) == 1 or rows.shape[1] == 1 for rows in into)
        turned, starts = 0, [into[0].data_ptr()]
        if len(into) == 1 and x.shape[1] < g.shape[1]:  # the narrow one first, the answer written turned
            g, x, turned = x, g, into[0].stride(0)
        else:
            starts = [rows.data_ptr() + 4 * rows.stride(0) * n for rows in into for n in range(len(rows))]
        g, x = in_rows(g), in_rows(x)
        wide = self._room("wide", len(g), whole_vectors(g.shape[1]))
        pointers = (ctypes.c_void_p * len(starts))(*starts)
        more = (wide, pointers, turned, float(scale), len(g), g.shape[1], x.shape[1])
        self._call("myna_add_outer", x, g, g.stride(0), x, x.stride(0), *more)

    def loss_back(
        self, logits: torch.Tensor, targets: torch.Tensor, softcap: float | None, scale: float = 1.0
    ) -> torch.Tensor:
        loss_N = torch.empty(len(logits))
        self._call(
            "myna_loss", logits, logits, logits.stride(0), targets, loss_N, *logits.shape, softcap or 0.0
        )
        if scale != 1:  # float32 and bfloat16 hold what is smaller: afterwards is early enough
            logits.mul_(scale)
        return loss_N.sum()


def _fits(spec: AttentionSpec) -> bool:
    return spec.head_dim % 16 == 0 and spec.head_dim <= WIDEST_HEAD and spec.rotary_dim % 2 == 0


def load_native(threads: int, products: Products | None = None, *, widen: bool = False) -> NativeKernels:
    """The C kernels, compiled where they are not yet, tried before first use. NotNative says why they cannot be had.

    With `widen` bfloat16 tensors are multiplied in float32, in C too; without it products are `products`, or torch's.
    """
    _try_once(threads)
    library = native_library()
    return NativeKernels(library, threads, NativeProducts(library) if widen else products)


@functools.cache
def _try_once(threads: int) -> None:
    from myna.engine.native_check import check_native

    library = native_library()
    check_native(NativeKernels(library, threads, NativeProducts(library)))
