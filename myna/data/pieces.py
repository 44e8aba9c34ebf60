"""What a template writes, cut at the borders of assistant turns, each piece tokenized by itself: ids and labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from myna.data.apart import Way
from myna.data.control import Given
from myna.errors import DataError, ModelError

IGNORE = -100  # the label of a token that is not in the loss, as torch and transformers have it
IntArray = npt.NDArray[np.int64]


class Piece(NamedTuple):
    """A text that is tokenized by itself, its ids, and which message is learnt with it (None: it is part of a prompt)."""

    text: str
    ids: list[int]
    answer: int | None


def pieces_of(
    told: Given,
    way: Way,
    closing_ids: frozenset[int],
    *,
    add_generation_prompt: bool,
    trained: Sequence[bool] | None = None,
) -> tuple[IntArray, IntArray]:
    """(input_ids_T, labels_T) of what a template is told; an assistant turn ends with its last closing token.

    `trained` says of each message whether it is, by default all are. Raises ModelError where the template rewrites earlier
    turns, DataError where an assistant turn would end without a closing token.
    """
    ids: list[int] = []
    labels: list[int] = []
    for piece in cut(told, way, closing_ids, add_generation_prompt=add_generation_prompt):
        is_trained = piece.answer is not None and (trained is None or trained[piece.answer])
        ids += piece.ids
        labels += piece.ids if is_trained else [IGNORE] * len(piece.ids)
    return np.asarray(ids, dtype=np.int64), np.asarray(labels, dtype=np.int64)


def cut(
    told: Given, way: Way, closing_ids: frozenset[int], *, add_generation_prompt: bool
) -> Iterator[Piece]:
    """The pieces in their order: prompts and answers in turn. Errors as `pieces_of`."""
    done, tail = "", ""
    messages = told["messages"]
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = way.render({**told, "messages": messages[:index]}, True)
        whole = way.render({**told, "messages": messages[: index + 1]}, False)
        asked = tail + _continuation(prompt, done)
        yield Piece(asked, way.encode(asked).ids, None)
        answer, tail = _answer(_continuation(whole, prompt), closing_ids, way)
        yield answer._replace(answer=index)
        done = whole
    if add_generation_prompt:
        asked = tail + _continuation(way.render(told, True), done)
        yield Piece(asked, way.encode(asked).ids, None)


def _continuation(text: str, start: str) -> str:
    if not text.startswith(start):
        raise ModelError(
            "the chat template rewrites earlier turns when one is added, so a row cannot be masked exactly",
            help="use rows with one assistant turn, or give the base a template that only appends",
        )
    return text[len(start) :]


def _answer(text: str, closing_ids: frozenset[int], way: Way) -> tuple[Piece, str]:
    """An assistant turn up to and with its stop token, and the text the template puts after that."""
    encoding = way.encode(text)
    ids = encoding.ids
    for position in range(len(ids) - 1, -1, -1):
        if ids[position] in closing_ids:
            end = encoding.offsets[position][1]
            return Piece(text[:end], ids[: position + 1], None), text[end:]
    raise DataError(
        "the chat template ends an assistant turn without a stop token: the model would never learn to stop",
        help="the template must close assistant turns with a special token such as <|im_end|> or </s>",
        code="no-stop-token",
    )
