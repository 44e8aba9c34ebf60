"""Rows rendered into tokens, once: what was rendered before is read from the cache, what was interrupted goes on.

    conversations ─► digest ─► tokens/KEY is whole?  ── yes ─► TokenRows
                                 └─ no ─► render_many ─► TokenWriter, committed every few seconds

KEY is a digest of the conversations themselves, the tokenizer, the template, data.max_length and the code that renders:
whatever changes the tokens changes it. Rows that take a moment are rendered in memory, without a cache.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from myna.data.conversation import Conversation
from myna.data.render import ChatTokenizer
from myna.data.render_many import render_many
from myna.data.token_rows import DONE, TokenRows, TokenWriter, key_of, read_tokens
from myna.lock import try_lock
from myna.run import tree_bytes

CACHED_FROM = 4_000_000  # bytes of conversations; fewer are rendered in some seconds
MOST_KEPT = 20_000_000_000  # bytes of the cache; what was used longest ago goes first
SECONDS_A_COMMIT = 10.0
LOCK = ".lock"


@dataclass
class RenderedCounts:
    """What became of the rows of one file. `longest` is before any cut; `num_texts` had `num_pieces` pieces."""

    num_rows: int = 0
    num_kept: int = 0
    num_cut: int = 0
    num_masked: int = 0
    longest: int = 0
    first_long: str = ""
    num_texts: int = 0
    num_pieces: int = 0


def render_into_tokens(
    sources: Sequence[Sequence[Conversation]],
    tokenizer: ChatTokenizer,
    max_length: int,
    folder: Path,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[TokenRows, list[RenderedCounts]]:
    """The rows of several files one after another, those with something to learn, and the counts of each file.

    `folder` is where caches lie. Errors as `render_examples`; MachineError where the disk is full.
    """
    key, num_bytes = _key(sources, tokenizer, max_length)
    if num_bytes < CACHED_FROM:
        return _rendered(sources, tokenizer, max_length, TokenWriter(tokenizer.vocab_size))
    own = folder / key
    with _held(own) as is_ours:
        if not is_ours:  # another process is at it
            return _rendered(sources, tokenizer, max_length, TokenWriter(tokenizer.vocab_size))
        found = read_tokens(own)
        if found is not None:
            os.utime(own / DONE)
            say(f"the rows are rendered already: {len(found[0]):,} of them are read from the cache")
            return found[0], _counts_of(found[1], len(sources))
        writer = TokenWriter(tokenizer.vocab_size, own)
        if writer.facts:
            say(f"rendering goes on after {writer.facts['done']:,} rows")
        made = _rendered(sources, tokenizer, max_length, writer)
    make_room(folder, keep=key)
    return made


def _rendered(
    sources: Sequence[Sequence[Conversation]], tokenizer: ChatTokenizer, max_length: int, writer: TokenWriter
) -> tuple[TokenRows, list[RenderedCounts]]:
    """Renders what `writer` has not yet."""
    counts = _counts_of(writer.facts, len(sources))
    done = int(writer.facts.get("done", 0))
    committed = time.monotonic()
    rows = chain.from_iterable(sources)
    numbers = chain.from_iterable([n] * len(rows) for n, rows in enumerate(sources))
    number = next(islice(numbers, done, None), 0)
    for row in render_many(islice(rows, done, None), tokenizer, max_length):
        count = counts[number]
        length = len(row.input_ids_T) + row.num_cut
        count.longest = max(count.longest, length)
        if row.num_cut:
            count.num_cut += 1
            count.first_long = count.first_long or str(row.place)
        if row.num_targets:
            count.num_kept += 1
            writer.add(row.input_ids_T, row.trained_T.tobytes(), num_cut=row.num_cut, place=row.place)
        else:
            count.num_masked += 1
        count.num_pieces += row.is_text
        if row.is_last:
            done += 1
            count.num_rows += 1
            count.num_texts += row.is_text
            number = next(numbers, number)
            if time.monotonic() - committed > SECONDS_A_COMMIT:
                writer.commit(_facts(done, counts))
                committed = time.monotonic()
    return writer.finish(_facts(done, counts)), counts


def _facts(done: int, counts: Sequence[RenderedCounts]) -> dict[str, Any]:
    return {"done": done, "counts": [asdict(count) for count in counts]}


def _counts_of(facts: dict[str, Any], num_sources: int) -> list[RenderedCounts]:
    kept = facts.get("counts", [{}] * num_sources)
    return [RenderedCounts(**one) for one in kept]


def _key(
    sources: Sequence[Sequence[Conversation]], tokenizer: ChatTokenizer, max_length: int
) -> tuple[str, int]:
    """The name of these rows' tokens, and how many bytes the rows are."""
    encode, digest, num_bytes = msgspec.msgpack.Encoder().encode, hashlib.sha256(), 0
    for conversation in _with_ends(sources):
        record = encode(conversation)
        digest.update(record)
        num_bytes += len(record)
    facts = {
        "rows": digest.hexdigest(),
        "tokenizer": hashlib.sha256(tokenizer.tokenizer.to_str().encode()).hexdigest(),
        "template": tokenizer.template_text,
        "special": dict(tokenizer.special_tokens),
        "embeddings": tokenizer.num_rows,
        "max_length": max_length,
        "code": _code(),
    }
    return key_of(facts), num_bytes


def _with_ends(sources: Iterable[Iterable[Conversation]]) -> Iterator[Any]:
    """The conversations, and a None after those of each file: the same rows parted otherwise are others."""
    for rows in sources:
        yield from rows
        yield None


@functools.cache
def _code() -> str:
    """A digest of the code that renders, so that no tokens outlive a change of it."""
    digest = hashlib.sha256(f"{version('tokenizers')} {version('jinja2')}".encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Whether the folder is this process's alone, inside."""
    with _lock_file(folder) as file:
        yield try_lock(file.fileno())


def _lock_file(folder: Path) -> BinaryIO:
    """The open lock of a folder, which another process may be taking away at this moment."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return (folder / LOCK).open("a+b")
    except FileNotFoundError:
        folder.mkdir(parents=True, exist_ok=True)
        return (folder / LOCK).open("a+b")


def make_room(folder: Path, *, keep: str) -> None:
    """Takes away what was used longest ago until the cache is within its bounds, but for `keep` and what is being written.

    What a training reads stays readable for it, where the system lets a file that is open be taken away (Windows does not:
    there the files stay).
    """
    entries = sorted((one for one in folder.iterdir() if one.is_dir()), key=_last_used, reverse=True)
    total = 0
    for entry in entries:
        total += tree_bytes(entry)
        if total > MOST_KEPT and entry.name != keep:
            with _held(entry) as is_free:
                if is_free:
                    shutil.rmtree(entry, ignore_errors=True)


def _last_used(entry: Path) -> float:
    path = entry / DONE
    return (path if path.is_file() else entry).stat().st_mtime
