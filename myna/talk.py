"""Something to talk to: what it is asked for, and one answer of it, to a question or to a prompt file.

Nothing is printed but through the Console that is handed in, so what is piped stays plain and quiet.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style

from myna.backends import Sampling
from myna.backends.text import TextModel
from myna.data.conversation import Conversation, Message
from myna.errors import DataError, UsageError

LOOP_MAX_TOKENS: Final = 512
ONCE_MAX_TOKENS: Final = 90

ANSWER_STYLE: Final = Style(color="yellow")
QUIET_STYLE: Final = Style(dim=True)
# What could move the cursor or recolour the terminal; line feeds and tabs stay.
_CONTROLS: Final = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


@dataclass(frozen=True)
class ChatSampling:
    """How answers are chosen. Raises UsageError for a value out of range.

    The defaults stay close to what `myna evaluate` measures, which is greedy: temperature 0.2 and top_p 0.9 are
    what the packaged model's card advises. There is no repeat penalty unless asked for: it punishes the quotes
    and brackets of a tuned model's JSON. A base model that goes round in circles is helped by 1.1.
    """

    max_tokens: int = LOOP_MAX_TOKENS
    temperature: float = 0.2
    top_p: float = 0.9
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name, is_right, range_words in (
            ("max_tokens", self.max_tokens >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 (always the likeliest token) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repeat_penalty", 0 < self.repeat_penalty < float("inf"), "above 0; 1 is none"),
            ("repeat_last_n", self.repeat_last_n >= 0, "0 or more"),
            ("seed", self.seed >= 0, "0 or more"),
        ):
            if not is_right:
                flag = f"--{name.replace('_', '-')}"
                raise UsageError(f"{flag} {getattr(self, name)}: it must be {range_words}")


class ChatModel(Protocol):
    """Something to talk to. Closing an iterator stops the work behind it."""

    @property
    def name(self) -> str: ...

    def stream(self, messages: Sequence[Message], sampling: ChatSampling) -> Iterator[str]: ...

    def stream_raw(self, text: str, sampling: ChatSampling) -> Iterator[str]: ...


@dataclass(frozen=True)
class BackendChat:
    """A backend and its tokenizer as a ChatModel; a stop token of the tokenizer's ends every answer."""

    model: TextModel

    @property
    def name(self) -> str:
        return self.model.name

    def stream(self, messages: Sequence[Message], sampling: ChatSampling) -> Iterator[str]:
        return self.model.stream(Conversation(tuple(messages)), self._token_sampling(sampling))

    def stream_raw(self, text: str, sampling: ChatSampling) -> Iterator[str]:
        return self.model.stream_raw(text, self._token_sampling(sampling))

    def _token_sampling(self, sampling: ChatSampling) -> Sampling:
        return Sampling(**vars(sampling), stop_ids=self.model.tokenizer.stop_ids)


# One answer


def once(
    model: ChatModel,
    text: str,
    *,
    console: Console,
    system: str | None = None,
    sampling: ChatSampling | None = None,
    stop: Sequence[str] = (),
) -> str:
    """Asks one question, shows the answer as it comes and gives it back. Short by default: 90 tokens."""
    if not text.strip():
        raise UsageError("there is nothing to ask", help='--once "What can you do?"')
    chosen = sampling or ChatSampling(max_tokens=ONCE_MAX_TOKENS)
    messages = with_system(system, (Message("user", text),))
    return _show_all(stop_at(model.stream(messages, chosen), stop), console)


def continue_file(
    model: ChatModel,
    path: Path,
    *,
    raw: bool,
    stop: Sequence[str] = (),
    console: Console,
    system: str | None = None,
    sampling: ChatSampling | None = None,
) -> str:
    """The text of a file as one chat turn, or with `raw` continued as it stands, without a template.

    Each text of `stop` ends the answer and is no part of it. Gives the answer without the file's text, which is
    shown before it only on a terminal and only where it is continued. Raises DataError for a file that is missing,
    empty or not UTF-8.
    """
    text = read_prompt_file(path)
    if not raw:
        return once(model, text, console=console, system=system, sampling=sampling, stop=stop)
    if console.is_terminal:
        write(console, text, QUIET_STYLE)
    chosen = sampling or ChatSampling(max_tokens=ONCE_MAX_TOKENS)
    return _show_all(stop_at(model.stream_raw(text, chosen), stop), console)


def read_prompt_file(path: Path) -> str:
    """The text of a prompt file, less the one line feed that editors end a file with (as llama.cpp does)."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError("there is no such prompt file", where=str(path)) from None
    except UnicodeDecodeError as error:
        raise DataError(f"is not UTF-8 (byte {error.start})", where=str(path)) from None
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=str(path)) from None
    if not text.strip():
        raise DataError("the prompt file is empty", where=str(path), help="write what to ask into it")
    return text.removesuffix("\n")


def stop_at(pieces: Iterator[str], stop: Sequence[str]) -> Generator[str, None, None]:
    """`pieces` up to the first stop text, which is left out, also where it is spread over several pieces.

    What could be the beginning of a stop text is held back until it is known not to be. Of stop texts that overlap
    the one complete first counts, so the result does not depend on where pieces are cut. `pieces` is closed.
    """
    if "" in stop:
        raise UsageError("a stop text cannot be empty", help='--stop "User:"')
    held = ""
    with contextlib.closing(closable(pieces)) as source:
        for piece in source:
            held += piece
            end = _first_stop(held, stop)
            if end is not None:
                if end:
                    yield held[:end]
                return
            safe = len(held) - _longest_beginning(held, stop)
            if safe:
                yield held[:safe]
                held = held[safe:]
        if held:
            yield held


def _first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the stop text begins that is complete first; the longer one where two end together."""
    found = [(text.index(word) + len(word), text.index(word)) for word in stop if word in text]
    return min(found)[1] if found else None


def _longest_beginning(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a stop text."""
    longest = max((len(word) for word in stop), default=0)
    lengths = range(min(longest, len(text)), 0, -1)
    return next((n for n in lengths if any(word.startswith(text[-n:]) for word in stop)), 0)


# To the console


def _show_all(pieces: Iterator[str], console: Console) -> str:
    """Shows pieces as they come, ends the line, and gives the whole text."""
    said: list[str] = []
    with contextlib.closing(closable(pieces)) as source:
        for piece in source:
            said.append(piece)
            write(console, piece, ANSWER_STYLE)
    text = "".join(said)
    if not text.endswith("\n"):
        write(console, "\n", ANSWER_STYLE)
    return text


def closable(pieces: Iterator[str]) -> Generator[str, None, None]:
    """An iterator need not have `close`; a generator has one, and hands it on."""
    yield from pieces


def write(console: Console, text: str, style: Style) -> None:
    """Exactly this text, unwrapped; on a terminal in colour, and without codes that would command it."""
    segment = Segment(text.translate(_CONTROLS), style) if console.is_terminal else Segment(text)
    console.print(Segments([segment]), end="", soft_wrap=True)


def with_system(system: str | None, turns: tuple[Message, ...]) -> tuple[Message, ...]:
    return (Message("system", system), *turns) if system else turns
