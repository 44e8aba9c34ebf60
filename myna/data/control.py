"""Control tokens: which they are, and which of them a conversation's own template writes.

    every text             tokens that the tokenizer marks special, and others that the template begins or ends turns with
    users' and tools' too  tokens that the template names and that are not special: <tool_call>, <think>
    no control tokens      all others: runs of spaces, <b>, and whatever is white space

A token that is not special is by its tokenizer's own word a part of what is said: an assistant writes <think> and
<tool_call> itself, and is trained to. What comes from outside cannot.

What a template writes depends on who speaks, not on what is said. So a conversation that says `a` and nothing else in
its place has the same control tokens, and where it has not, a text was read as one (or the template looks at texts).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from myna.data.conversation import Conversation, Message

if TYPE_CHECKING:
    from tokenizers import Tokenizer

INSIDE = ("system", "assistant")  # who speaks for the model and its keeper; all others are outside
KEPT_KEYS = ("role", "type")  # templates look at their values; those are words
PART = re.compile(r"</?(\w+)>")  # <x> … </x> mark parts inside a turn
SHORT = 16  # characters: templates look at the length of ids
# What a template is given: {"messages": [{"role": …, "content": …}], "tools": …}
Given = Mapping[str, Any]
TALK = Conversation((Message("user", "a"), Message("assistant", "b"), Message("user", "c")))


@dataclass(frozen=True)
class ControlTokens:
    """`everywhere`: no text becomes one. `outside`: no user's and no tool's text does. Both by id, with their spelling.

    `unknown` is what the model of the tokenizer gives for characters that it does not know: text becomes that.
    """

    everywhere: Mapping[int, str]
    outside: Mapping[int, str]
    unknown: int | None
    size: int

    @cached_property
    def is_control(self) -> npt.NDArray[np.bool_]:
        """[V] for each id, whether no text becomes it."""
        mask = np.zeros(self.size, dtype=np.bool_)
        mask[[i for i in self.everywhere if i != self.unknown]] = True
        return mask

    @cached_property
    def watched(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Spellings to look for in texts of the inside and of the outside, since ids do not tell of them."""
        inside = tuple(text for token_id, text in self.everywhere.items() if token_id == self.unknown)
        return inside, (*inside, *self.outside.values())

    def among(self, ids_T: npt.NDArray[np.int64]) -> bytes:
        """The control tokens among ids, in their order."""
        return ids_T[self.is_control[ids_T]].tobytes()

    def is_watched_in(self, given: Given) -> bool:
        """Whether a text spells what `watched` names."""
        inside, outside = self.watched
        if not outside:
            return False
        return any(
            word in text
            for text, is_outside in texts_of(given)
            for word in (outside if is_outside else inside)
        )


def control_tokens(tokenizer: Tokenizer, template_text: str, talk_ids: list[int]) -> ControlTokens:
    """Sorts the added tokens of a tokenizer; `talk_ids` are those of a plain conversation (`TALK`), rendered."""
    everywhere, outside = {}, {}
    added = tokenizer.get_added_tokens_decoder()
    written = frozenset(talk_ids)
    paired = {token.content for token in added.values()}
    for token_id, token in added.items():
        text = token.content
        if not text.strip():
            continue
        if token.special or (token_id in written and not _is_part(text, paired)):
            everywhere[token_id] = text
        elif text in template_text:
            outside[token_id] = text
    size = max([tokenizer.get_vocab_size(with_added_tokens=True), *(i + 1 for i in added)])
    return ControlTokens(everywhere, outside, _unknown_id(tokenizer), size)


def _is_part(text: str, others: set[str]) -> bool:
    found = PART.fullmatch(text)
    return found is not None and {f"<{found[1]}>", f"</{found[1]}>"} <= others


def _unknown_id(tokenizer: Tokenizer) -> int | None:
    model = tokenizer.model
    if hasattr(model, "unk_token"):
        return None if model.unk_token is None else tokenizer.token_to_id(model.unk_token)
    unknown = json.loads(model.__getstate__()).get("unk_id")  # Unigram's has no other way to it
    return None if unknown is None else int(unknown)


# What a template is given, with other texts


def changed(given: Given, change: Callable[[str, bool], str]) -> dict[str, Any]:
    """`given` with `change(text, is_outside)` for every text in it, also for keys that are no plain words."""
    return {
        "messages": [
            _changed(message, change, message.get("role") not in INSIDE) for message in given["messages"]
        ],
        **{name: _changed(given[name], change, False) for name in given if name != "messages"},
    }


def _changed(value: Any, change: Callable[[str, bool], str], is_outside: bool) -> Any:
    if isinstance(value, str):
        return change(value, is_outside)
    if isinstance(value, dict):
        made = {}
        for key, item in value.items():
            is_kept = key in KEPT_KEYS and isinstance(item, str) and item.isidentifier()
            name = key if not isinstance(key, str) or key.isidentifier() else change(key, is_outside)
            while name in made:  # two keys that were made alike
                name += name[-1:] or "a"
            made[name] = item if is_kept else _changed(item, change, is_outside)
        return made
    if isinstance(value, list | tuple):
        return [_changed(item, change, is_outside) for item in value]
    return value


def texts_of(given: Given) -> Iterator[tuple[str, bool]]:
    """(text, is_outside) of every text, those of keys too."""
    found: list[tuple[str, bool]] = []

    def keep(text: str, is_outside: bool) -> str:
        found.append((text, is_outside))
        return text

    changed(given, keep)
    yield from found


def neutral(given: Given) -> dict[str, Any]:
    """`given` with texts that say nothing: what its template writes by itself is rendered of it."""
    return {
        "messages": [_neutral_message(message) for message in given["messages"]],
        **{name: _changed(given[name], _neutral, False) for name in given if name != "messages"},
    }


def _neutral_message(message: Mapping[str, Any]) -> Any:
    if len(message) == 2 and isinstance(content := message.get("content"), str) and "role" in message:
        return {"role": message["role"], "content": "" if content.isspace() or not content else "a"}
    return _changed(message, _neutral, False)


def _neutral(text: str, is_outside: bool) -> str:
    return "a" * min(SHORT, len(text.strip()))
