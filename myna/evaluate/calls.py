"""Answers that are calls of functions: compared by name and arguments, whatever dress a chat template has for calls."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from myna.data.conversation import Conversation, calls_text
from myna.data.render import ChatTokenizer, render_pieces, render_prompt

Call = tuple[str, dict[str, Any]]


def answer_ids(row: Conversation, tokenizer: ChatTokenizer) -> list[int]:
    """The tokens of the last assistant turn as the template writes it, its stop token with them."""
    ids, _ = render_pieces(row, tokenizer)
    return [int(i) for i in ids[len(render_prompt(row.prompt(), tokenizer)) :]]


def comparable(answer: str, row: Conversation, written: str) -> str:
    """An answer as it is compared with `row.answer()`: where calls are expected, the calls in it as JSON text.

    `written` is the expected turn as the template writes it: an answer that is just that is right in any dress. Parallel
    calls may stand in any order. The answer itself where it holds no call, or none is expected.
    """
    expected = row.messages[-1].calls
    if not expected:
        return answer
    found = list(calls_in(answer))
    wanted = [(call.name, json.loads(call.arguments)) for call in expected]
    if answer.strip() == written.strip() or _sorted(found) == _sorted(wanted):
        return row.answer()
    return calls_text(found) or answer


def calls_in(text: str) -> Iterator[Call]:
    """The calls that stand in a text as JSON: objects, or lists of them, with a name and `arguments` or `parameters`."""
    decoder, at = json.JSONDecoder(), 0
    while (at := _next_value(text, at)) < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            at += 1
            continue
        for one in value if isinstance(value, list) else [value]:
            if call := _as_call(one):
                yield call


def _next_value(text: str, at: int) -> int:
    """Where the next object or list begins."""
    return min((found for found in (text.find("{", at), text.find("[", at)) if found >= 0), default=len(text))


def _as_call(value: Any) -> Call | None:
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    return (value["name"], arguments) if isinstance(arguments, dict) else None


def _sorted(calls: Sequence[Call]) -> list[str]:
    return sorted(json.dumps(call, sort_keys=True) for call in calls)
