"""`myna doctor --bench`: this machine's peaks, measured in seconds, and the training speed to expect by model size."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Final

from myna.doctor import Report
from myna.engine.compiler import NotNative
from myna.engine.estimate import BaseShape, estimate_memory
from myna.engine.native import load_native
from myna.engine.native_library import native_library
from myna.engine.peaks import copy_bandwidth, product_peak
from myna.engine.threads import fast_in_bfloat16, fast_in_int8, usable_cores
from myna.errors import MachineError
from myna.machine import Finding, gigabytes, memory_room, no_kernels
from myna.plan import MEMORY_SHARE, cpu_dtype

# The share of a product's peak that a training step reaches, as measured on the packaged model: SmolLM2-135M, LoRA r 16,
# packs of chat rows, the C kernels, two cores each. That of int8 is of the int8 peak. Where bf16 is fast: an AMD EPYC with
# AVX512-BF16 and VNNI. Elsewhere: two Intel servers whose int8 is four times as fast as their fp32, so that what is left in
# fp32 weighs more (0.43 and 0.64 in fp32, 0.16 and 0.24 in int8). What is multiplied in fp32 reaches fp32's share, whatever
# the weights are kept as.
SHARE_OF_PEAK: Final = {
    True: {"bf16": 0.55, "fp32": 0.55, "int8": 0.38},
    False: {"bf16": 0.5, "fp32": 0.5, "int8": 0.2},
}
TARGET_SHARE: Final = 0.5  # of a row's tokens that are trained on: the head runs over these alone
RANK: Final = 16
PACK_TOKENS: Final = 1_024  # the default of train.pack_tokens

PEAKS: Final = ("fp32", "bf16", "int8")
# Shapes that are widely used, from the config.json of a model of each size.
SHAPES: Final = {
    "135M": BaseShape(30, 576, 1_536, True, 576, 192, 9, 49_152, True),  # SmolLM2-135M
    "360M": BaseShape(32, 960, 2_560, True, 960, 320, 15, 49_152, True),  # SmolLM2-360M
    "0.5B": BaseShape(24, 896, 4_864, True, 896, 128, 14, 151_936, True),  # Qwen2.5-0.5B
    "1B": BaseShape(16, 2_048, 8_192, True, 2_048, 512, 32, 128_256, True),  # Llama-3.2-1B
    "1.5B": BaseShape(28, 1_536, 8_960, True, 1_536, 256, 12, 151_936, True),  # Qwen2.5-1.5B
    "3B": BaseShape(28, 3_072, 8_192, True, 3_072, 1_024, 24, 128_256, True),  # Llama-3.2-3B
    "8B": BaseShape(32, 4_096, 14_336, True, 4_096, 1_024, 32, 128_256, False),  # Llama-3.1-8B
}


@dataclass(frozen=True)
class Expectation:
    """Training one size of model with one kind of base weights.

    `tokens_per_s` is None where this machine has no such product.
    """

    model: str
    base: str  # bf16, fp32 or int8
    flops_a_token: float
    tokens_per_s: float | None
    memory_bytes: int
    fits: bool


@dataclass(frozen=True)
class Bench:
    """What was measured, as findings, and what follows from it."""

    findings: tuple[Finding, ...]
    expectations: tuple[Expectation, ...]

    def joined(self, report: Report) -> Report:
        """The report with these findings in place of those of the same name, the others at its end."""
        mine = {finding.name: finding for finding in self.findings}
        kept = [mine.pop(finding.name, finding) for finding in report.findings]
        return replace(report, findings=(*kept, *mine.values()))

    def to_json(self) -> list[dict[str, Any]]:
        return [asdict(expectation) for expectation in self.expectations]


def run_bench() -> Bench:
    """Compiles and tries the kernels, measures products and memory: a few seconds, with every core that may be used."""
    threads = usable_cores()
    kernels = try_kernels(threads)
    peaks = tuple(measure(f"peak:{dtype}", partial(product_peak, dtype, threads)) for dtype in PEAKS)
    memory = measure("bandwidth", partial(copy_bandwidth, threads))
    found = {finding.name.removeprefix("peak:"): finding.value for finding in peaks}
    return Bench((kernels, *peaks, memory), expectations(found, has_kernels=kernels.status == "ok"))


def try_kernels(threads: int) -> Finding:
    """The C kernels compiled (or found in the cache), loaded, and held against torch's."""
    started = time.perf_counter()
    try:
        load_native(threads)
    except NotNative as error:
        return no_kernels(error)
    seconds, made_by = time.perf_counter() - started, native_library().compiler
    text = f"C kernels for training: by {made_by}, they answer as torch does ({seconds:.1f} s)"
    return Finding("kernels", "ok", text, made_by)


def measure(name: str, work: Callable[[], float]) -> Finding:
    """A peak as a finding; its value is FLOP/s or bytes/s, None where this machine has no such product."""
    try:
        value = work()
    except MachineError as error:
        return Finding(name, "warn", error.message, None, error.help)
    if name == "bandwidth":
        return Finding(name, "ok", f"memory is copied at {value / 1e9:,.0f} GB/s, read and written", value)
    text = f"{name.removeprefix('peak:')} matrix products: {value / 1e9:,.0f} GFLOP/s"
    return Finding(name, "ok", text, value)


def expectations(peaks: dict[str, float | None], *, has_kernels: bool) -> tuple[Expectation, ...]:
    """For every size, with the base in the format that `myna train` takes by default here, and in int8."""
    total = memory_room()[1]
    found = []
    fast_bf16 = fast_in_bfloat16()
    for model, shape in SHAPES.items():
        plain = cpu_dtype(shape, fast_bf16=fast_bf16, total_memory_mb=total / 1e6)
        for base in (plain, "int8"):
            multiplied = multiplied_in(base)
            peak, share, room = peaks[multiplied], SHARE_OF_PEAK[fast_bf16][multiplied], MEMORY_SHARE * total
            found.append(expect(model, base, plain, peak, share, room, has_kernels=has_kernels))
    return tuple(found)


def multiplied_in(base: str) -> str:
    """What a plan multiplies weights of this format in here: fp32 where the CPU is slower in theirs."""
    slow = (base == "bf16" and not fast_in_bfloat16()) or (base == "int8" and not fast_in_int8())
    return "fp32" if slow else base


def expect(
    model: str, base: str, plain: str, peak: float | None, share: float, room: float, *, has_kernels: bool
) -> Expectation:
    """`peak` in FLOP/s, of which training reaches `share`; `room` in bytes.

    The adapter and what is not a frozen linear stay in the format `plain`.
    """
    shape = SHAPES[model]
    flops = flops_a_token(shape)
    estimate = estimate_memory(
        shape,
        dtype=plain,
        rank=RANK,
        tokens=PACK_TOKENS,
        fast=True,
        native=has_kernels,
        quantize="int8" if base == "int8" else "none",
        int8_products="int8" if multiplied_in(base) == "int8" else "fp32",
        checkpoint_layers=0,
    )
    needed = int(estimate.total * 1e6)
    speed = None if peak is None else peak * share / flops
    return Expectation(model, base, flops, speed, needed, needed <= room)


def flops_a_token(shape: BaseShape, rank: int = RANK, target_share: float = TARGET_SHARE) -> float:
    """FLOP of the matrix products of a training step, a multiply and an add as two.

    The frozen linears forward and for the gradient in their input, the adapters on all of them also for their own, the head
    and its gradient on target tokens alone. Attention's own products are not counted.
    """
    middles = 2 if shape.gated else 1
    query_key_value = shape.query + 2 * shape.key_value
    linear = shape.width * (query_key_value + shape.query) + (middles + 1) * shape.width * shape.inner
    # in + out of q, k, v, o, then of gate, up, down
    edges = 4 * shape.width + query_key_value + shape.query + (middles + 1) * (shape.width + shape.inner)
    head = target_share * shape.vocabulary * shape.width
    return 4.0 * shape.layers * linear + 6.0 * shape.layers * rank * edges + 4.0 * head


def as_table(bench: Bench) -> tuple[tuple[str, ...], list[tuple[str, ...]], str]:
    """(heads, a row a model, a note) for a person: speed and memory with each kind of base."""
    by_model = {model: [e for e in bench.expectations if e.model == model] for model in SHAPES}
    heads = ("by default, tokens/s", "memory", "int8, tokens/s", "memory")
    rows = [(m, *(cell for e in own for cell in (_speed(e), _room(e)))) for m, own in by_model.items()]
    kernels = next(finding for finding in bench.findings if finding.name == "kernels")
    without = "" if kernels.status == "ok" else "; with the C kernels: without them it is slower"
    note = (
        f"LoRA r {RANK} on every linear layer, packs of {PACK_TOKENS:,} tokens, {TARGET_SHARE:.0%} of them trained on; from "
        f"the peaks above and the share of them that the packaged model reaches{without}"
    )
    if multiplied_in("int8") != "int8":
        note += "; int8 weights are multiplied in fp32: these cores are slow at integers"
    return ("model", *heads), rows, note


def _speed(expectation: Expectation) -> str:
    if expectation.tokens_per_s is None:
        return "–"
    return f"{expectation.tokens_per_s:,.0f}" + ("" if expectation.base == "int8" else f" {expectation.base}")


def _room(expectation: Expectation) -> str:
    return gigabytes(expectation.memory_bytes) + ("" if expectation.fits else ", above 60 % of all")
