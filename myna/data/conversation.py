"""The one normal form for data: a row becomes a Conversation at once and stays one until it is rendered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")


@dataclass(frozen=True)
class Place:
    """Where a row stands: a file and its line (JSONL, CSV) or its number (JSON arrays, Parquet), from 1."""

    path: str
    line: int
    unit: Literal["line", "row"] = "line"

    def __str__(self) -> str:
        return f"{self.path}:{self.line}" if self.unit == "line" else f"{self.path}: row {self.line}"


@dataclass(frozen=True)
class Row:
    """One record as it was read: keys to values, nothing interpreted."""

    values: Mapping[str, Any]
    place: Place


@dataclass(frozen=True)
class Message:
    role: Role
    content: str


@dataclass(frozen=True)
class Conversation:
    """Turns in order: an optional system message, then user and assistant in turn, ending with assistant."""

    messages: tuple[Message, ...]
    place: Place | None = None

    def prompt(self) -> Conversation:
        """The conversation up to its last assistant turn: what a model is given to answer."""
        return Conversation(self.messages[:-1], self.place)

    def answer(self) -> str:
        """The last assistant turn: what a model should say."""
        return self.messages[-1].content

    def with_system(self, system: str | None) -> Conversation:
        """The same with `system` in front, unless it has a system message of its own."""
        if not system or (self.messages and self.messages[0].role == "system"):
            return self
        return Conversation((Message("system", system), *self.messages), self.place)

    def as_dicts(self) -> list[dict[str, str]]:
        """As chat templates and `messages` rows have it."""
        return [{"role": m.role, "content": m.content} for m in self.messages]
