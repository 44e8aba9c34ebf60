"""Many rows rendered at once: pieces by frames, tokenized in batches on every core while the next ones are read.

The rows are those that `render_examples` gives one by one, to the id.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from myna.data.conversation import Conversation, Place
from myna.data.frames import Frame, Frames, filled
from myna.data.render import IGNORE, ChatTokenizer, given, render_examples

AT_ONCE = 1024  # rows


class Rendered(NamedTuple):
    """A rendered row: its tokens, 1 where they are learnt, how many were cut, and where it stands.

    `is_last` is False of a piece of a long text that has more, `is_text` says that it is plain text.
    """

    input_ids_T: npt.NDArray[np.int64]
    trained_T: npt.NDArray[np.uint8]
    num_cut: int
    place: Place | None
    is_last: bool = True
    is_text: bool = False

    @property
    def num_targets(self) -> int:
        """As `Example` has it: the first token of a row predicts nothing."""
        return int(np.count_nonzero(self.trained_T[1:]))


class _Batch(NamedTuple):
    conversations: Sequence[Conversation]
    frames: Sequence[Frame | None]
    encoded: Future[list[Any]]  # all pieces


def render_many(
    conversations: Iterable[Conversation],
    tokenizer: ChatTokenizer,
    max_length: int,
    frames: Frames | None = None,
) -> Iterator[Rendered]:
    """`render_examples` of each conversation, in their order. Errors as there. `frames` are those of calls before."""
    rows = iter(conversations)
    frames = frames or Frames(tokenizer)
    with ThreadPoolExecutor(1) as thread:  # the tokenizer works on cores of its own, without Python's lock
        waiting: _Batch | None = None
        while batch := list(islice(rows, AT_ONCE)):
            begun = _begin(batch, frames, tokenizer, thread)
            if waiting is not None:
                yield from _finished(waiting, tokenizer, max_length)
            waiting = begun
        if waiting is not None:
            yield from _finished(waiting, tokenizer, max_length)


def _begin(
    batch: Sequence[Conversation], frames: Frames, tokenizer: ChatTokenizer, thread: ThreadPoolExecutor
) -> _Batch:
    found = [frames.frame_of(conversation) for conversation in batch]
    texts = [
        filled(piece, conversation.messages)
        for conversation, frame in zip(batch, found, strict=True)
        if frame is not None
        for piece in frame.pieces
    ]
    encode = partial(tokenizer.tokenizer.encode_batch_fast, add_special_tokens=False)
    return _Batch(batch, found, thread.submit(encode, texts))


def _ids_of(batch: _Batch) -> tuple[npt.NDArray[np.int64], list[int]]:
    """The ids of all pieces, and how many each has. Not in the thread, which is to begin with the next ones meanwhile."""
    ids = [one.ids for one in batch.encoded.result()]
    lengths = list(map(len, ids))
    return np.fromiter(chain.from_iterable(ids), np.int64, sum(lengths)), lengths


def _finished(batch: _Batch, tokenizer: ChatTokenizer, max_length: int) -> Iterator[Rendered]:
    control = tokenizer.control
    ids_T, lengths = _ids_of(batch)
    is_control_T = control.is_control[ids_T]
    learnt = [
        piece.answer is not None and conversation.messages[piece.answer].trained
        for conversation, frame in zip(batch.conversations, batch.frames, strict=True)
        if frame is not None
        for piece in frame.pieces
    ]
    trained_T = np.repeat(np.array(learnt, np.uint8), lengths)
    looks = bool(control.watched[1])
    piece, start = 0, 0
    for conversation, frame in zip(batch.conversations, batch.frames, strict=True):
        if frame is None:
            yield from _alone(conversation, tokenizer, max_length)
            continue
        end = start + sum(lengths[piece : piece + len(frame.pieces)])
        piece += len(frame.pieces)
        row_T, row_trained_T = ids_T[start:end], trained_T[start:end]
        is_own = row_T[is_control_T[start:end]].tobytes() == frame.control
        start = end
        if not is_own or tokenizer.exceeds_rows or (looks and control.is_watched_in(given(conversation))):
            yield from _alone(conversation, tokenizer, max_length)
            continue
        num_cut = max(0, len(row_T) - max_length)
        yield Rendered(row_T[:max_length], row_trained_T[:max_length], num_cut, conversation.place)


def _alone(conversation: Conversation, tokenizer: ChatTokenizer, max_length: int) -> Iterator[Rendered]:
    rows = list(render_examples(conversation, tokenizer, max_length))
    for number, row in enumerate(rows, start=1):
        trained_T = (row.labels_T != IGNORE).astype(np.uint8)
        yield Rendered(
            row.input_ids_T, trained_T, row.num_cut, row.place, number == len(rows), conversation.is_text
        )
