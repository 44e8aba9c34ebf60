from __future__ import annotations

import io
import json
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from myna.backends import GeneratedToken, Sampling
from myna.backends.text import TextModel
from myna.chat import BackendChat, ChatSampling, chat_loop, continue_file, once, stop_at
from myna.data.conversation import Message
from myna.data.render import ChatTokenizer
from myna.data.template import PLAIN_TEMPLATE
from myna.errors import DataError, ModelError, UsageError


@dataclass
class Parrot:
    """A ChatModel that says what it is told to say; it keeps what it was given, and whether it was closed."""

    says: Callable[[str], Iterator[str]]
    given: list[tuple[Message, ...]] = field(default_factory=list)
    raw: list[str] = field(default_factory=list)
    samplings: list[ChatSampling] = field(default_factory=list)
    num_closed: int = 0

    @property
    def name(self) -> str:
        return "parrot"

    def stream(self, messages: Sequence[Message], sampling: ChatSampling) -> Iterator[str]:
        self.given.append(tuple(messages))
        return self._say(messages[-1].content, sampling)

    def stream_raw(self, text: str, sampling: ChatSampling) -> Iterator[str]:
        self.raw.append(text)
        return self._say(text, sampling)

    def _say(self, text: str, sampling: ChatSampling) -> Iterator[str]:
        self.samplings.append(sampling)
        try:
            yield from self.says(text)
        finally:
            self.num_closed += 1


def echo(text: str) -> Iterator[str]:
    """The question back, letter by letter."""
    yield from f"<{text}>"


@dataclass
class Talk:
    """A chat from a list of lines; a line that is an exception is raised at the prompt."""

    model: Parrot
    shown: str
    prompts: list[str]


def talk(
    save_dir: Path,
    *lines: str | type[BaseException],
    says: Callable[[str], Iterator[str]] = echo,
    system: str | None = None,
    terminal: bool = False,
) -> Talk:
    stream, prompts, left = io.StringIO(), [], iter(lines)

    def read_line(prompt: str) -> str:
        prompts.append(prompt)
        line = next(left, EOFError)
        if isinstance(line, str):
            return line
        raise line

    model = Parrot(says)
    console = Console(file=stream, force_terminal=terminal, color_system="standard", width=20)
    chat_loop(
        model, console=console, read_line=read_line, system=system, sampling=ChatSampling(), save_dir=save_dir
    )
    return Talk(model, stream.getvalue(), prompts)


def user(content: str) -> Message:
    return Message("user", content)


def assistant(content: str) -> Message:
    return Message("assistant", content)


def test_turns_are_remembered_and_the_system_line_leads(tmp_path: Path) -> None:
    told = talk(tmp_path, "one", "", "two", system="Be brief.")
    system = Message("system", "Be brief.")
    assert told.model.given == [
        (system, user("one")),
        (system, user("one"), assistant("<one>"), user("two")),
    ]
    assert told.shown == "<one>\n<two>\n"
    assert told.model.num_closed == 2


def test_piped_it_is_quiet_and_on_a_terminal_it_is_coloured(tmp_path: Path) -> None:
    piped = talk(tmp_path, "hi")
    assert set(piped.prompts) == {""}
    assert "\x1b" not in piped.shown
    live = talk(tmp_path, "hi", terminal=True)
    assert live.prompts[0].strip()
    assert "parrot" in live.shown and "/help" in live.shown
    assert "\x1b[33m<\x1b[0m" in live.shown


def test_an_answer_is_shown_as_it_is_and_cannot_command_the_terminal(tmp_path: Path) -> None:
    answer = "a very long line\twithout any wrapping [bold]of its[/bold] own \x1b[2J\r\x9b :smile: \n\n  x"
    assert talk(tmp_path, "go", says=lambda _: iter([answer])).shown == f"{answer}\n"
    live = talk(tmp_path, "go", says=lambda _: iter([answer]), terminal=True).shown
    assert "\x1b[2J" not in live and "\x9b" not in live and "\r" not in live
    assert "a very long line\twithout any wrapping [bold]of its[/bold] own [2J :smile: " in live


def test_ctrl_c_in_an_answer_stops_it_and_keeps_what_was_said(tmp_path: Path) -> None:
    def interrupted(text: str) -> Iterator[str]:
        yield "so "
        yield "far"
        if text == "one":
            signal.raise_signal(signal.SIGINT)
            yield " never"

    told = talk(tmp_path, "one", "two", says=interrupted)
    assert told.model.given[1] == (user("one"), assistant("so far"), user("two"))
    assert told.model.num_closed == 2
    assert told.shown == "so far …\nso far\n"


def test_ctrl_c_before_a_word_takes_the_question_back(tmp_path: Path) -> None:
    def silent(text: str) -> Iterator[str]:
        if text == "one":
            signal.raise_signal(signal.SIGINT)
        yield "yes"

    told = talk(tmp_path, "one", "two", says=silent)
    assert told.model.given[1] == (user("two"),)
    assert "taken back" in told.shown


@pytest.mark.parametrize("leave", ["/quit", EOFError, KeyboardInterrupt])
def test_leaving_is_polite(tmp_path: Path, leave: str | type[BaseException]) -> None:
    told = talk(tmp_path, leave, "never asked", terminal=True)
    assert told.model.given == []
    assert len(told.prompts) == 1


def test_what_the_model_refuses_is_said_and_the_chat_goes_on(tmp_path: Path) -> None:
    def full(text: str) -> Iterator[str]:
        if text == "too much":
            raise ModelError("the context is full")
        yield from echo(text)

    told = talk(tmp_path, "one", "too much", "two", says=full)
    assert "the context is full" in told.shown
    assert told.model.given[-1] == (user("one"), assistant("<one>"), user("two"))


def test_a_bug_of_ours_is_not_hidden(tmp_path: Path) -> None:
    def broken(text: str) -> Iterator[str]:
        raise ZeroDivisionError
        yield text

    with pytest.raises(ZeroDivisionError):
        talk(tmp_path, "one", says=broken)


def test_reset_forgets_the_turns_and_keeps_the_system_line(tmp_path: Path) -> None:
    told = talk(tmp_path, "one", "/reset", "two", system="s")
    assert told.model.given[-1] == (Message("system", "s"), user("two"))


def test_a_new_system_line_begins_a_new_conversation(tmp_path: Path) -> None:
    told = talk(
        tmp_path, "one", "/system  Answer in  JSON.", "two", "/system", "/system -", "three", "/system"
    )
    assert told.model.given[1] == (Message("system", "Answer in  JSON."), user("two"))
    assert told.model.given[2] == (user("three"),)
    assert "system: Answer in  JSON.\n" in told.shown
    assert "no system line of this chat's own" in told.shown


def test_help_names_every_command_and_an_unknown_one_is_said(tmp_path: Path) -> None:
    told = talk(tmp_path, "/help", "/rest", "/")
    for command in ("/reset", "/save [FILE]", "/system [TEXT]", "/help", "/quit"):
        assert command in told.shown
    assert "there is no /rest;" in told.shown
    assert told.model.given == []


def test_two_slashes_begin_a_line_with_one(tmp_path: Path) -> None:
    assert talk(tmp_path, "//help me").model.given == [(user("/help me"),)]


def test_saved_conversations_are_rows_that_training_reads(tmp_path: Path) -> None:
    from myna.data.rows import load_conversations

    (tmp_path / "mine.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    )
    told = talk(tmp_path, "ä ", "/save", "/save mine.jsonl", system="s")
    assert str(tmp_path / "chat.jsonl") in told.shown
    row = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "ä"}]}
    row["messages"].append({"role": "assistant", "content": "<ä>"})
    saved = (tmp_path / "chat.jsonl").read_text(encoding="utf-8")
    assert json.loads(saved) == row
    assert "ä" in saved
    lines = (tmp_path / "mine.jsonl").read_text(encoding="utf-8").split("\n")
    assert [bool(line) for line in lines] == [True, True, False]
    loaded = load_conversations(tmp_path / "mine.jsonl")
    assert [c.messages[-1].content for c in loaded.conversations] == ["b", "<ä>"]


@pytest.mark.parametrize("line", ["/save notes.txt", "/save model.gguf"])
def test_saving_spares_what_is_no_row_file(tmp_path: Path, line: str) -> None:
    path = tmp_path / line.split()[1]
    path.write_bytes(b"\xffkeep")
    told = talk(tmp_path, "one", line, "two")
    assert path.read_bytes() == b"\xffkeep"
    assert ".jsonl" in told.shown
    assert len(told.model.given) == 2


def test_what_cannot_be_saved_is_said(tmp_path: Path) -> None:
    (tmp_path / "binary.jsonl").write_bytes(b"\xff")
    (tmp_path / "folder.jsonl").mkdir()
    told = talk(tmp_path, "/save", "one", "/save binary.jsonl", "/save folder.jsonl")
    assert "there is nothing to save yet" in told.shown
    assert told.shown.count("cannot be read") == 2
    assert (tmp_path / "binary.jsonl").read_bytes() == b"\xff"
    assert not (tmp_path / "chat.jsonl").exists()


# One answer


def plain_console() -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, force_terminal=False), stream


def test_once_asks_shows_and_gives_back() -> None:
    console, stream = plain_console()
    model = Parrot(echo)
    assert once(model, "hi", console=console, system="s") == "<hi>"
    assert stream.getvalue() == "<hi>\n"
    assert model.given == [(Message("system", "s"), user("hi"))]
    assert model.samplings[0].max_tokens == 90
    with pytest.raises(UsageError):
        once(model, "  ", console=console)


def test_once_is_interrupted_like_any_command() -> None:
    def interrupted(text: str) -> Iterator[str]:
        yield "a"
        signal.raise_signal(signal.SIGINT)
        yield "b"

    model = Parrot(interrupted)
    with pytest.raises(KeyboardInterrupt):
        once(model, "hi", console=plain_console()[0])
    assert model.num_closed == 1


def test_a_prompt_file_is_one_turn(tmp_path: Path) -> None:
    path = tmp_path / "ask.txt"
    path.write_bytes("\ufeffWhat is it?\r\nSay.\r\n".encode())
    model = Parrot(echo)
    assert continue_file(model, path, raw=False, console=plain_console()[0]) == "<What is it?\nSay.>"
    assert model.given == [(user("What is it?\nSay."),)]


def test_of_a_prompt_file_only_the_last_line_feed_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text(" one: \n\n")
    model = Parrot(echo)
    continue_file(model, path, raw=True, console=plain_console()[0])
    assert model.raw == [" one: \n"]


def test_chat_with_bob_ends_at_the_next_turn(tmp_path: Path) -> None:
    """The labs' prompt: a transcript continued without a template until the user would speak again."""
    path = tmp_path / "chat-with-bob.txt"
    prompt = "User: Hello, Bob.\nBob: Hello. How may I help you today?\nUser: Name a city.\nBob:"
    path.write_text(prompt + "\n")
    model = Parrot(lambda _: iter([" Mos", "cow.", "\nUs", "er", ": Thanks.", "\nBob:"]))
    console, stream = plain_console()
    answer = continue_file(model, path, raw=True, stop=["\nUser:"], console=console)
    assert answer == " Moscow."
    assert stream.getvalue() == " Moscow.\n"
    assert model.raw == [prompt]
    assert model.given == []
    assert model.num_closed == 1


def test_a_raw_prompt_is_shown_before_its_continuation_on_a_terminal(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("Once")
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, color_system=None)
    continue_file(Parrot(lambda _: iter([" upon"])), path, raw=True, console=console)
    assert stream.getvalue() == "Once upon\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "no such prompt file"), (b"", "empty"), (b" \n", "empty"), (b"a\xff", "UTF-8")],
)
def test_a_prompt_file_that_cannot_be_used(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "ask.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        continue_file(Parrot(echo), path, raw=True, console=plain_console()[0])
    assert caught.value.where == str(path)


# Stop texts


def cut_anyhow(text: str, chance: random.Random) -> Iterator[str]:
    while text:
        n = chance.randint(1, 4)
        yield text[:n]
        text = text[n:]


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("abcdef", [], "abcdef"),
        ("abcdef", ["xyz"], "abcdef"),
        ("abcdef", ["cd"], "ab"),
        ("abcdef", ["ef"], "abcd"),
        ("abcdef", ["a"], ""),
        ("aab aab aac", ["aac"], "aab aab "),
        ("ababac", ["abac"], "ab"),
        ("xabcd", ["abcd", "bc"], "xa"),  # "bc" is complete first
        ("xabc", ["bc", "abc"], "x"),  # both end together: the longer
        ("ends on the way: Use", ["User:"], "ends on the way: Use"),
        ("one\nUser: two\nBob:", ["\nBob:", "\nUser:"], "one"),
    ],
)
def test_a_stop_text_ends_it_however_it_is_cut(text: str, stop: list[str], expected: str) -> None:
    chance = random.Random(0)
    for _ in range(50):
        assert "".join(stop_at(cut_anyhow(text, chance), stop)) == expected


def test_nothing_is_held_back_that_cannot_be_a_stop_text() -> None:
    pieces = stop_at(iter(["hello ", "Us", "ual ", "thing"]), ["User:"])
    assert list(pieces) == ["hello ", "Usual ", "thing"]


def test_the_source_is_closed_when_a_stop_text_is_met() -> None:
    source = (letter for letter in "abc")
    assert list(stop_at(source, ["b"])) == ["a"]
    assert list(source) == []


def test_an_empty_stop_text_is_refused() -> None:
    with pytest.raises(UsageError):
        list(stop_at(iter(["a"]), ["", "b"]))


# Settings, and a real backend's side of the seam


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("repeat_penalty", 0.0),
        ("repeat_last_n", -1),
        ("seed", -1),
    ],
)
def test_settings_out_of_range_are_refused_by_their_flag(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')}"):
        ChatSampling(**{name: value})  # type: ignore[arg-type]


@dataclass
class Counting:
    """A Backend that says three tokens and keeps what it was asked."""

    asked: list[tuple[list[int], Sampling]] = field(default_factory=list)
    name: str = "counting"

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[GeneratedToken]:
        self.asked.append((list(prompts[0]), sampling))
        yield from (GeneratedToken(0, token_id) for token_id in (1, 2, 1))

    def score(self, token_ids: Sequence[int]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        raise NotImplementedError

    def close(self) -> None: ...


def test_a_backend_is_asked_in_token_ids_with_all_settings() -> None:
    vocabulary = {"?": 0, "a": 1, "b": 2, "</s>": 3}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(["</s>"])
    backend = Counting()
    chat_tokenizer = ChatTokenizer(tokenizer, PLAIN_TEMPLATE, {"eos_token": "</s>"})
    model = BackendChat(TextModel(backend, chat_tokenizer))
    sampling = ChatSampling(
        max_tokens=7, temperature=0.5, top_p=0.8, repeat_penalty=1.1, repeat_last_n=9, seed=3
    )
    assert "".join(model.stream_raw("a", sampling)).split() == ["a", "b", "a"]
    assert "".join(model.stream([user("a")], sampling)).split() == ["a", "b", "a"]
    assert model.name == "counting"
    asked = Sampling(7, 0.5, 0.8, 1.1, 9, 3, stop_ids=chat_tokenizer.stop_ids)
    assert [sampling for _, sampling in backend.asked] == [asked, asked]
    assert 3 in asked.stop_ids
    assert backend.asked[0][0] == [1]
