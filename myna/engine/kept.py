"""Where the inputs of checkpointed layers wait for the backward: on the device, in CPU memory, or on a disk.

    forward     x₀ ─► layers ─► x₁ ─► layers ─► x₂ …         each x goes to its place, and off the device
    backward                …  x₂ ◄─ x₁ ◄─ x₀               fetched in turn; on a GPU the next one while layers run

What is fetched is what was kept, bit for bit.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import IO, Any, Literal, Protocol

import torch

from myna.errors import MachineError

PlaceName = Literal["device", "cpu", "disk"]


class KeptInput(Protocol):
    """One tensor that waits."""

    def fetch(self) -> torch.Tensor:
        """The tensor, on its device; once."""


class InputPlace(Protocol):
    """A place to keep tensors at."""

    name: PlaceName

    def keep(self, x: torch.Tensor, before: KeptInput | None) -> KeptInput:
        """Takes x in; `before` was taken in before it in the same forward, and will be fetched after it."""


def input_place(name: PlaceName, *, device: str, folder: Path) -> InputPlace:
    """The place of that name, on a disk in `folder`. What a CPU computes is in CPU memory as it is."""
    if name == "disk":
        return OnDisk(folder)
    return InHostMemory() if name == "cpu" and device != "cpu" else OnDevice()


class OnDevice:
    """Kept where they are computed."""

    name: PlaceName = "device"

    def keep(self, x: torch.Tensor, before: KeptInput | None) -> KeptInput:
        return _Held(x)


class _Held:
    def __init__(self, x: torch.Tensor) -> None:
        self._x = x

    def fetch(self) -> torch.Tensor:
        return self._x


class InHostMemory:
    """Kept in CPU memory: from a GPU by copies of its own stream, page-locked, so that they run beside the layers."""

    name: PlaceName = "cpu"

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def keep(self, x: torch.Tensor, before: KeptInput | None) -> KeptInput:
        if x.is_cuda and x.device not in self._streams:
            self._streams[x.device] = torch.cuda.Stream(x.device)
        return _InHostMemory(x, before, self._streams.get(x.device))


class _InHostMemory:
    def __init__(self, x: torch.Tensor, before: KeptInput | None, stream: torch.cuda.Stream | None) -> None:
        self._device, self._before, self._stream = x.device, before, stream
        self._coming: torch.Tensor | None = None
        self._host = torch.empty(x.shape, dtype=x.dtype, pin_memory=stream is not None)
        if stream is None:
            self._host.copy_(x)
            return
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            self._host.copy_(x, non_blocking=True)
        x.record_stream(stream)  # x's memory is not given to another tensor before the copy is done

    def call(self) -> None:
        """Sets out to bring it back."""
        if self._coming is not None:
            return
        if self._stream is None:
            self._coming = self._host.clone()
            return
        with torch.cuda.stream(self._stream):
            self._coming = self._host.to(self._device, non_blocking=True)

    def fetch(self) -> torch.Tensor:
        self.call()
        x, self._coming = self._coming, None
        assert x is not None
        if self._stream is not None:
            here = torch.cuda.current_stream(self._device)
            here.wait_stream(self._stream)
            x.record_stream(here)
            if isinstance(self._before, _InHostMemory):
                self._before.call()  # after the wait, so that this one's layers do not wait for it
        self._before = None
        return x


class OnDisk:
    """Kept in files without a name: however the process ends, they are gone with it."""

    name: PlaceName = "disk"

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def keep(self, x: torch.Tensor, before: KeptInput | None) -> KeptInput:
        return _OnDisk(x, self._folder)


class _OnDisk:
    def __init__(self, x: torch.Tensor, folder: Path) -> None:
        self._shape, self._dtype, self._device, self._folder = x.shape, x.dtype, x.device, folder
        self._file: IO[bytes] | None = None
        try:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
            _write_all(self._file, _bytes_of(x.contiguous().cpu()))
        except OSError as error:
            self.close()
            raise _disk_error(error, folder) from error

    def fetch(self) -> torch.Tensor:
        assert self._file is not None
        x = torch.empty(self._shape, dtype=self._dtype)
        try:
            self._file.seek(0)
            _read_all(self._file, _bytes_of(x))
        except OSError as error:
            raise _disk_error(error, self._folder) from error
        finally:
            self.close()
        return x.to(self._device)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __del__(self) -> None:
        self.close()  # of a forward that had no backward


def _bytes_of(x: torch.Tensor) -> memoryview:
    return memoryview(x.view(torch.uint8).numpy().data).cast("B")


def _write_all(file: Any, view: memoryview) -> None:
    """A single write takes 2 GB at most."""
    while len(view):
        view = view[file.write(view) :]


def _read_all(file: Any, view: memoryview) -> None:
    while len(view):
        count = file.readinto(view)
        if not count:
            raise OSError("the file ends too early")
        view = view[count:]


def _disk_error(error: OSError, folder: Path) -> MachineError:
    return MachineError(
        f"the inputs of layers could not be kept on disk: {error.strerror or error}",
        where=str(folder),
        help="free some room there, then the same with --resume",
    )
