"""Preference pairs (chosen and rejected answers) and labelled answers (KTO): read and checked, not trained on yet.

{"prompt", "chosen", "rejected"}                               texts, or the answer as a message
{"chosen": [messages], "rejected": [messages]}                 whole conversations that differ in the last answer
{"conversations": [...], "chosen": {message}, "rejected": {message}}
{"messages": [...], "label": true}                             whether the last answer is a good one
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from myna.data.check import fault, shown
from myna.data.conversation import Message, Place, Row
from myna.data.json_rows import kind_of
from myna.data.shapes import Keys, is_filled, text_of
from myna.data.turns import read_text, read_turns

TRUTHS = ("true", "false")  # as a table has them
PROMPTS = ("prompt", "question", "instruction", "conversations", "messages")


def read_preference(row: Row, keys: Keys) -> tuple[Message, ...]:
    """The conversation with the chosen answer, after both were checked."""
    before = _before(row, keys)
    chosen = _ending(row, keys["chosen"], before)
    rejected = _ending(row, keys["rejected"], before)
    if chosen[:-1] != rejected[:-1]:
        message = f"`{keys['chosen']}` and `{keys['rejected']}` answer different prompts"
        raise fault("D018", message, where=row.place, help="a pair is two answers to one prompt")
    if chosen[-1].text == rejected[-1].text:
        message = f"`{keys['chosen']}` and `{keys['rejected']}` are the same answer"
        raise fault("D018", message, where=row.place, help="take the row out: there is nothing to prefer")
    return chosen


def _before(row: Row, keys: Keys) -> tuple[Message, ...]:
    """The turns that both answers follow; none where each side has the whole conversation."""
    system = (Message("system", text_of(row, keys["system"])),) if is_filled(row, keys.get("system")) else ()
    key = keys.get("prompt")
    if key is None or row.values.get(key) is None:
        return system
    value = row.values[key]
    if isinstance(value, list):
        answered = [*value, {"role": "assistant", "content": "?"}]  # the order is told by what answers it
        return (*system, *read_turns(answered, key, row.place)[:-1])
    prompt = text_of(row, key)
    if key == "instruction" and is_filled(row, keys.get("input")):
        prompt += "\n\n" + text_of(row, keys["input"])
    return (*system, Message("user", prompt))


def _ending(row: Row, key: str, before: Sequence[Message]) -> tuple[Message, ...]:
    """The conversation with this side's answer."""
    value = row.values[key]
    if _is_whole(value):
        return tuple(read_turns(value, key, row.place))
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not before:
        message = f"`{shown(key)}` is an answer alone, and the row has no prompt"
        raise fault(
            "D012", message, where=row.place, help=f"a prompt stands under one of {', '.join(PROMPTS)}"
        )
    return (*before, Message("assistant", _answer_text(value, key, row.place)))


def _is_whole(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1


def _answer_text(value: Any, key: str, place: Place) -> str:
    """An answer as a text, or as one message of the assistant."""
    if isinstance(value, dict):
        role = value.get("role", value.get("from"))
        if role not in ("assistant", "gpt"):
            raise fault(
                "D016", f"`{shown(key)}` is from `{shown(str(role))}`, not the assistant", where=place
            )
        value = value.get("content", value.get("value"))
    return read_text(value, f"`{shown(key)}`", place)


def has_sides(row: Row, keys: Keys) -> bool:
    """Whether both sides could be answers: texts, messages or lists of them."""
    return all(isinstance(row.values[keys[side]], str | dict | list) for side in ("chosen", "rejected"))


def has_truth(row: Row, keys: Keys) -> bool:
    """Whether the label is true or false, or left open: other labels are names of classes."""
    value = row.values[keys["label"]]
    return (
        value is None
        or isinstance(value, bool)
        or (isinstance(value, str) and value.strip().lower() in TRUTHS)
    )


def read_labelled_messages(row: Row, keys: Keys) -> tuple[Message, ...]:
    """A conversation whose last answer is labelled good or bad."""
    _require_truth(row, keys["label"])
    return read_turns(row.values[keys["messages"]], keys["messages"], row.place)


def read_labelled_pair(row: Row, keys: Keys) -> tuple[Message, ...]:
    """A prompt and an answer that is labelled good or bad."""
    _require_truth(row, keys["label"])
    return (
        Message("user", text_of(row, keys["prompt"])),
        Message("assistant", text_of(row, keys["completion"])),
    )


def _require_truth(row: Row, key: str) -> None:
    value = row.values[key]
    if not isinstance(value, bool) and str(value).strip().lower() not in TRUTHS:
        message = f"`{shown(key)}` is {kind_of(value)}, not true or false"
        raise fault("D014", message, where=row.place, help="write true or false, or take the row out")
