"""What may be wrong with rows that can all be read: repeated, contradicting, leaking, lopsided, private.

Every finding is a warning: the rows train, and the user decides. Each looks at one conversation at a time and keeps a few
bytes of it, never the text.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from myna.data.conversation import Conversation, Message, Place

MOST_LABELS = 50  # more different answers than that are no labels
FEWEST_ROWS = 50
LOPSIDED = 0.9  # the part of the rows with one answer from which on it is said
CONTROL = re.compile(
    r"<\|[a-z_0-9]{2,40}\|>|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>|</?tool_(?:call|response)>"
)
# letters of two alphabets in one word: a Cyrillic а in an English word looks the same and is another token
TWO_SCRIPTS = re.compile(r"[A-Za-z][\u0400-\u04ff]|[\u0400-\u04ff][A-Za-z]")
# what it is, a sign that is in every one of them and is looked for first, and the pattern
PRIVATE: tuple[tuple[str, str, re.Pattern[str]], ...] = (
    ("a private key", "-----BEGIN", re.compile(r"-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----")),
    (
        "an access key",
        "",
        re.compile(
            r"\b(?:AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36,}|sk-(?:[a-z]+-)?[A-Za-z0-9_-]{20,}|hf_[A-Za-z0-9]{30,}"
            r"|xox[abprs]-[A-Za-z0-9-]{10,}|AIza[0-9A-Za-z_-]{35})"
        ),
    ),
    (
        "an e-mail address",
        "@",
        re.compile(r"\b[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63})*\.[A-Za-z]{2,24}\b"),
    ),
    ("a card number", "", re.compile(r"\b(?:\d[ -]?){12,18}\d\b")),
    ("an IBAN", "", re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")),
)


@dataclass(frozen=True)
class Warned:
    """One finding: its code, what it is, and where."""

    code: str
    message: str
    place: Place | None
    help: str


def warnings_of(
    conversations: Iterable[Conversation],
    *,
    held_out: frozenset[bytes] = frozenset(),
    private: bool = True,
) -> Iterator[Warned]:
    """What is to be said of conversations that were read, one after another, and at the end of all together.

    `held_out` are the digests of the prompts of test rows, where there are any (`prompt_digests`). `private` also looks for
    secrets and personal data, which takes longest.
    """
    whole: dict[bytes, Place | None] = {}
    answered: dict[bytes, tuple[bytes, Place | None]] = {}
    answers: Counter[bytes] = Counter()
    num_rows = 0
    for conversation in conversations:
        num_rows += 1
        place = conversation.place
        prompt, answer = _digest(conversation.messages[:-1]), _digest(conversation.messages[-1:])
        if prompt + answer in whole:
            first = _brief(whole[prompt + answer], place)
            yield Warned("D030", f"the same conversation as {first}", place, REPEATED)
        else:
            whole[prompt + answer] = place
            before = answered.setdefault(prompt, (answer, place))
            if before[0] != answer:
                message = f"the same prompt as {_brief(before[1], place)}, another answer"
                yield Warned("D031", message, place, CONTRADICTED)
        if prompt in held_out:
            yield Warned("D032", "its prompt stands in the test rows too", place, LEAKED)
        if len(answers) <= MOST_LABELS:
            answers[answer] += 1
        yield from _in_texts(conversation, private=private)
    yield from _lopsided(answers, num_rows)


def _lopsided(answers: Counter[bytes], num_rows: int) -> Iterator[Warned]:
    if not 1 < len(answers) <= MOST_LABELS or num_rows < FEWEST_ROWS:
        return
    ((_, count),) = answers.most_common(1)
    if count > LOPSIDED * num_rows:
        share = f"{count / num_rows:.0%}"
        message = f"{share} of the rows have one answer of {len(answers)}: a model that always gives it is {share} right"
        yield Warned(
            "D033",
            message,
            None,
            "add rows with the other answers, or look at them alone when it is evaluated",
        )


REPEATED = "take the copies out, or keep them to weigh the row more"
CONTRADICTED = "keep one answer, or say in the prompt what makes the difference"
LEAKED = "such rows are left out of the training rows"


def prompt_digests(conversations: Iterable[Conversation]) -> frozenset[bytes]:
    """Of test rows: what `warnings_of` looks for among the training rows."""
    return frozenset(_digest(conversation.messages[:-1]) for conversation in conversations)


def _in_texts(conversation: Conversation, *, private: bool) -> Iterator[Warned]:
    """The first finding of each kind in one conversation; what was found is not repeated, it may be a secret."""
    place = conversation.place
    for message in conversation.messages:
        text = message.content
        if ("<" in text or "[" in text) and CONTROL.search(text):
            yield Warned(
                "D034", f"a {message.role} turn spells a control token of chat templates", place, SPELLED
            )
            break
    if any("\0" in message.content for message in conversation.messages):
        yield Warned("D037", "a turn holds the character NUL", place, "take it out: few tokenizers know it")
    wide = (message.content for message in conversation.messages if not message.content.isascii())
    if any(TWO_SCRIPTS.search(text) for text in wide):
        yield Warned(
            "D035", "a word has letters of two alphabets that look alike", place, "write it in one alphabet"
        )
    if private:
        found = {kind for message in conversation.messages for kind in private_in(message.content)}
        for kind in (kind for kind, _, _ in PRIVATE if kind in found):
            yield Warned(
                "D036", f"a turn holds {kind}", place, "a model may repeat it to anybody: replace it"
            )


SPELLED = "it is text there: replace it, for a base may read it as the token"


def private_in(text: str) -> list[str]:
    """Kinds of secrets and personal data in a text: by patterns, cards and IBANs by their check digits too."""
    found = []
    for kind, sign, pattern in PRIVATE:
        check = CHECKS.get(kind)
        if sign not in text:
            continue
        if any(check is None or check(match.group()) for match in pattern.finditer(text)):
            found.append(kind)
    return found


def is_card(text: str) -> bool:
    """Luhn's check digit (ISO/IEC 7812-1)."""
    digits = [int(c) for c in text if c.isdigit()]
    doubled = [d if n % 2 == 0 else sum(divmod(2 * d, 10)) for n, d in enumerate(reversed(digits))]
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and sum(doubled) % 10 == 0


def is_iban(text: str) -> bool:
    """The check digits of ISO 13616: the number modulo 97 is 1."""
    plain = text.replace(" ", "")
    moved = plain[4:] + plain[:4]
    return 15 <= len(plain) <= 34 and int("".join(str(int(c, 36)) for c in moved)) % 97 == 1


CHECKS = {"a card number": is_card, "an IBAN": is_iban}


def _digest(messages: Sequence[Message]) -> bytes:
    text = "\x1e".join(f"{message.role}\x1f{message.content}" for message in messages)
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=12).digest()


def _brief(place: Place | None, beside: Place | None) -> str:
    """A place without its file where that is the one spoken of."""
    if place is None:
        return "another"
    same = beside is not None and beside.path == place.path
    return str(place).removeprefix(place.path).lstrip(": ") if same else str(place)
