"""The compiled kernels: right at every vector width, caught where they are miscompiled, and honest about NaN."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from myna.data.packing import Batch, Segment
from myna.engine import native, native_check
from myna.engine.compiler import COMPILERS, FLAGS, SOURCE_FOLDER, SOURCES, NotNative
from myna.engine.kernels import Kernels
from myna.engine.layout import plan_layout
from myna.engine.native import NativeKernels, load_native
from myna.engine.native_check import (
    TOLERANCE,
    WORK,
    Draw,
    attend,
    attention_spec,
    check_native,
    compared,
)
from myna.engine.native_library import NativeLibrary, load_library, native_library
from myna.engine.native_products import NativeProducts
from myna.engine.step import best_kernels
from myna.engine.torch_kernels import TorchKernels

COMPILER = next((name for name in COMPILERS if shutil.which(name)), None)
pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler here")
IS_X86 = platform.machine() in ("x86_64", "AMD64")
CPU_FLAGS = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").is_file() else []
DTYPES = tuple(TOLERANCE)

# Vectors of 16, 8 and 4 floats, where this machine has them.
BUILDS = [
    pytest.param((name, march), id=f"{name} {march}")
    for name in dict.fromkeys(filter(None, (COMPILER, shutil.which("clang") and "clang")))
    for march in ("native", *(("x86-64-v3", "x86-64") if IS_X86 else ()))
]


def build(folder: Path, compiler: str, *flags: str, sources: Path = SOURCE_FOLDER) -> NativeLibrary:
    made = folder / "kernels.so"
    command = [
        compiler,
        *FLAGS,
        *flags,
        "-shared",
        "-fPIC",
        "-o",
        str(made),
        str(sources / SOURCES[0]),
        "-lm",
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return load_library(made, compiler)


@pytest.fixture(scope="module", params=BUILDS)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> NativeLibrary:
    compiler, march = request.param
    if march == "x86-64-v3" and "avx2" not in CPU_FLAGS:
        pytest.skip("these cores have no AVX2")
    if march == "native" and compiler == COMPILER:
        return native_library()
    return build(tmp_path_factory.mktemp("build"), compiler, f"-march={march}")


def all_native(library: NativeLibrary, threads: int) -> NativeKernels:
    return NativeKernels(library, threads, NativeProducts(library))


@pytest.fixture(scope="module")
def kernels(library: NativeLibrary) -> NativeKernels:
    return all_native(library, 1)


# Against torch's


def test_every_vector_width_answers_as_torch_does(kernels: NativeKernels) -> None:
    check_native(kernels)


@pytest.mark.parametrize("window", [None, 2, 5, 64, 65, 200])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_long_rows_answer_as_torch_does(
    kernels: NativeKernels, window: int | None, softcap: float | None
) -> None:
    """Tiles of queries and chunks of keys before, across and behind the diagonal and the window's edge."""
    segments = (
        Segment(0, 301),
        Segment(301, 290, 0),
        Segment(591, 7, 0),
        Segment(598, 97, 2),
        Segment(695, 64),
    )
    layout = plan_layout(pack(*segments, documents=((0, 1), (0, 2, 3), (4,))))
    assert_alike(kernels, attention_spec(4, 2, 48, 32, scale=0.3, window=window, softcap=softcap), layout)


def test_scores_far_apart_are_softened_as_torch_does(kernels: NativeKernels) -> None:
    """A later chunk's scores exceed the earlier ones' by more than float32's exponent spans, and the other way round."""
    layout = plan_layout(pack(Segment(0, 200), documents=((0,),)))
    assert_alike(kernels, attention_spec(2, 1, 32, 32, scale=6.0), layout, within=1e-4)


def assert_alike(kernels: Kernels, spec: Any, layout: Any, within: float = TOLERANCE[torch.float32]) -> None:
    draws = (Draw(torch.Generator().manual_seed(1), torch.float32) for _ in range(2))
    mine, theirs = (
        list(attend(k, draw, spec, layout, "attention"))
        for k, draw in zip((kernels, TorchKernels()), draws, strict=True)
    )
    for (name, a), (_, b) in zip(mine, theirs, strict=True):
        assert float((a - b).norm() / b.norm()) < within, name


def pack(*segments: Segment, documents: tuple[tuple[int, ...], ...]) -> Batch:
    none = torch.empty(0, dtype=torch.int64)
    tokens = torch.arange(sum(segment.length for segment in segments))
    return Batch(tokens, tokens, none, none, segments, documents)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bytes_do_not_depend_on_the_threads(library: NativeLibrary, dtype: torch.dtype) -> None:
    answers = []
    for threads in (1, 3):
        try:
            kernels = all_native(library, threads)
        except NotNative as error:
            pytest.skip(str(error))
        answers.append([mine.clone() for _, mine, _ in compared(kernels, kernels, dtype)])
    NativeKernels(library, 1)  # the number of threads is the library's
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))


@dataclass(frozen=True)
class KeptDraw(Draw):
    """Remembers what was drawn, to see whether it is still so."""

    drawn: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def typed(self, *shape: int) -> torch.Tensor:
        x = super().typed(*shape)
        self.drawn.append((x, x.clone()))
        return x

    def exact(self, *shape: int) -> torch.Tensor:
        x = super().exact(*shape)
        self.drawn.append((x, x.clone()))
        return x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("work", WORK, ids=lambda work: work.__name__)
def test_no_kernel_writes_into_what_it_is_given(
    kernels: NativeKernels, work: Callable[[Kernels, Draw], Iterator[Any]], dtype: torch.dtype
) -> None:
    for each in (kernels, TorchKernels()):
        draw = KeptDraw(torch.Generator().manual_seed(0), dtype)
        assert len(list(work(each, draw))) > 0 and draw.drawn
        assert all(torch.equal(now, before) for now, before in draw.drawn), each.name


# The self-test

MISCOMPILED = {
    "e^x": ("native.c", "0.693359375f", "0.69f", "gate silu"),
    "gelu": ("native_typed.h", "0.7978845608028654f", "0.8f", "gate gelu_tanh"),
    "int8": ("native_typed.h", "/ 127.0f", "/ 126.0f", "quantize_rows"),
    "a bit of dropout's words": ("native_typed.h", "0xd35a2d97u", "0xd35a2d95u", "dropout"),
    "window": ("native_attention.h", "p - a->window + 1 -", "p - a->window + 2 -", "attention with a window"),
    "softmax over chunks": ("native_attention.h", "expf(before - now)", "1.0f", "attention"),
    "a key's gradient": ("native_attention.h", "n, q + first * D", "n, q", "attention: the gradient of the keys"),
    "probability of the target": ("native_typed.h", "p_hit - 1.0f", "p_hit - 0.9f", "the gradient of the loss"),
    "mean of squares": ("native_typed.h", "total(square) / a->d + a->eps", "total(square) / a->d", "norm"),
    "rows of the low-rank part": ("native_low_rank.h", "MIN(t + r, T - 1)", "MIN(t + r, T - 2)", "low_rank of 5"),
    "panels of the low-rank part": ("native_low_rank.h", "panel + k * nv * VW", "panel + k * VW", "low_rank of 53"),
    "an outer product's tokens": ("native_low_rank.h", "a->T - t);", "a->T - t - 1);", "add_outer of 5"),
    "an outer product, turned": ("native_low_rank.h", "into[r] += scale *", "into[r] +=", "add_outer of 5, turned"),
    "an outer product that is not added": ("native_low_rank.h", "into[k] += scale", "into[k] = scale", "add_outer of 5"),
    "blocks of ranks": ("native_low_rank.h", "MAX(*end, b[3])", "b[3] - 1", "dequantize"),
    "a column's own block": ("native_low_rank.h", "at < b[1]", "at + 1 < b[1]", "dequantize"),
    "rows of a product": ("native_products.h", "MIN(t + r, a->T - 1)", "MIN(t + r, a->T - 2)", "product of 700"),
    "parts of a product": ("native_products.h", "kept ? (t - first) * PANEL : 0", "0", "product of 700"),
    "panels of a product": ("native_products.h", "(at + v * VW + r) * a->ldw", "(at + r) * a->ldw", "product of 700"),
    "a product, back": ("native_products.h", "a->w + k * a->ldw + at", "a->w + k * a->ldw", "product of 700, back"),
    "panels of int8": ("native_products.h", "(first + r) * a->ldw", "r * a->ldw", "int8 product of 700 in float32"),
    "scales of int8": ("native_products.h", " * GETF(a->fold + i, m)", "", "int8 product of 700 in float32"),
    "int8, back": ("native_products.h", "(k + i) * a->ldw", "i * a->ldw", "int8 product of 53 in float32, back"),
    "ranks beside int8": ("native_products.h", "whole(a->K) + low;", "whole(a->K);", "int8 product of 700 in float32"),
    "a sign of the rotation": ("native_attention.h", "(cos + half + i) +", "(cos + half + i) -", "attention"),
}  # fmt: skip


@pytest.mark.parametrize("what", MISCOMPILED)
def test_a_miscompiled_kernel_is_caught(tmp_path: Path, what: str) -> None:
    name, right, wrong, told = MISCOMPILED[what]
    for source in SOURCES:
        text = (SOURCE_FOLDER / source).read_text()
        assert (right in text) == (source == name)
        (tmp_path / source).write_text(text.replace(right, wrong))
    assert COMPILER
    kernels = all_native(build(tmp_path, COMPILER, "-O0", sources=tmp_path), 1)
    with pytest.raises(NotNative, match=f"the compiled {told}.* differs from torch's in float32"):
        check_native(kernels)


def test_a_nan_in_an_answer_is_a_difference() -> None:
    class Spoiled(TorchKernels):
        def dequantize(self, *arguments: Any) -> torch.Tensor:
            y = super().dequantize(*arguments)
            y[-1, -1] = torch.nan
            return y

    check_native(TorchKernels())
    with pytest.raises(NotNative, match=r"the compiled dequantize.* differs from torch's in float32: nan"):
        check_native(Spoiled())


def test_the_self_test_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    check_native(TorchKernels())
    assert torch.equal(before, torch.get_rng_state())


@pytest.fixture
def forgotten() -> Iterator[None]:
    """As in a process that has not loaded the kernels yet."""
    caches = (native_library, native._try_once)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def test_loading_tries_the_kernels_once(monkeypatch: pytest.MonkeyPatch, forgotten: None) -> None:
    tried: list[Kernels] = []
    monkeypatch.setattr(native_check, "check_native", tried.append)
    assert load_native(1).name == load_native(1).name == "native"
    assert len(tried) == 1


def test_without_a_compiler_torch_serves_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: None
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    assert best_kernels("cpu", "fp32") == ("torch", "CC is no-such-compiler, which is no program here")
    monkeypatch.delenv("CC")
    assert best_kernels("cpu", "fp32") == ("native", "")


def test_kernels_that_answer_otherwise_are_not_used(monkeypatch: pytest.MonkeyPatch, forgotten: None) -> None:
    def refuse(_: Kernels) -> None:
        raise NotNative("the compiled norm differs")

    monkeypatch.setattr(native_check, "check_native", refuse)
    assert best_kernels("cpu", "bf16") == ("torch", "the compiled norm differs")


def test_a_file_that_is_no_library(tmp_path: Path) -> None:
    (tmp_path / "kernels.so").write_bytes(b"\x7fELF and nothing more")
    with pytest.raises(NotNative, match="does not load"):
        load_library(tmp_path / "kernels.so", "nobody")
