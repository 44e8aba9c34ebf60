"""What this machine's matrix products and memory can do, measured in under a second: what speeds are held against."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Literal

import torch

from myna.errors import MachineError

ProductDtype = Literal["fp32", "bf16", "fp16", "int8"]

SIDES: Final = (1_024, 1_536, 2_048)
MOST_SECONDS: Final = (
    1.5  # a call that would take longer is left out: some CPUs have only slow products of some formats
)
SECONDS_A_SIDE: Final = 0.06
COPY_BYTES: Final = 128_000_000  # with its copy, larger than the caches of the CPUs that are trained on
COPY_SECONDS: Final = 0.15
FEWEST_CALLS: Final = 2  # the first also warms up: what it sets up and touches for the first time is kept
MOST_CALLS: Final = 1_000


def product_peak(dtype: str, threads: int | None = None, device: str = "cpu") -> float:
    """FLOP/s of a large square matrix product: the best single call over a few sizes, in about 0.3 s.

    Where they are slow, of the smaller sizes alone, in some seconds.

    dtype: "fp32", "bf16", "fp16", or "int8" (summed in int32; multiply and add count as two there too).
    threads: those that torch uses now where None; the setting is put back.
    Raises MachineError where this device has no such product in torch.
    """
    make = _PRODUCTS[dtype]
    with _threads(threads):
        try:
            best = 0.0
            for side in SIDES:
                if not best or 2 * side**3 < MOST_SECONDS * best:
                    best = max(best, _rate(make(side, device), 2 * side**3, SECONDS_A_SIDE, device))
            return best
        except (RuntimeError, NotImplementedError) as error:
            raise MachineError(
                f"torch has no {dtype} matrix product on {device}: {str(error).splitlines()[0]}",
                help="pip install --upgrade torch",
            ) from error


def copy_bandwidth(threads: int | None = None, device: str = "cpu") -> float:
    """Bytes/s of a large copy: what is read plus what is written, the best single call in about 0.3 s."""
    with _threads(threads):
        source = torch.ones(COPY_BYTES // 4, device=device)
        target = torch.empty_like(source)
        return _rate(lambda: target.copy_(source), 2 * COPY_BYTES, COPY_SECONDS, device)


def _float_product(dtype: torch.dtype) -> Callable[[int, str], Callable[[], object]]:
    def make(side: int, device: str) -> Callable[[], object]:
        drawn = torch.Generator(device).manual_seed(0)
        a, b = (torch.randn(side, side, generator=drawn, device=device).to(dtype) for _ in range(2))
        out = torch.empty(side, side, dtype=dtype, device=device)
        return lambda: torch.mm(a, b, out=out)

    return make


def _int8_product(side: int, device: str) -> Callable[[], object]:
    drawn = torch.Generator(device).manual_seed(0)
    shape, out = (side, side), torch.empty(side, side, dtype=torch.int32, device=device)
    a, b = (
        torch.randint(-127, 128, shape, generator=drawn, device=device, dtype=torch.int8) for _ in range(2)
    )
    columns = b.t()  # the layout in which CPUs and GPUs alike take the second factor
    return lambda: torch._int_mm(a, columns, out=out)


_PRODUCTS: Final[dict[str, Callable[[int, str], Callable[[], object]]]] = {
    "fp32": _float_product(torch.float32),
    "bf16": _float_product(torch.bfloat16),
    "fp16": _float_product(torch.float16),
    "int8": _int8_product,
}


def _rate(call: Callable[[], object], work: float, seconds: float, device: str) -> float:
    """Work a second of the fastest of as many calls as `seconds` allow: a busy neighbour slows the others."""
    finish = torch.cuda.synchronize if device.startswith("cuda") else _nothing
    finish()
    best, until, calls = float("inf"), time.perf_counter() + seconds, 0
    while calls < FEWEST_CALLS or (calls < MOST_CALLS and time.perf_counter() < until):
        started = time.perf_counter()
        call()
        finish()
        best, calls = min(best, time.perf_counter() - started), calls + 1
    return work / best


def _nothing() -> None:
    """A CPU's work is done when the call returns."""


@contextmanager
def _threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        if threads is not None:
            torch.set_num_threads(before)
