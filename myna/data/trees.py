"""Trees of replies (OpenAssistant: Köpf et al. 2023): nested, or flat messages that name their parent.

{"prompt": {"text", "role": "prompter", "lang", "replies": [{"text", "role": "assistant", "rank", "replies": [...]}]}}
{"message_id", "parent_id", "text", "role", "rank", "lang"}     one message a row

A conversation is a path from the root that ends with an answer. The best path takes at each turn the reply of the lowest
rank (0 is the best), where none is ranked the first; all paths are every one, each as long as it can be.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from msgspec.structs import replace

from myna.data.check import fault, shown
from myna.data.conversation import Conversation, Message, Place, Role, Row
from myna.data.json_rows import kind_of
from myna.data.shapes import Keys, Made, Reading
from myna.data.turns import is_true, read_text
from myna.errors import DataError

TREE_ROLES: Final[Mapping[str, Role]] = {
    "prompter": "user",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
DEEPEST = 500  # turns: a reply to a reply to a reply
UNRANKED = float("inf")
ROOT = "prompt"
KEPT = ("rank", "lang", "deleted")  # of a flat message, where it has them

Node = Mapping[str, Any]


def is_tree(row: Row, keys: Keys) -> bool:
    """Whether the root is a message with replies."""
    root = row.values[keys[ROOT]]
    return isinstance(root, dict) and "replies" in root


def read_tree(row: Row, keys: Keys, reading: Reading) -> Made:
    """The paths of one tree; nothing where no path of the language ends with an answer."""
    root = row.values[keys[ROOT]]
    if not isinstance(root, dict):
        yield fault("D014", f"`{keys[ROOT]}` is {kind_of(root)}, not a message with replies", where=row.place)
        return
    seen: set[tuple[int, ...]] = set()
    for whole in _paths(root, reading):
        answers = [number for number, node in enumerate(whole, start=1) if _role(node) == "assistant"]
        path = whole[: answers[-1] if answers else 0]
        if not path or tuple(map(id, path)) in seen:
            continue
        seen.add(tuple(map(id, path)))
        try:
            yield _conversation(path, row.place)
        except DataError as error:
            yield error


def _paths(root: Node, reading: Reading) -> Iterator[tuple[Node, ...]]:
    """From the root to where nobody replied, the best replies first."""
    waiting: list[tuple[Node, ...]] = [(root,)] if _is_meant(root, reading) else []
    while waiting:
        path = waiting.pop()
        replies = sorted((reply for reply in _replies(path[-1]) if _is_meant(reply, reading)), key=_rank)
        if not replies or len(path) >= DEEPEST:
            yield path
        elif reading.paths == "best":
            waiting.append((*path, replies[0]))
        else:
            waiting += [(*path, reply) for reply in reversed(replies)]


def _conversation(path: Sequence[Node], place: Place) -> Conversation:
    """Turns of one speaker that follow each other are a fault of the tree."""
    last = path[-1].get("message_id")
    place = replace(place, part=f"reply {shown(str(last))}") if last else place
    messages = []
    for number, node in enumerate(path, start=1):
        role = _role(node)
        expected = "user" if number % 2 else "assistant"
        if role != expected:
            said = shown(str(node.get("role")))
            raise fault("D016", f"turn {number} is from `{said}`, where {expected} should speak", where=place)
        messages.append(Message(role, read_text(node.get("text"), f"turn {number} ({role})", place)))
    return Conversation(tuple(messages), place)


def _replies(node: Node) -> list[Node]:
    replies = node.get("replies")
    return [reply for reply in replies if isinstance(reply, dict)] if isinstance(replies, list) else []


def _role(node: Node) -> Role | None:
    return TREE_ROLES.get(str(node.get("role")))


def _rank(node: Node) -> float:
    try:
        return float(node["rank"])  # a table has it as a text
    except (KeyError, TypeError, ValueError, OverflowError):
        return UNRANKED


def _is_meant(node: Node, reading: Reading) -> bool:
    return not is_true(node.get("deleted")) and (
        reading.language is None or node.get("lang") == reading.language
    )


def gather_trees(rows: Sequence[Row], keys: Keys) -> Iterator[Row | DataError]:
    """One row a tree out of rows that are messages, at the place of its root; a reply to nobody is a fault."""
    nodes: dict[str, dict[str, Any]] = {}
    places: dict[str, Place] = {}
    for row in rows:
        identity = str(row.values[keys["message_id"]])
        if identity in nodes:
            message = f"`{keys['message_id']}` {shown(identity)} stands twice, first at {places[identity]}"
            yield fault("D004", message, where=row.place)
            continue
        text, role = row.values[keys["text"]], row.values[keys["role"]]
        kept = {name: row.values.get(keys.get(name, name)) for name in KEPT}
        nodes[identity] = {"message_id": identity, "text": text, "role": role, **kept, "replies": []}
        places[identity] = row.place
    roots, strays = [], set()
    for row in rows:
        identity, parent = str(row.values[keys["message_id"]]), row.values[keys["parent_id"]]
        if places.get(identity) != row.place:
            continue
        if parent in (None, ""):
            roots.append(Row({**row.values, ROOT: nodes[identity]}, row.place))
        elif str(parent) not in nodes:
            strays.add(identity)
            message = f"it replies to {shown(str(parent))}, which is no `{keys['message_id']}` of these rows"
            yield fault(
                "D012", message, where=row.place, help="take the reply out, or add what it replies to"
            )
        else:
            nodes[str(parent)]["replies"].append(nodes[identity])
    yield from roots
    reached = _reached(root.values[ROOT] for root in roots)
    for identity in nodes:
        if identity not in reached and identity not in strays:
            message = "no first message leads to it: what it replies to is missing, or replies to itself"
            cure = "take the reply out, or add what it replies to"
            yield fault("D016", message, where=places[identity], help=cure)


def _reached(roots: Iterable[Node]) -> set[str]:
    """The ids of all messages that are or follow one of `roots`."""
    found: set[str] = set()
    waiting = list(roots)
    while waiting:
        node = waiting.pop()
        found.add(node["message_id"])
        waiting.extend(node["replies"])
    return found


def read_gathered(row: Row, keys: Keys, reading: Reading) -> Made:
    """The paths of a tree that `gather_trees` made."""
    return read_tree(row, {ROOT: ROOT}, reading)
