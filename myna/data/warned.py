"""What may be wrong with rows that can all be read: repeated, contradicting, leaking, lopsided, private.

Every finding is a warning: the rows train, and the user decides. Each looks at one conversation at a time and keeps a few
bytes of it, never the text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b

from myna.data.conversation import Conversation, Place
from myna.data.findings import Findings
from myna.data.near import MOST_RELATED, MOST_ROWS, NearDuplicates, NearFound
from myna.data.repeats import Alike, Digests, written

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
    ("a card number", "", re.compile(r"(?<![.\d])(?:\d[ -]?){12,18}\d\b")),
    ("an IBAN", "", re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")),
)


class Warnings:
    """Looks at conversations one after another, and at the end at all together.

    `held_out` are the digests of test rows, whose prompts should not stand here too. `private` also looks for secrets and
    personal data, `near` for conversations that are nearly the same: these two take longest. `not_checked` are sentences.
    """

    def __init__(
        self, findings: Findings, *, held_out: Digests, private: bool = True, near: bool = True
    ) -> None:
        self.digests = Digests()
        self._near = _near_duplicates() if near else None
        self.near_found: NearFound | None = None  # where another process looked for them
        self.not_checked = [] if self._near or not near else [NO_LIBRARY]
        self._findings, self._held_out, self._private = findings, held_out, private
        self._answers: Counter[bytes] = Counter()

    def look(self, conversation: Conversation, text: str, scripts: Sequence[str]) -> None:
        """A conversation, its turns as one text, and the scripts that this has letters of."""
        self.digests.add(conversation)
        if self._near is not None:
            self._near.look(conversation)
        if len(self._answers) <= MOST_LABELS:
            answer = written(conversation.messages[-1:])
            self._answers[blake2b(answer, digest_size=8).digest()] += 1
        warn, place = self._findings.warn, conversation.place
        if ("<" in text or "[" in text) and CONTROL.search(text):
            role = next((m.role for m in conversation.messages if CONTROL.search(m.text)), "row")
            warn("D034", place, f"a turn of the {role} spells a control token of chat templates", SPELLED)
        if "\0" in text:
            warn("D037", place, "a turn holds the character NUL", "take it out: few tokenizers know it")
        if "Cyrillic" in scripts and TWO_SCRIPTS.search(text):
            message = "a word has letters of two alphabets that look alike"
            warn("D035", place, message, "write it in one alphabet")
        if self._private:
            for kind in private_in(text):
                message = f"a turn holds {kind}"
                warn("D036", place, message, "a model may repeat it to anybody: replace it")

    @property
    def looks_for_near(self) -> bool:
        return self._near is not None

    def join(self, later: Warnings) -> None:
        """Adds what was seen in rows behind these; the findings are joined by themselves."""
        self.digests.join(later.digests)
        if len(self._answers) <= MOST_LABELS:
            self._answers.update(later._answers)

    def finish(self, places: Callable[[Sequence[int]], Mapping[int, Place | None]]) -> None:
        """What all conversations together show; `places` tells where some of them stand, by their number from 0."""
        digests, findings = self.digests, self._findings
        if not len(digests):
            return
        repeated, contradicting = digests.repeated(), digests.contradicting()
        near = self._near_alike()
        leaking = digests.standing_in(self._held_out)
        shown = {n for _, pairs in (repeated, contradicting, near) for pair in pairs for n in pair} | {
            *leaking[1]
        }
        at = places(sorted(shown)) if shown else {}
        for code, (count, pairs), told, cure in (
            ("D030", repeated, "the same conversation as {}", REPEATED),
            ("D031", contradicting, "the same prompt as {}, another answer", CONTRADICTED),
            ("D038", near, "nearly the same words as {}", NEARLY),
        ):
            first: list[tuple[object, str]] = [
                (at[later], told.format(_brief(at[before], at[later]))) for later, before in pairs
            ]
            findings.warn_many(code, count, first, cure)
        leaks: list[tuple[object, str]] = [
            (at[n], "its prompt stands in the test rows too") for n in leaking[1]
        ]
        findings.warn_many("D032", leaking[0], leaks, LEAKED)
        self._say_lopsided()

    def _near_alike(self) -> Alike:
        if self._near is None:
            return 0, []
        near = self.near_found or self._near.found()
        if not near.is_whole:
            self.not_checked.append(f"near duplicates past the first {MOST_ROWS:,} conversations")
        if near.num_crowded:
            self.not_checked.append(
                f"near duplicates of {near.num_crowded:,} conversations: each has most words in common "
                f"with {MOST_RELATED} others, which alone later ones were compared with"
            )
        return near.count, list(near.first)

    def _say_lopsided(self) -> None:
        answers, num_rows = self._answers, len(self.digests)
        if not 1 < len(answers) <= MOST_LABELS or num_rows < FEWEST_ROWS:
            return
        ((_, count),) = answers.most_common(1)
        if count > LOPSIDED * num_rows:
            share = f"{count / num_rows:.0%}"
            message = (
                f"{share} of the rows have one answer of {len(answers)}: "
                f"a model that always gives it is {share} right"
            )
            self._findings.warn("D033", "all rows", message, EVEN_OUT)


def _near_duplicates() -> NearDuplicates | None:
    """None where the library is not there: it has wheels for the usual machines alone."""
    try:
        return NearDuplicates()
    except ImportError:
        return None


NO_LIBRARY = "near duplicates: pip install rensa"
NEARLY = "keep one of them where they say the same; copies weigh a row more, and among test rows they flatter the score"
REPEATED = "take the copies out, or keep them to weigh the row more"
CONTRADICTED = "keep one answer, or say in the prompt what makes the difference"
LEAKED = "such rows are left out of the training rows"
EVEN_OUT = "add rows with the other answers, or look at them alone when it is evaluated"
SPELLED = "Myna keeps it text; where it was pasted from a rendered chat, make its turns messages of their own"


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


def _brief(place: Place | None, beside: Place | None) -> str:
    """A place without its file where that is the one spoken of."""
    if place is None:
        return "another"
    same = beside is not None and beside.path == place.path
    return str(place).removeprefix(place.path).lstrip(": ") if same else str(place)
