"""One conversation with tools, and the dresses that rows have it in."""

from __future__ import annotations

import json
from typing import Any

WEATHER: dict[str, Any] = {
    "name": "weather",
    "description": "Today's weather, in °C.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer", "default": None}},
        "required": ["city"],
    },
}
CLOCK: dict[str, Any] = {"name": "clock", "description": "The time."}
TOOLS = [{"type": "function", "function": WEATHER}, {"type": "function", "function": CLOCK}]
ARGUMENTS = {"city": 'San "José"', "days": 2}


def call(id: str | None = "c1", name: str = "weather", arguments: Any = None) -> dict[str, Any]:
    """OpenAI's object; the arguments as text unless they are given."""
    given = json.dumps(ARGUMENTS, ensure_ascii=False) if arguments is None else arguments
    told = {} if id is None else {"id": id}
    return {**told, "type": "function", "function": {"name": name, "arguments": given}}


def row(*, arguments: Any = None, ids: bool = True, tools: Any = TOOLS) -> dict[str, Any]:
    """A question, a call, its result, an answer, as OpenAI has it."""
    id = "c1" if ids else None
    result = {"role": "tool", "content": '{"celsius": 21}', **({"tool_call_id": id} if id else {})}
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How warm is it in San José?"},
        {"role": "assistant", "content": None, "tool_calls": [call(id, arguments=arguments)]},
        result,
        {"role": "assistant", "content": "21 °C."},
    ]
    return {"messages": turns, "tools": tools} if tools is not None else {"messages": turns}


def parallel_row() -> dict[str, Any]:
    """Two calls in one turn, the results in the other order; then another call, which is the answer to learn."""
    clock = call("b", "clock", "{}")
    return {
        "messages": [
            {"role": "user", "content": "How warm is it, and how late?"},
            {"role": "assistant", "content": None, "tool_calls": [call("a"), clock]},
            {"role": "tool", "tool_call_id": "b", "content": "noon"},
            {"role": "tool", "tool_call_id": "a", "content": "21"},
            {"role": "assistant", "content": "21 °C at noon."},
            {"role": "user", "content": "And now?"},
            {"role": "assistant", "content": "", "tool_calls": [call("c", "clock", "{}")]},
        ],
        "tools": TOOLS,
    }


def older_row() -> dict[str, Any]:
    """OpenAI's older functions."""
    turns = row(ids=False)["messages"]
    function = turns[2]["tool_calls"][0]["function"]
    turns[2] = {"role": "assistant", "content": None, "function_call": function}
    turns[3] = {"role": "function", "name": "weather", "content": turns[3]["content"]}
    return {"messages": turns, "functions": [WEATHER, CLOCK]}


def sharegpt_row() -> dict[str, Any]:
    """LLaMA-Factory's."""
    said = [turn["content"] for turn in row()["messages"]]
    told = json.dumps({"name": "weather", "arguments": ARGUMENTS})
    turns = zip(("system", "human", "function_call", "observation", "gpt"), said, strict=True)
    conversation = [
        {"from": role, "value": told if role == "function_call" else text} for role, text in turns
    ]
    return {"conversations": conversation, "tools": json.dumps([WEATHER, CLOCK])}


def hermes_row(*, literal: bool = False, said: str = "") -> dict[str, Any]:
    """Hermes': calls and results in tags; the older rows have Python's text of a call."""
    value = {"name": "weather", "arguments": ARGUMENTS}
    told = repr(value) if literal else json.dumps(value)
    texts = [turn["content"] for turn in row()["messages"]]
    texts[2] = f"{said}<tool_call>\n{told}\n</tool_call>"
    texts[3] = f"<tool_response>\n{texts[3]}\n</tool_response>"
    turns = zip(("system", "human", "gpt", "tool", "gpt"), texts, strict=True)
    return {
        "conversations": [{"from": role, "value": text} for role, text in turns],
        "tools": json.dumps(TOOLS),
    }
