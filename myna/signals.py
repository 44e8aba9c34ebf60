"""Signals that ask a process to stop, noted so that what is being done can be finished."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

StopAsked = Callable[[], int | None]  # the number of the signal that asked to stop, if any did


@contextlib.contextmanager
def catch_signals() -> Iterator[StopAsked]:
    """Inside, HUP, INT and TERM are noted for `train` to see at the end of a step; a second one leaves at once."""
    noted: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        if noted:
            os._exit(128 + noted[0])
        noted.append(number)

    names = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no HUP
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    # one that is ignored (nohup, a background job) stays ignored
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in heard}
    try:
        yield lambda: noted[0] if noted else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
