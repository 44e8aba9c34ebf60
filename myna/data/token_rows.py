"""Rendered rows as tokens in a row, in memory or in a folder of the cache, read as Examples one at a time.

    tokens/KEY/
      ids.bin       every token of every row, 2 bytes each where the vocabulary allows it, else 4
      trained.bin   a byte for each: 1 where it is learnt
      rows.bin      for each row: where it ends, how many tokens were cut from it, its place
      progress.json how far whole rows have been written (a preparation that is interrupted goes on there)
      done.json     sizes and digests of the whole; what has none is not used

KEY is a digest of everything that the tokens follow from.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from myna.data.conversation import Place
from myna.data.render import IGNORE, Example
from myna.run import disk_error, read_json, sync_file, write_json

ROW = np.dtype([("end", "<i8"), ("cut", "<i4"), ("file", "<u4"), ("line", "<i8")])
PACKED_ROW = struct.Struct("<qiIq").pack
NAMES = ("ids.bin", "trained.bin", "rows.bin")
PROGRESS, DONE = "progress.json", "done.json"
DIGESTED_AT_ONCE = 1 << 24  # bytes


@dataclass
class Places:
    """Places as two numbers: of a file, and of a line in it. A part of a row is kept as a text, by the row's number."""

    files: list[str] = field(default_factory=list)
    units: list[Any] = field(default_factory=list)
    parts: dict[int, str] = field(default_factory=dict)

    def number(self, place: Place) -> int:
        if not self.files or self.files[-1] != place.path:
            if place.path in self.files:
                return self.files.index(place.path)
            self.files.append(place.path)
            self.units.append(place.unit)
        return len(self.files) - 1

    def place(self, row: int, number: int, line: int) -> Place | None:
        if line < 0:
            return None
        return Place(self.files[number], line, self.units[number], self.parts.get(row, ""))


class TokenRows(Sequence[Example]):
    """Rendered rows; an Example is made when it is asked for. `lengths` are their tokens."""

    def __init__(
        self, ids: npt.NDArray[Any], trained: npt.NDArray[Any], rows: npt.NDArray[Any], places: Places
    ) -> None:
        self._ids, self._trained, self._rows, self._places = ids, trained, rows, places
        self.lengths: npt.NDArray[np.int64] = np.diff(rows["end"], prepend=np.int64(0))

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        if isinstance(index, slice):
            return [self[n] for n in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        row = self._rows[number]
        end = int(row["end"])
        start = end - int(self.lengths[number])
        ids_T = self._ids[start:end].astype(np.int64)
        labels_T = np.where(self._trained[start:end] != 0, ids_T, IGNORE)
        place = self._places.place(number, int(row["file"]), int(row["line"]))
        return Example(ids_T, labels_T, int(row["cut"]), place)

    def __iter__(self) -> Iterator[Example]:
        for number in range(len(self)):
            yield self[number]


class Picked(Sequence[Example]):
    """Some rows of a sequence by their numbers, made when they are asked for."""

    def __init__(self, examples: Sequence[Example], numbers: Sequence[int]) -> None:
        self._examples, self._numbers = examples, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        if isinstance(index, slice):
            return Picked(self._examples, self._numbers[index])
        return self._examples[self._numbers[index]]

    @property
    def lengths(self) -> list[int]:
        if isinstance(self._examples, TokenRows):
            return [int(self._examples.lengths[number]) for number in self._numbers]
        return [len(self._examples[number].input_ids_T) for number in self._numbers]


def lengths_of(examples: Sequence[Example]) -> list[int]:
    """The tokens of each row, without making the rows where that can be."""
    if isinstance(examples, Picked):
        return examples.lengths
    if isinstance(examples, TokenRows):
        found: list[int] = examples.lengths.tolist()
        return found
    return [len(example.input_ids_T) for example in examples]


class TokenWriter:
    """Writes rows, in memory or into `folder`, where it goes on behind what was committed there before.

    `facts` are kept with the progress and given back: what the caller has counted so far, as JSON values.
    """

    def __init__(self, vocab_size: int, folder: Path | None = None) -> None:
        self._folder, self._type = folder, "<u2" if vocab_size <= 1 << 16 else "<u4"
        self._ids, self._trained, self._rows = bytearray(), bytearray(), bytearray()
        self._num_rows, self._end, self._places = 0, 0, Places()
        self._digests = [hashlib.sha256() for _ in NAMES]
        self.facts: dict[str, Any] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self._go_on(folder)

    def add(
        self,
        ids: Sequence[int] | npt.NDArray[np.int64],
        trained: bytes,
        *,
        num_cut: int = 0,
        place: Place | None = None,
    ) -> None:
        """A row: its tokens, a byte for each that is 1 where it is learnt, how many were cut."""
        assert len(ids) == len(trained)
        self._ids += np.asarray(ids).astype(self._type).tobytes()
        self._trained += trained
        self._end += len(ids)
        if place is not None and place.part:
            self._places.parts[self._num_rows] = place.part
        number, line = (0, -1) if place is None else (self._places.number(place), place.line)
        self._rows += PACKED_ROW(self._end, num_cut, number, line)
        self._num_rows += 1

    def commit(self, facts: dict[str, Any]) -> None:
        """What was added so far is kept, also if the process ends now."""
        self.facts = facts
        if self._folder is None:
            return
        try:
            contents = (self._ids, self._trained, self._rows)
            for name, content, digest in zip(NAMES, contents, self._digests, strict=True):
                with (self._folder / name).open("ab") as file:
                    file.write(content)
                sync_file(self._folder / name)
                digest.update(content)
                content.clear()
        except OSError as error:
            raise disk_error(error, self._folder) from error
        write_json(self._folder / PROGRESS, self._state())

    def finish(self, facts: dict[str, Any]) -> TokenRows:
        """The rows, whole."""
        if not self._num_rows:
            nothing = np.zeros(0, np.uint8)
            return TokenRows(nothing, nothing, np.zeros(0, ROW), self._places)
        if self._folder is None:
            rows = np.frombuffer(bytes(self._rows), ROW)
            ids = np.frombuffer(bytes(self._ids), self._type)
            return TokenRows(ids, np.frombuffer(bytes(self._trained), np.uint8), rows, self._places)
        self.commit(facts)
        write_json(self._folder / DONE, self._state())
        found = read_tokens(self._folder)
        assert found is not None
        return found[0]

    def _state(self) -> dict[str, Any]:
        return {
            "type": self._type,
            "rows": self._num_rows,
            "tokens": self._end,
            "sha256": [digest.hexdigest() for digest in self._digests],
            "files": self._places.files,
            "units": self._places.units,
            "parts": {str(n): part for n, part in self._places.parts.items()},
            "facts": self.facts,
        }

    def _go_on(self, folder: Path) -> None:
        state = _state_of(folder / PROGRESS)
        if state is not None and state["type"] == self._type and _is_there(folder, _sizes(state)):
            _truncate(folder, _sizes(state))
            self._digests = [_digest(folder / name) for name in NAMES]
        else:
            state = None
        if state is None or [digest.hexdigest() for digest in self._digests] != state["sha256"]:
            state = None
            _truncate(folder, (0, 0, 0))
            self._digests = [hashlib.sha256() for _ in NAMES]
        if state:
            self._num_rows, self._end = state["rows"], state["tokens"]
            self._places, self.facts = _places_of(state), state["facts"]


def read_tokens(folder: Path) -> tuple[TokenRows, dict[str, Any]] | None:
    """The rows that a folder holds whole, and their facts; None where it holds none, or not what was written."""
    state = _state_of(folder / DONE)
    if state is None or any(not (folder / name).is_file() for name in NAMES):
        return None
    sizes = tuple((folder / name).stat().st_size for name in NAMES)
    if sizes != _sizes(state) or not state["rows"]:
        return None
    if [_digest(folder / name).hexdigest() for name in NAMES] != state["sha256"]:
        return None
    ids, trained, rows = (
        np.memmap(folder / name, dtype, "r")
        for name, dtype in zip(NAMES, (state["type"], np.uint8, ROW), strict=True)
    )
    return TokenRows(ids, trained, rows, _places_of(state)), state["facts"]


def _state_of(path: Path) -> dict[str, Any] | None:
    try:
        return read_json(path) if path.is_file() else None
    except Exception:  # a file that was cut: as if there were none
        return None


def _sizes(state: dict[str, Any]) -> tuple[int, int, int]:
    tokens = int(state["tokens"])
    return tokens * np.dtype(state["type"]).itemsize, tokens, int(state["rows"]) * ROW.itemsize


def _places_of(state: dict[str, Any]) -> Places:
    return Places(state["files"], state["units"], {int(n): part for n, part in state["parts"].items()})


def _is_there(folder: Path, sizes: tuple[int, int, int]) -> bool:
    """Whether the files have at least so many bytes."""
    files = [(folder / name, size) for name, size in zip(NAMES, sizes, strict=True)]
    return all(path.is_file() and path.stat().st_size >= size for path, size in files)


def _truncate(folder: Path, sizes: tuple[int, int, int]) -> None:
    for name, size in zip(NAMES, sizes, strict=True):
        with (folder / name).open("ab") as file:
            file.truncate(size)


def _digest(path: Path) -> Any:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(DIGESTED_AT_ONCE):
            digest.update(block)
    return digest


def key_of(facts: dict[str, Any]) -> str:
    """The name of what follows from these facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
