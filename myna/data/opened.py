"""From a file to its text: unpacked where it is compressed, decoded as its byte order mark says.

What a file is, is read off its first bytes, not off its name: a plain file named .gz is read as it is.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

HEAD_BYTES = 4096
MOST_SWOLLEN = 200  # times its packed size; rows are packed to a tenth or a twentieth, the same row again and again to less
FEWEST_SWOLLEN = 1 << 26  # bytes, below which it harms nobody
PACKED_ENDINGS = (".gz", ".gzip", ".zst", ".bz2", ".xz")
# How both decoders bring in what they cannot read, for `bad_text` of `files` to find. Good text never decodes to these.
BAD_UTF16 = "\udcff"


class DamagedArchiveError(OSError):
    """A compressed file that ends too early or does not unpack; the message says which kind of file."""

    cure = "fetch or pack it again; the rows before that place are not read alone"


class SwollenArchiveError(DamagedArchiveError):
    """A compressed file that unpacks to so much more than itself that it is hardly rows: nobody's memory holds it."""

    cure = "unpack it yourself where it is meant so, and give the plain file"


@dataclass(frozen=True)
class Packing:
    """One way to compress: its name, and its reader over a file."""

    name: str
    unpack: Callable[[BinaryIO], Any]


def _unpack_zstd(file: BinaryIO) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")


BZIP2 = b"BZh"  # and a digit, and the first block's magic: text may begin so
PACKINGS: Mapping[bytes, Packing] = {
    b"\x1f\x8b": Packing("gzip", lambda file: gzip.GzipFile(fileobj=file)),
    b"\x28\xb5\x2f\xfd": Packing("zstd", _unpack_zstd),
    BZIP2: Packing("bzip2", bz2.BZ2File),
    b"\xfd7zXZ\x00": Packing("xz", lzma.LZMAFile),
}
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
UTF32 = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)


def row_suffix(path: Path) -> str:
    """The ending that says how rows stand in a file, in small letters: of `rows.jsonl.gz` it is .jsonl."""
    inner = path.with_suffix("") if path.suffix.lower() in PACKED_ENDINGS else path
    return inner.suffix.lower()


def packing_of(head: bytes) -> Packing | None:
    """How a file with these first bytes is compressed, None where it is not."""
    if head.startswith(BZIP2) and head[4:10] not in (b"1AY&SY", b"\x17rE8P\x90"):
        return None
    return next((packing for magic, packing in PACKINGS.items() if head.startswith(magic)), None)


def is_packed(path: Path) -> bool:
    """Whether `open_bytes` unpacks the file."""
    with path.open("rb") as file:
        return packing_of(file.read(16)) is not None


def is_utf16(head: bytes) -> bool:
    """Whether text with these first bytes is UTF-16, by its byte order mark."""
    return head.startswith(UTF16) and not head.startswith(UTF32)


def read_head(path: Path) -> bytes:
    """The first bytes of the file, unpacked. DamagedArchiveError where they do not unpack."""
    with open_bytes(path) as file:
        return file.read(HEAD_BYTES)


def open_bytes(path: Path) -> BinaryIO:
    """The file's bytes, unpacked as they are read; reading raises DamagedArchiveError where they do not unpack."""
    file = path.open("rb")
    packing = packing_of(file.peek(16)[:16])
    if packing is None:
        return file
    return cast(BinaryIO, io.BufferedReader(_Unpacked(packing, file), 1 << 17))


def open_text(path: Path, newline: str | None = None) -> TextIO:
    """The file as text: UTF-8, or UTF-16 where it begins with that byte order mark.

    What cannot be decoded passes through as half characters: each bad byte of UTF-8 as `surrogateescape` has it, bad UTF-16
    as BAD_UTF16.
    """
    file = open_bytes(path)
    head = file.peek(4)[:4]  # type: ignore[attr-defined]
    if is_utf16(head):
        return io.TextIOWrapper(file, encoding="utf-16", errors=_UTF16_ERRORS, newline=newline)
    return io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


class _Unpacked(io.RawIOBase):
    """A packed file as its bytes, with one error for all that unpackers raise."""

    def __init__(self, packing: Packing, file: BinaryIO) -> None:
        self._packing, self._file = packing, file
        self._num_bytes = 0
        self._inner = self._guarded(lambda: packing.unpack(file))

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        found = self._guarded(lambda: self._inner.read(len(buffer)))
        buffer[: len(found)] = found
        self._num_bytes += len(found)
        if self._num_bytes > FEWEST_SWOLLEN and self._num_bytes > MOST_SWOLLEN * self._file.tell():
            times = f"more than {MOST_SWOLLEN} times its size"
            raise SwollenArchiveError(f"the {self._packing.name} file unpacks to {times}")
        return len(found)

    def close(self) -> None:
        if not self.closed:
            self._inner.close()
            self._file.close()
        super().close()

    def _guarded(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except EOFError as error:
            raise DamagedArchiveError(f"the {self._packing.name} file is cut short") from error
        except (OSError, zlib.error, lzma.LZMAError, ValueError) as error:
            short = "truncated" in str(error).lower()
            what = "is cut short" if short else "is damaged"
            raise DamagedArchiveError(f"the {self._packing.name} file {what}") from error


def _mark_bad_utf16(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return BAD_UTF16, error.end


_UTF16_ERRORS = "myna.bad_utf16"
codecs.register_error(_UTF16_ERRORS, _mark_bad_utf16)
