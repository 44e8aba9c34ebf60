"""What a template writes around contents, found out once for each order of roles: the quick way to the pieces of a row.

    user assistant ─► "<|im_start|>user⏎" + 0 + "<|im_end|>⏎<|im_start|>assistant⏎" │ 1 + "<|im_end|>"

A template is asked for its frame with marks for contents, by the same function that renders rows, and only where its code
shows that it does not look into contents (`opaque`). Rows of other templates, and rows with more in them than contents, are
rendered one by one. Rendering a row so takes a fiftieth of the time; the ids are the same ones.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from myna.data.conversation import Conversation, Message, Role
from myna.data.pieces import Piece, cut
from myna.data.render import ChatTokenizer, given
from myna.errors import MynaError

MOST_FRAMES = 4096
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


class Frame(NamedTuple):
    """The pieces of rows with the same roles, and the control tokens that the template writes in them, in their order."""

    pieces: tuple[FramePiece, ...]
    control: bytes


class Frames:
    """The frames of one tokenizer's template."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._frames: dict[tuple[Role, ...], Frame | None] = {}

    def frame_of(self, conversation: Conversation) -> Frame | None:
        """The frame that the row fills, None where it is to be rendered itself."""
        if not self._tokenizer.has_opaque_template or not is_plain(conversation):
            return None
        roles = tuple([message.role for message in conversation.messages])
        if roles not in self._frames:
            self._frames[roles] = self._made(roles) if len(self._frames) < MOST_FRAMES else None
        return self._frames[roles]

    def _made(self, roles: Sequence[Role]) -> Frame | None:
        try:
            plain, padded = self._marked(roles, "\ue000{}\ue001"), self._marked(roles, "\v\ue000{}\ue001\v")
        except MynaError:
            return None  # the row itself tells what is wrong
        made = []
        for piece, trims in zip(plain, (_trims_of(piece.text) for piece in padded), strict=True):
            marks = list(MARK.finditer(piece.text))
            if len(marks) != len(trims):
                return None
            parts: list[str | Slot] = []
            start = 0
            for mark, trimmed in zip(marks, trims, strict=True):
                parts += [piece.text[start : mark.start()], Slot(int(mark[2]), trimmed)]
                start = mark.end()
            parts.append(piece.text[start:])
            made.append(FramePiece(tuple(part for part in parts if part != ""), piece.answer))
        ids = [i for piece in plain for i in piece.ids]
        return Frame(tuple(made), self._tokenizer.control.among(np.asarray(ids, dtype=np.int64)))

    def _marked(self, roles: Sequence[Role], mark: str) -> list[Piece]:
        messages = tuple(Message(role, mark.format(number)) for number, role in enumerate(roles))
        tokenizer = self._tokenizer
        told = given(Conversation(messages))
        return list(cut(told, tokenizer.as_written, tokenizer.closing_ids, add_generation_prompt=False))


def is_plain(conversation: Conversation) -> bool:
    """Whether roles and contents are all that there is to it, no tools, and no content is blank."""
    return (
        not conversation.uses_tools
        and not conversation.is_text
        and not any(not message.content or message.content.isspace() for message in conversation.messages)
    )


def filled(piece: FramePiece, messages: Sequence[Message]) -> str:
    """The piece's text with these contents."""
    return "".join([part if isinstance(part, str) else _content(part, messages) for part in piece.parts])


def _trims_of(padded: str) -> list[int]:
    """Which sides of each content are trimmed: those where the white space beside its mark is gone."""
    return [LEFT * (not mark[1]) + RIGHT * (not mark[3]) for mark in MARK.finditer(padded)]


def _content(slot: Slot, messages: Sequence[Message]) -> str:
    content = messages[slot.message].content
    if slot.trimmed == UNTRIMMED:
        return content
    if slot.trimmed == BOTH:
        return content.strip()
    return content.lstrip() if slot.trimmed == LEFT else content.rstrip()
