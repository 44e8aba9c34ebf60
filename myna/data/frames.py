"""What a template writes around contents, found out once for each order of roles: the quick way to the pieces of a row.

    user assistant ─► "<|im_start|>user⏎" + 0 + "<|im_end|>⏎<|im_start|>assistant⏎" │ 1 + "<|im_end|>"

A template is asked for its frame with marks for contents, by the same function that renders rows, and only where its code
shows that it does not look into contents (`opaque`). Rows of other templates, and rows with more in them than contents, are
rendered one by one. Rendering a row so takes a fiftieth of the time; the ids are the same ones.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from myna.data.conversation import Conversation, Message, Role
from myna.errors import MynaError

MARK = re.compile("(\v?)\ue000(\\d+)\ue001(\v?)")  # \v: white space that no template writes
UNTRIMMED, LEFT, RIGHT, BOTH = range(4)  # the sides of a content that are trimmed


class Slot(NamedTuple):
    """A message's content, as the template trims it."""

    message: int
    trimmed: int


class FramePiece(NamedTuple):
    """Texts and contents in turn, and the message that is learnt with them (None: of a prompt)."""

    parts: tuple[str | Slot, ...]
    answer: int | None


class Piece(NamedTuple):
    """A piece of a row that is tokenized by itself, and whether it is learnt."""

    text: str
    trained: bool


Frame = tuple[FramePiece, ...]


class Frames:
    """The frames of one tokenizer's template. `pieces_of` is what renders rows one by one: the text pieces of a row."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._is_opaque = tokenizer.has_opaque_template
        self._frames: dict[tuple[Role, ...], Frame | None] = {}

    def pieces(self, conversation: Conversation) -> list[Piece] | None:
        """The row's pieces, None where it is to be rendered itself."""
        messages = conversation.messages
        if not self._is_opaque or any(not m.content or m.content.isspace() for m in messages):
            return None
        roles = tuple([message.role for message in messages])
        if roles not in self._frames:
            self._frames[roles] = self._frame(roles)
        frame = self._frames[roles]
        return None if frame is None else [_filled(piece, messages) for piece in frame]

    def _frame(self, roles: Sequence[Role]) -> Frame | None:
        try:
            plain = self._marked(roles, "\ue000{}\ue001")
            padded = self._marked(roles, "\v\ue000{}\ue001\v")
        except MynaError:
            return None  # the row itself tells what is wrong
        sides = [_trims_of(text) for text, _ in padded]
        frame = []
        for (text, answer), trims in zip(plain, sides, strict=True):
            marks = list(MARK.finditer(text))
            if len(marks) != len(trims):
                return None
            parts: list[str | Slot] = []
            start = 0
            for mark, trimmed in zip(marks, trims, strict=True):
                parts += [text[start : mark.start()], Slot(int(mark[2]), trimmed)]
                start = mark.end()
            parts.append(text[start:])
            frame.append(FramePiece(tuple(part for part in parts if part != ""), answer))
        return tuple(frame)

    def _marked(self, roles: Sequence[Role], mark: str) -> list[tuple[str, int | None]]:
        messages = tuple(Message(role, mark.format(number)) for number, role in enumerate(roles))
        return list(self._tokenizer.text_pieces(Conversation(messages)))


def _trims_of(padded: str) -> list[int]:
    """Which sides of each content are trimmed: those where the white space beside its mark is gone."""
    return [LEFT * (not mark[1]) + RIGHT * (not mark[3]) for mark in MARK.finditer(padded)]


def _filled(piece: FramePiece, messages: Sequence[Message]) -> Piece:
    text = "".join([part if type(part) is str else _content(part, messages) for part in piece.parts])  # type: ignore[arg-type]
    return Piece(text, piece.answer is not None and messages[piece.answer].trained)


def _content(slot: Slot, messages: Sequence[Message]) -> str:
    content = messages[slot.message].content
    if slot.trimmed == UNTRIMMED:
        return content
    if slot.trimmed == BOTH:
        return content.strip()
    return content.lstrip() if slot.trimmed == LEFT else content.rstrip()
