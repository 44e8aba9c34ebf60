"""The terminal chat: turns at a prompt, with commands; one question or a prompt file are in `talk`.

Nothing is printed but through the Console that is handed in, so what is piped stays plain and quiet.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.style import Style

from myna.data.conversation import Conversation, Message
from myna.errors import MachineError, ModelError, MynaError, UsageError
from myna.run import write_text
from myna.talk import (
    ANSWER_STYLE,
    QUIET_STYLE,
    BackendChat,
    ChatModel,
    ChatSampling,
    closable,
    continue_file,
    once,
    stop_at,
    with_system,
    write,
)

__all__ = [
    "COMMANDS",
    "BackendChat",
    "Chat",
    "ChatCommand",
    "ChatModel",
    "ChatSampling",
    "Desk",
    "chat_loop",
    "continue_file",
    "once",
    "run_command",
    "save_turns",
    "stop_at",
]

SAVE_NAME: Final = "chat.jsonl"
_FAULT_STYLE: Final = Style(color="red")


@dataclass(frozen=True)
class Chat:
    """Where a chat stands: its system line and the finished turns, ending with an answer."""

    system: str | None
    turns: tuple[Message, ...] = ()

    def messages(self) -> tuple[Message, ...]:
        return with_system(self.system, self.turns)


@dataclass(frozen=True)
class Desk:
    """What a command may use besides the chat."""

    console: Console
    save_dir: Path


@dataclass(frozen=True)
class ChatCommand:
    """One line of `COMMANDS`: from a chat, and what stands behind the command's name, to the chat after it."""

    function: Callable[[Chat, str, Desk], Chat]
    argument: str
    description: str


def chat_loop(
    model: ChatModel,
    *,
    console: Console,
    read_line: Callable[[str], str],
    system: str | None,
    sampling: ChatSampling,
    save_dir: Path,
) -> None:
    """Talks until /quit, Ctrl-D or Ctrl-C at the prompt; Ctrl-C in an answer stops the answer and keeps it.

    `read_line` is `input` or behaves like it. Lines are read without a prompt where no terminal is written to.
    What the model refuses (UsageError, ModelError: the conversation grew too long) is shown, and the chat goes
    on without that turn.
    """
    desk, chat = Desk(console, save_dir), Chat(system)
    if console.is_terminal:
        _tell(console, f"{model.name}. /help shows the commands, Ctrl-C stops an answer, /quit leaves.")
    while True:
        try:
            line = read_line("› " if console.is_terminal else "").strip()
            if line == "/quit":
                return
            chat = _next_chat(chat, line, model, sampling, desk)
        except (EOFError, KeyboardInterrupt):
            if console.is_terminal:
                write(console, "\n", QUIET_STYLE)
            return


def _next_chat(chat: Chat, line: str, model: ChatModel, sampling: ChatSampling, desk: Desk) -> Chat:
    if not line:
        return chat
    if line.startswith("/") and not line.startswith("//"):
        return run_command(chat, line, desk)
    question = Message("user", line[1:] if line.startswith("//") else line)
    try:
        answer = _answer(model, (*chat.messages(), question), sampling, desk.console)
    except (UsageError, ModelError) as error:
        _fault(desk.console, error)
        return chat
    if not answer:
        _tell(desk.console, "(no answer; the question is taken back)")
        return chat
    return replace(chat, turns=(*chat.turns, question, Message("assistant", answer)))


def _answer(model: ChatModel, messages: Sequence[Message], sampling: ChatSampling, console: Console) -> str:
    """One answer, shown as it comes; what was said until Ctrl-C."""
    said: list[str] = []
    try:
        with contextlib.closing(closable(model.stream(messages, sampling))) as pieces:
            for piece in pieces:
                said.append(piece)
                write(console, piece, ANSWER_STYLE)
    except KeyboardInterrupt:
        write(console, " …", QUIET_STYLE)
    write(console, "\n", ANSWER_STYLE)
    return "".join(said)


def run_command(chat: Chat, line: str, desk: Desk) -> Chat:
    """Runs a /command; an unknown one is said and changes nothing. /quit is the loop's own."""
    name, *rest = line.split(maxsplit=1)
    if name not in COMMANDS:
        _tell(desk.console, f"there is no {name}; /help shows the commands (// begins a line with a slash)")
        return chat
    return COMMANDS[name].function(chat, rest[0] if rest else "", desk)


def save_turns(chat: Chat, path: Path) -> None:
    """Adds the conversation to a JSONL file as one `messages` row, in the shape that training reads.

    Raises UsageError where there is nothing to save or the file is no JSONL, MachineError where it cannot be
    read or written.
    """
    if not chat.turns:
        raise UsageError("there is nothing to save yet")
    if path.suffix != ".jsonl":
        raise UsageError(f"{path.name}: rows are saved to a .jsonl file")
    row = {"messages": Conversation(chat.messages()).as_dicts()}
    try:
        before = path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise MachineError(f"cannot be read: {error}", where=str(path)) from None
    gap = "\n" if before and not before.endswith("\n") else ""
    write_text(path, f"{before}{gap}{json.dumps(row, ensure_ascii=False)}\n")


def _reset(chat: Chat, rest: str, desk: Desk) -> Chat:
    _tell(desk.console, "a new conversation")
    return Chat(chat.system)


def _save(chat: Chat, rest: str, desk: Desk) -> Chat:
    path = desk.save_dir / Path(rest or SAVE_NAME).expanduser()
    try:
        save_turns(chat, path)
    except (UsageError, MachineError) as error:
        _fault(desk.console, error)
    else:
        _tell(desk.console, f"saved as a line of {path}")
    return chat


def _system(chat: Chat, rest: str, desk: Desk) -> Chat:
    """A new system line begins a new conversation: earlier answers were not given under it."""
    if not rest:
        own = "no system line of this chat's own; where the run has one, that one applies"
        _tell(desk.console, f"system: {chat.system}" if chat.system else own)
        return chat
    _tell(
        desk.console, f"a new conversation {'as the run has it' if rest == '-' else 'with this system line'}"
    )
    return Chat(None if rest == "-" else rest)


def _help(chat: Chat, rest: str, desk: Desk) -> Chat:
    for name, command in COMMANDS.items():
        _tell(desk.console, f"{f'{name} {command.argument}':<14} {command.description}")
    _tell(desk.console, f"{'/quit':<14} leave; so do Ctrl-D and, at the prompt, Ctrl-C")
    return chat


COMMANDS: Final[Mapping[str, ChatCommand]] = {
    "/reset": ChatCommand(_reset, "", "begin a new conversation"),
    "/save": ChatCommand(_save, "[FILE]", f"add this conversation as a row to FILE, by default {SAVE_NAME}"),
    "/system": ChatCommand(
        _system, "[TEXT]", "begin anew with TEXT as system line (-: as the run has it), or show it"
    ),
    "/help": ChatCommand(_help, "", "these lines"),
}


def _tell(console: Console, words: str) -> None:
    write(console, f"{words}\n", QUIET_STYLE)


def _fault(console: Console, error: MynaError) -> None:
    write(console, f"{error}\n", _FAULT_STYLE)
