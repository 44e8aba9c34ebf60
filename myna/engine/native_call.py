"""How Python calls the compiled library: tensors by their address, one function a number format."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from myna.engine.native_library import NativeLibrary

WIDEST_VECTOR = 16  # floats


class NativeCall:
    """Calls NAME_f32 or NAME_bf16 of a library, whichever `like` asks for."""

    def __init__(self, library: NativeLibrary) -> None:
        self._functions = library.functions

    def __call__(self, name: str, like: torch.Tensor, *arguments: Any) -> None:
        kind = "bf16" if like.dtype == torch.bfloat16 else "f32"
        assert like.dtype in (torch.bfloat16, torch.float32) and like.device.type == "cpu"
        getattr(self._functions, f"{name}_{kind}")(*(_c_value(argument) for argument in arguments))


def _c_value(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, float):
        return ctypes.c_float(value)
    if isinstance(value, int):
        return ctypes.c_int64(value)
    return ctypes.c_void_p(None) if value is None else ctypes.byref(value)


def in_rows(x: torch.Tensor) -> torch.Tensor:
    """x with its columns side by side; rows may have any stride."""
    return x if x.stride(1) == 1 else x.contiguous()


def whole_vectors(count: int) -> int:
    """As many floats as the widest vectors that hold `count`."""
    return -(-count // WIDEST_VECTOR) * WIDEST_VECTOR
