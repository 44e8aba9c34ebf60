"""Calls and results that ShareGPT rows have as text: LLaMA-Factory's lists, and Hermes' tags.

{"from": "gpt", "value": "Let me see.\\n<tool_call>\\n{\\"name\\": ..., \\"arguments\\": {...}}\\n</tool_call>"}
{"from": "tool", "value": "<tool_response>\\n...\\n</tool_response>"}
{"from": "observation", "value": "[..., ...]"}     the results of as many calls
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from myna.data.check import fault
from myna.data.conversation import Message, Place, ToolCall
from myna.data.tools import calls_of, from_text

CALL = ("<tool_call>", "</tool_call>")
RESULT = ("<tool_response>", "</tool_response>")
SPACE = re.compile(r"\s*")
MOST_LITERAL = 100_000  # characters that are read as Python's


def calls_of_role(value: Any, name: str, place: Place) -> tuple[ToolCall, ...]:
    """What stands under the role function_call: a call, or a list of them, as JSON text."""
    found = from_text(value, name, place)
    return calls_of(found if isinstance(found, list) else [found], name, place)


def calls_in_text(text: str, name: str, place: Place) -> tuple[str, tuple[ToolCall, ...]]:
    """A turn with Hermes' <tool_call> tags as what is said and the calls; the text alone where it has none.

    DataError where a tag is not closed, or there is text behind the first one.
    """
    opened, closed = CALL
    said, is_calling, _ = text.partition(opened)
    if not is_calling:
        return text, ()
    found, at = [], len(said)
    # by hand: a regular expression would look from every tag to the end of the text
    while text.startswith(opened, at) and (end := text.find(closed, at)) >= 0:
        found.append(text[at + len(opened) : end].strip())
        behind = SPACE.match(text, end + len(closed))
        at = behind.end() if behind else end + len(closed)
    if at < len(text):
        message = f"{name}: text stands behind a <tool_call>, or one is not closed"
        raise fault(
            "D019", message, where=place, help="the calls come last in a turn: <tool_call>{...}</tool_call>"
        )
    calls = [_json_of(call) for call in found]
    return said.rstrip(), calls_of(calls, f"{name}: <tool_call>", place)


def _json_of(text: str) -> Any:
    """A call as JSON text; the older rows of Hermes have Python's text of it, with single quotes."""
    if "'" in text and len(text) <= MOST_LITERAL:
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            try:
                return ast.literal_eval(text)
            except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
                return text
    return text


def results_apart(messages: Sequence[Message]) -> Iterator[Message]:
    """The same with a turn that holds the results of several calls as several; Hermes' tags are no part of a result."""
    calls: tuple[ToolCall, ...] = ()
    for number, message in enumerate(messages):
        if message.role != "tool":
            calls = message.calls
            yield message
            continue
        alone = messages[number - 1].role != "tool" and [
            m.role for m in messages[number + 1 : number + 2]
        ] != ["tool"]
        results = list(_tagged_results(message.content)) or [message.content]
        if alone and len(calls) > 1 and len(results) == 1:
            results = _listed(message.content, len(calls)) or results
        yield from (Message("tool", result, name=message.name) for result in results)


def _tagged_results(text: str) -> Iterator[str]:
    opened, closed = RESULT
    start = text.find(opened)
    while start >= 0 and (end := text.find(closed, start)) >= 0:
        yield text[start + len(opened) : end].removeprefix("\n").removesuffix("\n")
        start = text.find(opened, end)


def _listed(text: str, number: int) -> list[str]:
    """The items of a JSON list of that many, as texts."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return []
    if not isinstance(found, list) or len(found) != number:
        return []
    return [one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in found]
