"""Lines of a file of text as bytes: many at once, and of a part of the file alone."""

from __future__ import annotations

import codecs
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from myna.data.opened import HEAD_BYTES, is_packed, is_utf16, open_bytes, open_text

BLOCK_BYTES = 1 << 16  # what fits the processor's cache is read fastest


class Span(NamedTuple):
    """A part of a file: bytes from `start` to before `end`, both where a line begins, behind `num_before` lines."""

    start: int
    end: int
    num_before: int


WHOLE = Span(0, sys.maxsize, 0)


def blocks_of(path: Path, span: Span = WHOLE) -> Iterator[bytes | str]:
    """Whole lines: bytes where the file is UTF-8, without its byte order mark, many at once where it is not packed.

    A line of text each where it is UTF-16 or ends lines by CR.
    """
    with open_bytes(path) as file:
        head = file.read(HEAD_BYTES)
    if not _has_lines_of_bytes(head):
        with open_text(path) as text:
            yield from text
        return
    with open_bytes(path) as file:
        if head.startswith(codecs.BOM_UTF8):
            file.read(len(codecs.BOM_UTF8))
        if is_packed(path):
            yield from file  # where it does not unpack, the rows before are given still
            return
        file.seek(max(span.start, file.tell()))
        while block := file.read(min(BLOCK_BYTES, span.end - file.tell())):
            yield block if block.endswith(b"\n") else block + file.readline()


def lines_in(block: bytes | str) -> Iterator[bytes | str]:
    """The lines of one of `blocks_of`; a CR within one ends a line too."""
    if isinstance(block, str):
        yield block
        return
    for line in io.BytesIO(block):
        if b"\r" in line and b"\r" in (bare := line.rstrip(b"\r\n")):
            yield from bare.split(b"\r")
        else:
            yield line


def can_be_parted(path: Path) -> bool:
    """Whether the file has lines of bytes as it lies on the disk."""
    with path.open("rb") as file:
        return not is_packed(path) and _has_lines_of_bytes(file.read(HEAD_BYTES))


def spans_of(path: Path, num_bytes: int) -> Iterator[Span]:
    """All of a file that can be parted, in its order: spans of `num_bytes`, and what is missing of their last lines."""
    start = at = num_before = num_lines = 0
    with path.open("rb") as file:
        while block := file.read(min(BLOCK_BYTES, num_bytes)):
            block += b"" if block.endswith(b"\n") else file.readline()
            at += len(block)
            num_lines += sum(1 for _ in lines_in(block)) if b"\r" in block else block.count(b"\n")
            if at - start >= num_bytes:
                yield Span(start, at, num_before)
                start, num_before = at, num_lines
    if at > start:
        yield Span(start, at, num_before)


def _has_lines_of_bytes(head: bytes) -> bool:
    return not is_utf16(head) and (b"\r" not in head or b"\n" in head)
