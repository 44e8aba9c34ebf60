"""Whether a chat template writes all that a conversation has of tools. Most know none, and drop them without a word.

The conversation is rendered once more with a word of its own in the place of every function's name, description and
parameter, every argument and every result. A word that is not in the text is something that a model would never see.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from myna.data.check import named, shown
from myna.data.conversation import Conversation, Message, ToolCall
from myna.errors import ModelError

CURE = (
    "take a base whose chat template writes tools (Qwen2.5, Qwen3, Llama 3.1 and later, Hermes, Mistral), or put one into "
    "the base's folder as chat_template.jinja: docs/data.md, Tools, has one for ChatML"
)
TEXT_CURE = "take the text out of the turns that make calls, or take a base whose chat template writes both"
Words = dict[str, str]


def refuse_lost_tools(conversation: Conversation, render: Callable[..., str]) -> None:
    """ModelError with the row and what is lost where the template drops or refuses a tool, a call or a result."""
    words: Words = {}
    marked = Conversation(
        tuple(_marked(message, n, words) for n, message in enumerate(conversation.messages, start=1)),
        conversation.place,
        tuple(_marked_tool(tool, words) for tool in conversation.tools),
    )
    where = str(conversation.place) if conversation.place else None
    try:
        text = render(marked, add_generation_prompt=False)
    except ModelError as error:
        message = f"{error.message}; the row has tools"
        raise ModelError(message, where=where, help=CURE, code="lost-tools") from error
    lost = [thing for thing, word in words.items() if word not in text]
    if lost:
        message = f"the base's chat template drops what the row has of tools: {named(lost)}"
        only_text = all(thing.startswith("the text") for thing in lost)
        raise ModelError(message, where=where, help=TEXT_CURE if only_text else CURE, code="lost-tools")


def _word(words: Words, thing: str) -> str:
    """A word for a thing that must be seen: letters and digits, which nothing escapes."""
    return words.setdefault(thing, f"zq{len(words)}x7")


def _marked(message: Message, number: int, words: Words) -> Message:
    if message.role == "tool":
        return replace(message, content=_word(words, f"the result in message {number}"))
    if not message.calls:
        return message
    content = (
        _word(words, f"the text beside the calls in message {number}") if message.content.strip() else ""
    )
    calls = (
        _marked_call(call, f"call {n} in message {number}", words) for n, call in enumerate(message.calls, 1)
    )
    return replace(message, content=content, calls=tuple(calls))


def _marked_call(call: ToolCall, what: str, words: Words) -> ToolCall:
    arguments = {key: _word(words, f"{shown(key)} of {what}") for key in json.loads(call.arguments)}
    return ToolCall(_word(words, f"{shown(call.name)} of {what}"), json.dumps(arguments), call.id)


def _marked_tool(tool: str, words: Words) -> str:
    told: dict[str, Any] = json.loads(tool)
    function = dict(told["function"])
    what = f"the tool {shown(function['name'])}"
    function |= {"name": _word(words, what), "description": _word(words, f"the description of {what}")}
    parameters = function.get("parameters")
    if isinstance(parameters, dict) and isinstance(parameters.get("properties"), dict):
        added = {_word(words, f"the parameters of {what}"): {"type": "string", "description": "text"}}
        function["parameters"] = {**parameters, "properties": {**parameters["properties"], **added}}
    return json.dumps({**told, "function": function})
