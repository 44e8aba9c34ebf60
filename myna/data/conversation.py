"""The one normal form for data: a row becomes a Conversation at once and stays one until it is rendered.

These are made once or more for each row, so they are msgspec's records, which are made five times faster than dataclasses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from msgspec import Struct
from msgspec.structs import replace

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")


class Place(Struct, frozen=True, gc=False):
    """Where a row stands: a file and its line (JSONL, CSV) or its number (JSON arrays, tables), from 1.

    `part` says which part of a row that holds several conversations: a question's id, a path of replies.
    """

    path: str
    line: int
    unit: Literal["line", "row"] = "line"
    part: str = ""

    def __str__(self) -> str:
        place = f"{self.path}:{self.line}" if self.unit == "line" else f"{self.path}: row {self.line}"
        return f"{place}, {self.part}" if self.part else place


class Row(Struct, frozen=True):
    """One record as it was read: keys to values, nothing interpreted."""

    values: Mapping[str, Any]
    place: Place


class Message(Struct, frozen=True, gc=False):
    """A turn. An assistant turn that is not `trained` (weight 0 in OpenAI's rows) is context: no loss looks at it."""

    role: Role
    content: str
    trained: bool = True


class Conversation(Struct, frozen=True):
    """Turns in order: an optional system message, then user and assistant in turn, ending with assistant.

    Conversations of one `group` (what stands under `data.group_by` in their rows) are held out together.
    """

    messages: tuple[Message, ...]
    place: Place | None = None
    group: str | None = None

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
        return replace(self, messages=(Message("system", system), *self.messages))

    def last_turn_trained(self) -> Conversation:
        """The same with every assistant turn but the last one as context."""
        earlier = (replace(m, trained=m.trained and m.role != "assistant") for m in self.messages[:-1])
        return replace(self, messages=(*earlier, self.messages[-1]))

    def as_dicts(self) -> list[dict[str, str]]:
        """As chat templates and `messages` rows have it."""
        return [{"role": m.role, "content": m.content} for m in self.messages]
