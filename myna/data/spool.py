"""Conversations in a row on disk, 8 bytes of each in memory: what is held of rows that are too many to hold.

The first ones stay in memory, so a small file touches no disk. What is past them lies in a temporary file without a name,
which is gone with the process.
"""

from __future__ import annotations

import tempfile
import weakref
from abc import abstractmethod
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, overload

import msgspec

from myna.data.conversation import Conversation

HELD = 20_000  # conversations that stay in memory: some 30 MB
WRITTEN_AT_ONCE = 1 << 20  # bytes

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Conversation).decode


class _View(Sequence[Conversation]):
    """Conversations that are made of others when they are asked for; equal to what has the same ones."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    @overload
    def __getitem__(self, index: int) -> Conversation: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Conversation]: ...
    def __getitem__(self, index: int | slice) -> Conversation | Sequence[Conversation]:
        if isinstance(index, slice):
            return Chosen(self, array("Q", range(*index.indices(len(self)))))
        return self._one(range(len(self))[index])

    @abstractmethod
    def _one(self, number: int) -> Conversation:
        """The conversation of this number, at least 0 and less than how many there are."""


class Spool(_View):
    """Conversations that are added once and read by number as often as wanted.

    `folder` is where the file lies (default: the system's folder for temporary files, which may itself be memory).
    """

    def __init__(self, folder: Path | None = None, *, held: int = HELD) -> None:
        self._folder, self._most = folder, held
        self._held: list[Conversation] = []
        self._file: IO[bytes] | None = None
        self._ends = array("Q", [0])  # of the records in the file
        self._unwritten: list[bytes] = []
        self._num_unwritten = 0

    def append(self, conversation: Conversation) -> None:
        if len(self._held) < self._most:
            self._held.append(conversation)
            return
        record = _encode(conversation)
        self._unwritten.append(record)
        self._num_unwritten += len(record)
        self._ends.append(self._ends[-1] + len(record))
        if self._num_unwritten >= WRITTEN_AT_ONCE:
            self._write()

    def settled(self) -> Sequence[Conversation]:
        """The same, as a tuple where all are in memory."""
        return self if self._ends[-1] else tuple(self._held)

    def extend(self, conversations: Iterable[Conversation]) -> None:
        for conversation in conversations:
            self.append(conversation)

    def __len__(self) -> int:
        return len(self._held) + len(self._ends) - 1

    def _one(self, number: int) -> Conversation:
        if number < len(self._held):
            return self._held[number]
        number -= len(self._held)
        return _decode(self._read(self._ends[number], self._ends[number + 1]))

    def __iter__(self) -> Iterator[Conversation]:
        yield from self._held
        number, last = 0, len(self._ends) - 1
        while number < last:
            start = self._ends[number]
            many = number + 1
            while many < last and self._ends[many] - start < WRITTEN_AT_ONCE:
                many += 1
            records = memoryview(self._read(start, self._ends[many]))
            for n in range(number, many):
                yield _decode(records[self._ends[n] - start : self._ends[n + 1] - start])
            number = many

    def _read(self, start: int, end: int) -> bytes:
        self._write()
        assert self._file is not None
        self._file.seek(start)
        return self._file.read(end - start)

    def _write(self) -> None:
        if not self._unwritten:
            return
        if self._file is None:
            file = tempfile.TemporaryFile(dir=self._folder, prefix="myna-rows-")  # noqa: SIM115 (it lives as long as this)
            self._file = file
            weakref.finalize(self, file.close)
        self._file.seek(0, 2)
        self._file.write(b"".join(self._unwritten))
        self._file.flush()
        self._unwritten, self._num_unwritten = [], 0


class Chosen(_View):
    """Some conversations of a sequence, by their numbers, in the order of these; 8 bytes of each are held."""

    def __init__(self, conversations: Sequence[Conversation], numbers: array[int]) -> None:
        self._all, self._numbers = conversations, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def _one(self, number: int) -> Conversation:
        return self._all[self._numbers[number]]

    def __iter__(self) -> Iterator[Conversation]:
        for number in self._numbers:
            yield self._all[number]


class Changed(_View):
    """Every conversation of a sequence as `change` makes it."""

    def __init__(
        self, conversations: Sequence[Conversation], change: Callable[[Conversation], Conversation]
    ) -> None:
        self._all, self._change = conversations, change

    def __len__(self) -> int:
        return len(self._all)

    def _one(self, number: int) -> Conversation:
        return self._change(self._all[number])

    def __iter__(self) -> Iterator[Conversation]:
        return map(self._change, self._all)


def chosen(
    conversations: Sequence[Conversation], is_wanted: Callable[[Conversation], bool]
) -> Sequence[Conversation]:
    """Those that are wanted, in their order."""
    numbers = array("Q", (n for n, one in enumerate(conversations) if is_wanted(one)))
    return conversations if len(numbers) == len(conversations) else Chosen(conversations, numbers)


def with_system(conversations: Sequence[Conversation], system: str | None) -> Sequence[Conversation]:
    """Each with `system` in front, unless it has a system message of its own."""
    return Changed(conversations, lambda one: one.with_system(system)) if system else conversations
