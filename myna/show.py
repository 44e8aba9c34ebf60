"""Where stages tell how they are getting on: the terminal draws it, a test collects it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def _nothing(*_: Any) -> None:
    return None


@dataclass(frozen=True)
class Show:
    """Four places to listen at; by default nobody does."""

    say: Callable[[str], None] = _nothing
    stage: Callable[[str], None] = _nothing
    step: Callable[[Any], None] = _nothing
    progress: Callable[[str, int, int], None] = _nothing

    def counter(self, label: str, total: int) -> Callable[[], None]:
        """A function that counts its calls into a progress bar."""
        done = 0

        def advance() -> None:
            nonlocal done
            done += 1
            self.progress(label, done, total)

        return advance
