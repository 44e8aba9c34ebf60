"""What ChatGPT and Claude give their users: conversations.json, a conversation an object.

{"mapping": {ID: {"parent": ID, "message": {"author": {"role"}, "content": {"content_type": "text", "parts": [...]}}}},
 "current_node": ID}
{"chat_messages": [{"sender": "human" or "assistant", "text": ..., "attachments": [...]}]}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from myna.data.check import fault, shown
from myna.data.conversation import Place, Row
from myna.data.json_rows import kind_of
from myna.data.shapes import Keys, Reading
from myna.data.speakers import Talk, read_spoken, told_of
from myna.errors import DataError

# What the model was shown or thought beside what was said: no part of the conversation.
UNSPOKEN = ("thoughts", "reasoning_recap", "model_editable_context", "user_editable_context")
SENDERS = {"human": "user", "user": "user", "assistant": "assistant"}
SPOKEN = ("user", "assistant", "system")


def talks_of_chatgpt(row: Row, keys: Keys, reading: Reading) -> Iterator[Talk | DataError]:
    """The path that the user saw last, from its end back to the root."""
    try:
        nodes = _path(row, keys)
        lines = [line for node in nodes for line in _said(node.get("message"), row.place)]
    except DataError as error:
        yield error
    else:
        yield Talk(tuple(lines), row.place, "assistant", SPOKEN)


def talks_of_claude(row: Row, keys: Keys, reading: Reading) -> Iterator[Talk | DataError]:
    """The messages in their order."""
    try:
        lines = [_written(message, row.place) for message in _list_of(row, keys["chat_messages"])]
    except DataError as error:
        yield error
    else:
        yield Talk(tuple(lines), row.place, "assistant", SPOKEN)


read_chatgpt, tell_chatgpt = read_spoken(talks_of_chatgpt), told_of(talks_of_chatgpt)
read_claude, tell_claude = read_spoken(talks_of_claude), told_of(talks_of_claude)


def _path(row: Row, keys: Keys) -> list[Mapping[str, Any]]:
    mapping, identity = row.values[keys["mapping"]], row.values[keys["current_node"]]
    if not isinstance(mapping, dict):
        raise fault("D014", f"`{keys['mapping']}` is {kind_of(mapping)}, not an object", where=row.place)
    if identity is None:
        raise fault("D013", f"`{keys['current_node']}` is null: the conversation is empty", where=row.place)
    path: list[Mapping[str, Any]] = []
    while identity is not None:
        node = mapping.get(str(identity))
        if not isinstance(node, dict) or len(path) >= len(mapping):
            message = f"`{shown(str(identity))}` is no message of `{keys['mapping']}`, or replies to itself"
            raise fault("D016", message, where=row.place)
        path.append(node)
        identity = node.get("parent")
    return path[::-1]


def _said(message: Any, place: Place) -> Iterator[tuple[str, str]]:
    """(role, text) of a node's message; nothing where it is hidden or empty. DataError for what is not supported."""
    if not isinstance(message, dict):
        return
    author, content, about = (_object(message.get(key)) for key in ("author", "content", "metadata"))
    role, kind = str(author.get("role")), content.get("content_type")
    if about.get("is_visually_hidden_from_conversation") or kind in UNSPOKEN:
        return
    parts = content.get("parts")
    texts = parts if isinstance(parts, list) else [content.get("text")]
    if not any(texts):
        return
    if role not in SPOKEN or message.get("recipient", "all") not in ("all", None):
        raise fault(
            "D017", f"a message from or to `{shown(_other(role, message))}` is not supported yet", where=place
        )
    if kind != "text" or not all(isinstance(text, str) for text in texts):
        raise fault("D017", f"a content of `{shown(str(kind))}` is not supported yet", where=place)
    text = "".join(map(str, texts))
    if text.strip():
        yield role, text


def _other(role: str, message: Mapping[str, Any]) -> str:
    return role if role not in SPOKEN else str(message.get("recipient"))


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list_of(row: Row, key: str) -> list[Any]:
    value = row.values[key]
    if not isinstance(value, list):
        code = "D013" if value is None else "D014"
        raise fault(code, f"`{shown(key)}` is {kind_of(value)}, not a list of messages", where=row.place)
    return value


def _written(message: Any, place: Place) -> tuple[str, str]:
    """(role, text) of a message of Claude's export."""
    if not isinstance(message, dict):
        raise fault("D014", f"a message is {kind_of(message)}, not an object", where=place)
    sender = message.get("sender")
    if sender not in SENDERS:
        raise fault(
            "D015", f"the sender `{shown(str(sender))}` is not known; human and assistant are", where=place
        )
    for key in ("attachments", "files"):
        if message.get(key):
            raise fault("D017", f"a message with `{key}` is not supported yet", where=place)
    parts = [part for part in message.get("content") or [] if isinstance(part, dict)]
    odd = next((part.get("type") for part in parts if part.get("type") not in ("text", "thinking")), None)
    if odd is not None:
        raise fault("D017", f"a content part of `{shown(str(odd))}` is not supported yet", where=place)
    text = message.get("text") or "".join(
        str(part.get("text", "")) for part in parts if part.get("type") == "text"
    )
    if not isinstance(text, str) or not text.strip():
        raise fault("D013", f"a message from {sender} is empty", where=place)
    return SENDERS[sender], text
