"""What is wrong with rows, by code: how often, and the first three places. Of the rest nothing is held."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from myna.data.check import CODES, SHOWN_PLACES
from myna.errors import DataError

Level = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """All of one code: how often, and the first three places with what is wrong there."""

    code: str
    level: Level
    what: str
    count: int
    places: tuple[tuple[str, str], ...]
    cures: tuple[str, ...]


class Findings:
    """Faults and warnings counted as they come."""

    def __init__(self) -> None:
        self._counts: dict[tuple[Level, str], int] = {}
        self._shown: dict[tuple[Level, str], list[tuple[str, str, str | None]]] = {}

    def refuse(self, fault: DataError) -> None:
        """Counts an error."""
        self._add("error", fault.code, fault.where or "", fault.message, fault.help)

    def warn(self, code: str, where: object, message: str, help: str) -> None:
        """Counts a warning; `where` is written out where it is shown."""
        self._add("warning", code, where, message, help)

    def warn_many(self, code: str, count: int, first: list[tuple[object, str]], help: str) -> None:
        """Counts warnings of one kind at once; `first` are the places and messages of those to show."""
        for where, message in first:
            self.warn(code, where, message, help)
        if count > len(first):
            self._counts["warning", code] += count - len(first)

    def _add(self, level: Level, code: str, where: object, message: str, help: str | None) -> None:
        key = (level, code)
        count = self._counts[key] = self._counts.get(key, 0) + 1
        if count <= SHOWN_PLACES:
            self._shown.setdefault(key, []).append((str(where), message, help))

    def join(self, later: Findings) -> None:
        """Counts what was found in rows behind these too."""
        for key, count in later._counts.items():
            self._counts[key] = self._counts.get(key, 0) + count
            shown = self._shown.setdefault(key, [])
            shown += later._shown[key][: SHOWN_PLACES - len(shown)]

    def __iter__(self) -> Iterator[Finding]:
        """Errors first, each level by code."""
        for level, code in sorted(self._counts):
            shown = self._shown[level, code]
            cures = tuple(dict.fromkeys(help for _, _, help in shown if help))
            places = tuple((where, message) for where, message, _ in shown)
            yield Finding(code, level, CODES[code], self._counts[level, code], places, cures)
