"""The values of rows as messages: texts that are texts, roles that are known, turns in their order."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from myna.data.check import fault, named, shown
from myna.data.conversation import ROLES, Message, Place, Role, ToolCall
from myna.data.json_rows import kind_of
from myna.data.tool_texts import calls_in_text, calls_of_role, results_apart
from myna.data.tools import (
    from_text,
    read_calls,
    read_id,
    unanswered,
    uncalled,
    without_answered,
)

# Under `role` stand OpenAI's names; under `from` ShareGPT's, or OpenAI's again.
OPENAI_ROLES: Mapping[str, Role] = {
    **{role: role for role in ROLES},
    "developer": "system",
    "function": "tool",
}
ROLES_OF: Mapping[str, Mapping[str, Role]] = {
    "role": OPENAI_ROLES,
    "from": {
        "human": "user",
        "gpt": "assistant",
        "function_call": "assistant",
        "observation": "tool",
        **OPENAI_ROLES,
    },
}
PLAIN_ROLES: Mapping[str, Role] = {role: role for role in ROLES if role != "tool"}
WEIGHTS = (None, 0, 1)
CONTENT_OF: Mapping[str, str] = {"role": "content", "from": "value"}
TURN_KEYS = ("role", "content", "from", "value", "weight", "tool_calls", "function_call")
RESULT_KEYS = ("tool_call_id", "name")  # read of tools' results, and of no other turn
ORDER = "an optional system message, then user and assistant in turn, ending with assistant"
A_TEXT = "make it a text in quotes, or take the row out"
A_LIST = (
    'write [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}], or take the row out'
)


def is_plain_text(value: Any) -> bool:
    """Whether nothing can be wrong with a text: the quick answer for most. False says only that it is to be looked at."""
    return type(value) is str and value.isascii() and value != "" and not value.isspace()


def unread_keys(turn: Mapping[str, Any]) -> Iterator[str]:
    """The keys of a turn that nothing is read from."""
    role = turn.get("role", turn.get("from"))
    is_result = isinstance(role, str) and ROLES_OF["from"].get(role) == "tool"
    return (key for key in turn if key not in TURN_KEYS and not (is_result and key in RESULT_KEYS))


def read_text(value: Any, name: str, place: Place) -> str:
    """A cell as text: numbers and true/false as JSON writes them. DataError where it is empty or no text."""
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return json.dumps(value)
    return _checked_text(value, name, place)


def _checked_text(value: Any, name: str, place: Place) -> str:
    if value is None:
        raise fault("D013", f"{name} is null", where=place, help="fill it in, or take the row out")
    if not isinstance(value, str):
        raise fault("D014", f"{name} is {kind_of(value)}, not a text", where=place, help=A_TEXT)
    if not value.strip():
        raise fault("D013", f"{name} is empty", where=place, help="fill it in, or take the row out")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        message = f"{name} holds half a character (surrogate {ascii(value[error.start])[1:-1]})"
        cure = "write the whole character there, or take the half out"
        raise fault("D014", message, where=place, help=cure) from error
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
    if isinstance(value, str) and value.lstrip()[:1] == "[":  # a table's cell
        value = [_with_calls_as_text(turn) for turn in from_text(value, f"`{shown(key)}`", place)]
        return read_turns(value, key, place)
    if not isinstance(value, list):
        raise fault(
            "D014", f"`{shown(key)}` is {kind_of(value)}, not a list of messages", where=place, help=A_LIST
        )
    if all(isinstance(turn, str) for turn in value):
        value = _spoken_in_turn(value)
    messages = tuple(
        [
            _plain_turn(turn) or _read_turn(turn, f"message {n}", place)
            for n, turn in enumerate(value, start=1)
        ]
    )
    if "from" in value[0] and any(message.role == "tool" for message in messages):
        messages = tuple(results_apart(messages))
    refuse_disorder(messages, place)
    return messages


def _with_calls_as_text(turn: Any) -> Any:
    """A turn out of a text, in which null was written and not added by a table."""
    if not isinstance(turn, dict) or not turn.get("tool_calls"):
        return turn
    return {**turn, "tool_calls": json.dumps(turn["tool_calls"])}


def _spoken_in_turn(texts: Sequence[str]) -> list[dict[str, str]]:
    """LIMA's conversations: texts alone, the user's first."""
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]


def _plain_turn(turn: Any) -> Message | None:
    """The quick way for most turns: a role and a text that nothing can be wrong with, and nothing else."""
    if type(turn) is not dict or len(turn) != 2:
        return None
    role, content = turn.get("role"), turn.get("content")
    if type(role) is str and role in PLAIN_ROLES and is_plain_text(content):
        return Message(PLAIN_ROLES[role], content)  # type: ignore[arg-type]  # is_plain_text: a text
    return None


def _read_turn(turn: Any, name: str, place: Place) -> Message:
    if not isinstance(turn, dict):
        raise fault("D014", f"{name} is {kind_of(turn)}, not an object", where=place, help=A_LIST)
    role_key = "from" if turn.get("from") is not None and turn.get("role") is None else "role"
    if turn.get(role_key) is None:
        raise fault("D015", f"{name} has no `role`; its keys are: {named(map(str, turn))}", where=place)
    role = _read_role(turn[role_key], role_key, name, place)
    _refuse_later(turn, name, place)
    trained = turn.get("weight") is None or bool(turn["weight"])
    content_key = CONTENT_OF[role_key]
    calls = read_calls(turn, role, name, place) if turn.get("tool_calls") or turn.get("function_call") else ()
    if calls:
        return Message(role, _beside_calls(turn.get(content_key), name, place), trained, calls)
    if content_key not in turn:
        message = f"{name} has no `{content_key}`; its keys are: {named(map(str, turn))}"
        raise fault("D012", message, where=place)
    content = turn[content_key]
    if turn[role_key] == "function_call":
        return Message(role, "", trained, calls_of_role(content, f"{name} (function_call)", place))
    if isinstance(content, list):
        content = _joined_parts(content, name, place)
    if role == "tool":
        return _read_result(turn, content, name, place)
    text = _checked_text(content, f"{name} ({role})", place)
    if role_key == "from" and role == "assistant" and "<tool_call>" in text:
        text, calls = calls_in_text(text, name, place)
        return Message(role, text, trained, calls)
    return Message(role, text, trained)


def _beside_calls(content: Any, name: str, place: Place) -> str:
    """What is said in a turn that makes calls: often nothing."""
    if isinstance(content, list):
        content = _joined_parts(content, name, place)
    if content is None or content == "":
        return ""
    return _checked_text(content, f"{name} (assistant)", place)


def _read_result(turn: Mapping[str, Any], content: Any, name: str, place: Place) -> Message:
    """A tool's result; it may be an empty text, since some functions give nothing back."""
    text = "" if content == "" else _checked_text(content, f"{name} (tool)", place)
    call_id = read_id(turn.get("tool_call_id"), f"{name}: `tool_call_id`", place)
    function = read_id(turn.get("name"), f"{name}: `name`", place)
    return Message("tool", text, call_id=call_id, name=function)


def _read_role(value: Any, role_key: str, name: str, place: Place) -> Role:
    roles = ROLES_OF[role_key]
    if isinstance(value, str) and value in roles:
        return roles[value]
    said = shown(value) if isinstance(value, str) else kind_of(value)
    message = f"{name}: the role `{said}` is not known; the roles are: {named(roles)}"
    raise fault("D015", message, where=place)


def _refuse_later(turn: Mapping[str, Any], name: str, place: Place) -> None:
    """What a message may hold elsewhere and would be lost here without a word."""
    if turn.get("audio"):
        raise fault("D017", f"{name}: `audio` is not supported yet", where=place)
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
    """DataError unless system is first if at all, user and assistant take turns, and assistant is last.

    After an assistant turn with calls comes the result of each, and then the assistant again.
    """
    start = 1 if messages[0].role == "system" else 0
    expected: Role = "user"
    waiting: Sequence[ToolCall] = ()
    for number, message in enumerate(messages[start:], start=start + 1):
        if waiting:
            if message.role != "tool":
                raise unanswered(waiting, number, place)
            waiting = without_answered(waiting, message, number, place)
            expected = "assistant"
            continue
        if message.role == "tool":
            raise uncalled(number, place)
        if message.role != expected:
            what = f"message {number} is from {message.role}, where {expected} should speak"
            raise fault("D016", what, where=place, help=f"the order is: {ORDER}")
        expected = "assistant" if expected == "user" else "user"
        waiting = message.calls
    if messages[-1].role != "assistant":
        what = f"the last message is from {messages[-1].role}: there is no answer to learn"
        raise fault("D016", what, where=place, help=f"the order is: {ORDER}")
