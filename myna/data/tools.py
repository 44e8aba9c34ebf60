"""Tools in rows: descriptions of functions, and calls of them, in the dresses that rows have them in.

{"tools": [{"type": "function", "function": {"name": ..., "parameters": ...}}]}     or under `functions`
{"tool_calls": [{"id": ..., "type": "function", "function": {"name": ..., "arguments": "{...}"}}]}     OpenAI's
{"function_call": {"name": ..., "arguments": "{...}"}}                               OpenAI's older one
{"from": "function_call", "value": "{\\"name\\": ..., \\"arguments\\": {...}}"}          ShareGPT's, a list for several

Objects may be the JSON text of them, as cells of tables have it.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from myna.data.check import fault, named, shown
from myna.data.conversation import Message, Place, Role, ToolCall
from myna.data.json_rows import kind_of
from myna.errors import DataError

CALL = '{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{\\"city\\": \\"Lima\\"}"}}'
RESULT = '{"role": "tool", "tool_call_id": "c1", "content": "21 C"}'
DESCRIPTION = '{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {...}}}}'
NO_TOOLS = "rename the key where it describes no functions"
# Arrow gives an object every key that any row's has, null where a row has it not.
UNIONS = (".parquet", ".arrow", ".feather")


def from_text(value: Any, name: str, place: Place) -> Any:
    """A value that may be written as JSON text. DataError where that is broken, or names a key twice."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, object_pairs_hook=_once)
    except KeyError as error:
        message = f"{name}: the key `{shown(error.args[0])}` stands twice in one object"
        raise fault("D004", message, where=place) from None
    except (ValueError, RecursionError) as error:
        raise fault("D001", f"{name} is no JSON: {_reason(error)}", where=place) from None


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise KeyError(next(key for key in keys if keys.count(key) > 1))
    return values


def _reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _as_json(value: Any, name: str, place: Place) -> str:
    """The one text of an object. DataError where it holds what JSON has not, or half a character."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except UnicodeEncodeError:
        raise fault("D014", f"{name} holds half a character (surrogate)", where=place) from None
    except (ValueError, TypeError, RecursionError) as error:
        raise fault("D014", f"{name} is no JSON: {_reason(error)}", where=place) from None
    return text


def _as_given(value: Any, place: Place) -> Any:
    """A value without the keys that a table of structs added. What is text there has only what was written."""
    return _without_nulls(value) if place.path.endswith(UNIONS) else value


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


# Descriptions


def read_tools(value: Any, key: str, place: Place) -> tuple[str, ...]:
    """The descriptions of a row's functions, each as JSON text in OpenAI's form; none where the cell is empty."""
    name = f"`{shown(key)}`"
    if value is None or (isinstance(value, str) and not value.strip()):
        return ()
    value = from_text(_as_given(value, place), name, place)
    if not isinstance(value, list):
        raise fault("D014", f"{name} is {kind_of(value)}, not a list of tools", where=place, help=NO_TOOLS)
    tools = tuple(_described(tool, f"tool {n} of {name}", place) for n, tool in enumerate(value, start=1))
    names = tool_names(tools)
    if len(set(names)) < len(names):
        twice = next(one for one in names if names.count(one) > 1)
        message = f"{name} describes `{shown(twice)}` twice"
        raise fault("D019", message, where=place, help="take one of the two out, or give it another name")
    return tools


def _described(tool: Any, name: str, place: Place) -> str:
    tool = from_text(tool, name, place)
    if not isinstance(tool, dict):
        cure = f"a tool is {DESCRIPTION}; {NO_TOOLS}"
        raise fault("D014", f"{name} is {kind_of(tool)}, not an object", where=place, help=cure)
    kind = tool.get("type")
    function = tool.get("function")
    if function is None:
        if kind not in (None, "function") and "parameters" not in tool:
            raise fault(
                "D017", f"{name}: a tool of type `{shown(str(kind))}` is not supported yet", where=place
            )
        function = {key: one for key, one in tool.items() if key != "type" or kind != "function"}
        tool = {"type": "function", "function": function}
    if not isinstance(function, dict) or not _is_name(function.get("name")):
        raise fault("D012", f"{name} has no `name`", where=place, help=f"a tool is {DESCRIPTION}")
    return sys.intern(_as_json(tool, name, place))  # the same text in row after row


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


@functools.lru_cache(64)
def tool_names(tools: tuple[str, ...]) -> list[str]:
    """The names of the functions that are described."""
    return [str(json.loads(tool)["function"]["name"]) for tool in tools]


def refuse_undescribed(messages: Sequence[Message], tools: tuple[str, ...], place: Place) -> None:
    """DataError where a turn calls what the row's tools do not describe: a model would learn to make tools up."""
    if not tools:
        return  # a system text may describe them
    names = tool_names(tools)
    for number, message in enumerate(messages, start=1):
        for call in message.calls:
            if call.name not in names:
                what = f"message {number} calls `{shown(call.name)}`, which the row's tools do not describe: {named(names)}"
                raise fault(
                    "D019",
                    what,
                    where=place,
                    help=f"add it to the tools ({DESCRIPTION}), or take the row out",
                )


# Calls


def read_calls(turn: Mapping[str, Any], role: Role, name: str, place: Place) -> tuple[ToolCall, ...]:
    """The calls that a message makes, under `tool_calls` or the older `function_call`. DataError where one does not hold."""
    calls, older = (_as_given(turn.get(key), place) for key in ("tool_calls", "function_call"))
    if role != "assistant":
        message = f"{name} is from {role} and has `{'tool_calls' if calls else 'function_call'}`"
        raise fault("D019", message, where=place, help="only the assistant makes calls")
    if calls and older:
        message = f"{name} has both `tool_calls` and `function_call`"
        raise fault("D019", message, where=place, help="take one of the two out")
    if older:
        return (read_call(older, f"{name}: `function_call`", place),)
    return calls_of(calls, f"{name}: `tool_calls`", place)


def calls_of(value: Any, name: str, place: Place) -> tuple[ToolCall, ...]:
    """A list of calls, or the JSON text of one."""
    value = from_text(value, name, place)
    if not isinstance(value, list):
        raise fault(
            "D019", f"{name} is {kind_of(value)}, not a list of calls", where=place, help=f"a call is {CALL}"
        )
    calls = tuple(read_call(one, f"{name}, call {n}", place) for n, one in enumerate(value, start=1))
    ids = [call.id for call in calls if call.id is not None]
    if len(set(ids)) < len(ids):
        twice = next(one for one in ids if ids.count(one) > 1)
        cure = "give each call an id of its own, and its result the same"
        raise fault("D019", f"{name}: two calls have the id `{shown(twice)}`", where=place, help=cure)
    return calls


def read_call(value: Any, name: str, place: Place) -> ToolCall:
    """One call: OpenAI's object, or the name and the arguments alone."""
    value = from_text(value, name, place)
    if not isinstance(value, dict):
        raise fault(
            "D019", f"{name} is {kind_of(value)}, not an object", where=place, help=f"a call is {CALL}"
        )
    if value.get("type") not in (None, "function"):
        raise fault(
            "D017", f"{name}: a call of type `{shown(str(value['type']))}` is not supported yet", where=place
        )
    function = value.get("function", value)
    if not isinstance(function, dict) or not _is_name(function.get("name")):
        raise fault("D019", f"{name} names no function", where=place, help=f"a call is {CALL}")
    call_name = str(function["name"])
    arguments = _arguments(function, f"{name}, `{shown(call_name)}`", place)
    return ToolCall(_plain(call_name, name, place), arguments, read_id(value.get("id"), name, place))


def read_id(value: Any, name: str, place: Place) -> str | None:
    """The id of a call, as it or its result has it; a number as its text."""
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise fault("D014", f"{name}: the id is {kind_of(value)}, not a text", where=place)
    return _plain(str(value), name, place)


def _plain(text: str, name: str, place: Place) -> str:
    _as_json(text, name, place)
    return text


def _arguments(function: Mapping[str, Any], name: str, place: Place) -> str:
    value = function.get("arguments", function.get("parameters"))
    cure = """write {} where there are none; else an object, or its text: "{\\"city\\": \\"Lima\\"}\""""
    try:
        value = from_text(value, f"{name}: the text of `arguments`", place)
    except DataError as error:
        if error.code != "D001":
            raise
        raise fault("D019", error.message, where=place, help=cure) from None
    if not isinstance(value, dict):
        what = "is missing" if value is None else f"is {kind_of(value)}, not an object"
        raise fault("D019", f"{name}: `arguments` {what}", where=place, help=cure)
    return _as_json(value, f"{name}: `arguments`", place)


# Results


def without_answered(
    waiting: Sequence[ToolCall], message: Message, number: int, place: Place
) -> list[ToolCall]:
    """The calls that still wait for a result after this tool turn. DataError where it answers none of them."""
    for at, call in enumerate(waiting):
        if message.call_id in (None, call.id) and message.name in (None, call.name):
            return [*waiting[:at], *waiting[at + 1 :]]
    result = f"`{shown(message.call_id or message.name or '')}`"
    what = f"message {number} is the result of {result}, which no call before it waits for"
    cure = f"`tool_call_id` is the id of a call that has no result yet{_told(waiting)}"
    raise fault("D019", what, where=place, help=cure)


def unanswered(waiting: Sequence[ToolCall], number: int, place: Place) -> DataError:
    """The fault of a turn that comes before every call has its result."""
    what = f"message {number} comes before the result of a call{_told(waiting)}"
    return fault(
        "D019", what, where=place, help=f"after a turn with calls comes one result for each: {RESULT}"
    )


def uncalled(number: int, place: Place) -> DataError:
    """The fault of a result where nothing is called."""
    what = f"message {number} is a tool's result, and the turn before it calls nothing"
    cure = f'the assistant turn before it has "tool_calls": [{CALL}]'
    return fault("D019", what, where=place, help=cure)


def _told(waiting: Sequence[ToolCall]) -> str:
    told = named(call.name if call.id is None else f"{call.id} ({call.name})" for call in waiting)
    return f": {told}" if told else ""
