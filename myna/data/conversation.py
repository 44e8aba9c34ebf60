"""The one normal form for data: a row becomes a Conversation at once and stays one until it is rendered.

These are made once or more for each row, so they are msgspec's records, which are made five times faster than dataclasses.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from msgspec import Struct
from msgspec.structs import replace

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")


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


class ToolCall(Struct, frozen=True, gc=False):
    """A call of a function. `arguments` is the JSON text of an object, in its order: so a call can be hashed."""

    name: str
    arguments: str = "{}"
    id: str | None = None

    def as_dict(self, *, as_text: bool = False) -> dict[str, Any]:
        """As chat templates have it, or with the arguments `as_text`, as OpenAI's rows have it."""
        arguments = self.arguments if as_text else json.loads(self.arguments)
        function = {"name": self.name, "arguments": arguments}
        told = {} if self.id is None else {"id": self.id}
        return {**told, "type": "function", "function": function}


class Message(Struct, frozen=True, gc=False):
    """A turn. An assistant turn that is not `trained` (weight 0 in OpenAI's rows) is context: no loss looks at it.

    An assistant turn may make `calls`; its content is then often empty. A tool turn is the result of one of them: of the
    one with `call_id`, where it has one, else of the first that has no result yet. `name` is its function's.
    """

    role: Role
    content: str
    trained: bool = True
    calls: tuple[ToolCall, ...] = ()
    call_id: str | None = None
    name: str | None = None

    @property
    def text(self) -> str:
        """All that is said in the turn: the content, and the calls' names and arguments."""
        if not self.calls:
            return self.content
        return "\n".join((self.content, *(f"{call.name} {call.arguments}" for call in self.calls)))

    def as_dict(self, *, as_text: bool = False) -> dict[str, Any]:
        """As chat templates have it, or with the calls' arguments `as_text`, as OpenAI's rows have it."""
        turn: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.calls:
            turn["tool_calls"] = [call.as_dict(as_text=as_text) for call in self.calls]
        if self.call_id is not None:
            turn["tool_call_id"] = self.call_id
        if self.name is not None:
            turn["name"] = self.name
        return turn


class Conversation(Struct, frozen=True):
    """Turns in order: an optional system message, then user and assistant in turn, ending with assistant.

    Plain text is one assistant message alone.

    Conversations of one `group` (what stands under `data.group_by` in their rows) are held out together.

    Between an assistant turn that makes calls and the next one stand their results. `tools` are the descriptions of the
    functions that may be called, each the JSON text of OpenAI's object.
    """

    messages: tuple[Message, ...]
    place: Place | None = None
    tools: tuple[str, ...] = ()
    group: str | None = None

    @property
    def is_text(self) -> bool:
        """Whether this is plain text: nothing is asked, and no chat template is put around it."""
        return len(self.messages) == 1 and self.messages[0].role == "assistant"

    def asked(self) -> tuple[Message, ...]:
        """What rows are told apart by where one prompt must not stand on two sides: the prompt, of plain text all of it."""
        return self.messages[:-1] if len(self.messages) > 1 or not self.is_text else self.messages

    def asked_of(self) -> Conversation:
        """The same as a conversation."""
        return self.first(len(self.asked()))

    def prompt(self) -> Conversation:
        """The conversation up to its last assistant turn: what a model is given to answer."""
        return self.first(len(self.messages) - 1)

    def first(self, num_messages: int) -> Conversation:
        """The conversation up to its first messages."""
        return replace(self, messages=self.messages[:num_messages])

    def answer(self) -> str:
        """The last assistant turn: what a model should say. Of one that makes calls their JSON text (`calls_text`)."""
        last = self.messages[-1]
        return calls_text([(call.name, json.loads(call.arguments)) for call in last.calls]) or last.content

    @property
    def uses_tools(self) -> bool:
        """Whether there is something in it that only a chat template which knows tools can write."""
        return bool(self.tools) or any(message.calls or message.role == "tool" for message in self.messages)

    def with_system(self, system: str | None) -> Conversation:
        """The same with `system` in front, unless it has a system message of its own or is plain text."""
        if not system or self.is_text or (self.messages and self.messages[0].role == "system"):
            return self
        return replace(self, messages=(Message("system", system), *self.messages))

    def last_turn_trained(self) -> Conversation:
        """The same with every assistant turn but the last one as context."""
        earlier = (replace(m, trained=m.trained and m.role != "assistant") for m in self.messages[:-1])
        return replace(self, messages=(*earlier, self.messages[-1]))

    def as_dicts(self) -> list[dict[str, Any]]:
        """As chat templates and `messages` rows have it."""
        return [message.as_dict() for message in self.messages]

    def tool_dicts(self) -> list[dict[str, Any]] | None:
        """The descriptions of its tools as chat templates have them, None where it has none. Not to be changed."""
        return _decoded(self.tools) if self.tools else None


@functools.lru_cache(64)  # the same tools stand in row after row
def _decoded(tools: tuple[str, ...]) -> list[dict[str, Any]]:
    return [json.loads(tool) for tool in tools]


def calls_text(calls: Sequence[tuple[str, Any]]) -> str:
    """Calls (name, arguments) as JSON: one as an object, several as a list, none as no text."""
    objects = [{"name": name, "arguments": arguments} for name, arguments in calls]
    if not objects:
        return ""
    return json.dumps(objects[0] if len(objects) == 1 else objects, ensure_ascii=False)
