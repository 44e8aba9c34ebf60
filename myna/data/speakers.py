"""Who speaks, and as whom: from messages with a speaker's name to a conversation, and what is said of it.

Anna: hi          ─ assistant: Bot ─►   user       hi⏎are you there?
Anna: are you there?                    assistant  yes
Bot: yes
Anna: thanks                            left out: nobody answers it
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

from myna.data.check import fault, named, shown
from myna.data.conversation import Conversation, Message, Place, Role, Row
from myna.data.shapes import Keys, Made, Reading
from myna.errors import DataError

ASSISTANTS = frozenset(
    ("assistant", "bot", "chatbot", "agent", "support", "ai", "gpt", "chatgpt", "claude", "gemini", "copilot")
)
USERS = frozenset(("user", "human", "customer", "client", "visitor", "guest", "prompter", "caller"))
SYSTEMS = frozenset(("system",))
WORD = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True)
class Talk:
    """Messages in their order as (speaker, text), all of one conversation. `assistant` None: nobody is known to be it.

    `speakers` are those of the whole file, `notices` counts lines that nobody said, `sorted` is whether times changed the
    order.
    """

    lines: tuple[tuple[str, str], ...]
    place: Place
    assistant: str | None
    speakers: tuple[str, ...] = ()
    notices: int = 0
    sorted: bool = False


@dataclass(frozen=True)
class Spoken:
    """The messages of a conversation, and how many were joined or left out on the way."""

    messages: tuple[Message, ...]
    counts: Counter[str] = field(default_factory=Counter)


Talks = Callable[[Row, Keys, Reading], Iterator[Talk | DataError]]


def find_assistant(speakers: Collection[str]) -> str | None:
    """The speaker who is called as assistants are, or who speaks with a user alone; None where that is not one."""
    by_small = {speaker.casefold(): speaker for speaker in speakers}
    called = [small for small in by_small if ASSISTANTS.intersection(WORD.findall(small))]
    people = [small for small in by_small if small not in SYSTEMS]
    if not called and len(people) == 2 and len(USERS.intersection(people)) == 1:
        called = [small for small in people if small not in USERS]
    return by_small[called[0]] if len(called) == 1 else None


def spoken(lines: Sequence[tuple[str, str]], assistant: str) -> Spoken:
    """Messages in turn: successive ones of one side joined by a line break.

    Left out are answers before the first question, and questions at the end.
    """
    messages: list[Message] = []
    counts = Counter[str]()
    for speaker, text in lines:
        role = role_of(speaker, assistant)
        before = messages[-1].role if messages else None
        if role == before:
            messages[-1] = Message(role, f"{messages[-1].content}\n{text}")
            counts["joined"] += 1
        elif role == "system" and messages:
            counts["notices"] += 1
        elif role == "assistant" and before != "user":
            counts["first"] += 1
        else:
            messages.append(Message(role, text))
    while messages and messages[-1].role != "assistant":
        messages.pop()
        counts["unanswered"] += 1
    return Spoken(tuple(messages), counts)


def role_of(speaker: str, assistant: str) -> Role:
    """Whoever is neither the assistant nor the system is the user."""
    small = speaker.casefold()
    if small == assistant.casefold():
        return "assistant"
    return "system" if small in SYSTEMS else "user"


def read_spoken(talks: Talks) -> Callable[[Row, Keys, Reading], Made]:
    """The reader of a shape whose rows hold talks; where nobody answers in one there is no conversation."""

    def read(row: Row, keys: Keys, reading: Reading) -> Made:
        for talk in talks(row, keys, reading):
            wrong = talk if isinstance(talk, DataError) else _unknown(talk)
            if wrong is not None:
                yield wrong
            elif isinstance(talk, Talk):
                messages = spoken(talk.lines, str(talk.assistant)).messages
                if messages:
                    yield Conversation(messages, talk.place)

    return read


def _unknown(talk: Talk) -> DataError | None:
    """The fault of a talk where nobody is the assistant."""
    speakers = talk.speakers or tuple(dict.fromkeys(speaker for speaker, _ in talk.lines))
    if talk.assistant is None:
        message = f"nobody is known to be the assistant; the speakers are: {named(speakers)}"
        cure = "--set data.assistant=NAME says who it is; no chat? --set data.format=text"
        return fault("D015", message, where=talk.place, help=cure)
    if talk.assistant.casefold() not in {speaker.casefold() for speaker in speakers}:
        message = (
            f"`{shown(talk.assistant)}` (data.assistant) says nothing; the speakers are: {named(speakers)}"
        )
        return fault("D015", message, where=talk.place, help="--set data.assistant=NAME with one of these")
    return None


def told_of(talks: Talks) -> Callable[[Sequence[Row], Keys, Reading], Iterator[str]]:
    """What is to be said of the talks of a file: who the assistant is, and what was joined or left out."""

    def tell(rows: Sequence[Row], keys: Keys, reading: Reading) -> Iterator[str]:
        counts, names, users = Counter[str](), set[str](), set[str]()
        for row in rows:
            for talk in talks(row, keys, reading):
                if isinstance(talk, DataError) or talk.assistant is None:
                    continue
                found = spoken(talk.lines, talk.assistant)
                counts.update(found.counts)
                counts.update(notices=talk.notices, sorted=int(talk.sorted), silent=int(not found.messages))
                if found.messages:
                    names.add(talk.assistant)
                    users |= {s for s, _ in talk.lines if role_of(s, talk.assistant) == "user"}
        if names and not (len(names) == 1 and {n.casefold() for n in names} <= {"assistant"}):
            more = "" if len(users) < 2 else f", {len(users)} others are the user"
            yield f"the assistant is {named(sorted(names))}{more} (data.assistant names another)"
        yield from (sentence.format(counts[name]) for name, sentence in SAID.items() if counts[name])

    return tell


SAID = {
    "joined": "{} messages follow one of the same side and are joined to it by a line break",
    "first": "{} messages of the assistant stand before the first question and are left out",
    "unanswered": "{} messages at an end, which nobody answers, are left out",
    "silent": "{} conversations are left out: the assistant says nothing in them",
    "notices": "{} lines that nobody said (notices, left-out media) are left out",
    "sorted": "{} conversations are put in the order of their times",
}
