"""The values of rows as messages: texts that are texts, roles that are known, turns in their order."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from myna.data.check import fault, named, shown
from myna.data.conversation import ROLES, Message, Place, Role
from myna.data.json_rows import kind_of

# Under `role` stand OpenAI's names; under `from` ShareGPT's, or OpenAI's again.
ROLES_OF: Mapping[str, Mapping[str, Role]] = {
    "role": {role: role for role in ROLES},
    "from": {"human": "user", "gpt": "assistant", **{role: role for role in ROLES}},
}
WEIGHTS = (None, 0, 1)
CONTENT_OF: Mapping[str, str] = {"role": "content", "from": "value"}
LATER_ROLES = ("tool", "function", "developer", "function_call", "observation")
LATER_KEYS = ("tool_calls", "function_call")
TURN_KEYS = ("role", "content", "from", "value", "weight")
ORDER = "an optional system message, then user and assistant in turn, ending with assistant"


def is_plain_text(value: Any) -> bool:
    """Whether nothing can be wrong with a text: the quick answer for most. False says only that it is to be looked at."""
    return type(value) is str and value.isascii() and value != "" and not value.isspace()


def read_text(value: Any, name: str, place: Place) -> str:
    """A cell as text: numbers and true/false as JSON writes them. DataError where it is empty or no text."""
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return json.dumps(value)
    return _checked_text(value, name, place)


def _checked_text(value: Any, name: str, place: Place) -> str:
    if value is None:
        raise fault("D013", f"{name} is null", where=place, help="fill it in, or take the row out")
    if not isinstance(value, str):
        raise fault("D014", f"{name} is {kind_of(value)}, not a text", where=place)
    if not value.strip():
        raise fault("D013", f"{name} is empty", where=place, help="fill it in, or take the row out")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        message = f"{name} holds half a character (surrogate {ascii(value[error.start])[1:-1]})"
        raise fault("D014", message, where=place) from error
    return value


def is_true(value: Any) -> bool:
    """Whether a cell says yes: true, 1, or a table's text for it. Any other text is no."""
    if isinstance(value, str):
        return value.strip().lower() in ("true", "1", "yes")
    return value is True or (isinstance(value, int | float) and value == 1)


def read_turns(value: Any, key: str, place: Place) -> tuple[Message, ...]:
    """A list of messages, each with role and content or from and value, as checked messages."""
    if value is None or value == []:
        raise fault("D013", f"`{shown(key)}` holds no messages", where=place)
    if not isinstance(value, list):
        raise fault("D014", f"`{shown(key)}` is {kind_of(value)}, not a list of messages", where=place)
    if all(isinstance(turn, str) for turn in value):
        value = _spoken_in_turn(value)
    messages = tuple(_read_turn(turn, f"message {n}", place) for n, turn in enumerate(value, start=1))
    refuse_disorder(messages, place)
    return messages


def _spoken_in_turn(texts: Sequence[str]) -> list[dict[str, str]]:
    """LIMA's conversations: texts alone, the user's first."""
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]


def _read_turn(turn: Any, name: str, place: Place) -> Message:
    if not isinstance(turn, dict):
        raise fault("D014", f"{name} is {kind_of(turn)}, not an object", where=place)
    role_key = "from" if turn.get("from") is not None and turn.get("role") is None else "role"
    if turn.get(role_key) is None:
        raise fault("D015", f"{name} has no `role`; its keys are: {named(map(str, turn))}", where=place)
    role = _read_role(turn[role_key], role_key, name, place)
    _refuse_later(turn, name, place)
    content_key = CONTENT_OF[role_key]
    if content_key not in turn:
        message = f"{name} has no `{content_key}`; its keys are: {named(map(str, turn))}"
        raise fault("D012", message, where=place)
    content = turn[content_key]
    if isinstance(content, list):
        content = _joined_parts(content, name, place)
    trained = turn.get("weight") is None or bool(turn["weight"])
    return Message(role, _checked_text(content, f"{name} ({role})", place), trained)


def _read_role(value: Any, role_key: str, name: str, place: Place) -> Role:
    roles = ROLES_OF[role_key]
    if isinstance(value, str) and value in roles:
        return roles[value]
    said = shown(value) if isinstance(value, str) else kind_of(value)
    if value in LATER_ROLES:
        raise fault("D017", f"{name}: the role `{said}` is not supported yet", where=place)
    message = f"{name}: the role `{said}` is not known; the roles are: {named(roles)}"
    raise fault("D015", message, where=place)


def _refuse_later(turn: Mapping[str, Any], name: str, place: Place) -> None:
    """What a message may hold elsewhere and would be lost here without a word."""
    for key in LATER_KEYS:
        if turn.get(key):
            raise fault("D017", f"{name}: `{key}` is not supported yet", where=place)
    if turn.get("weight") not in WEIGHTS:
        message = f"{name}: `weight` is {shown(str(turn['weight']))}; 0 (no loss) and 1 are what is known"
        raise fault("D014", message, where=place, help="make it 0 or 1, or take it out")


def _joined_parts(parts: Sequence[Any], name: str, place: Place) -> str:
    """OpenAI's content parts as one text, nothing put between them."""
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            said = shown(kind) if isinstance(kind, str) else "no type"
            raise fault("D017", f"{name}: a content part of `{said}` is not supported yet", where=place)
        text = part.get("text", part.get("value"))
        if not isinstance(text, str):
            raise fault("D014", f"{name}: a text part without `text`", where=place)
        texts.append(text)
    return "".join(texts)


def refuse_disorder(messages: Sequence[Message], place: Place) -> None:
    """DataError unless system is first if at all, user and assistant take turns, and assistant is last."""
    start = 1 if messages[0].role == "system" else 0
    expected: Role = "user"
    for number, message in enumerate(messages[start:], start=start + 1):
        if message.role != expected:
            what = f"message {number} is from {message.role}, where {expected} should speak"
            raise fault("D016", what, where=place, help=f"the order is: {ORDER}")
        expected = "assistant" if expected == "user" else "user"
    if messages[-1].role != "assistant":
        what = f"the last message is from {messages[-1].role}: there is no answer to learn"
        raise fault("D016", what, where=place, help=f"the order is: {ORDER}")
