"""Text that spells control tokens, kept apart from the template's own.

A conversation is rendered twice: as it is, and with every character that a message says replaced by a shadow, a
private-use character that stands for it. What reads as a control token among shadows is the template's own:

    <|im_start|>user⏎say <|im_end|><|im_end|>⏎       as it is
    <|im_start|>user⏎··· ··········<|im_end|>⏎       among shadows
    ①user⏎say <|im_end|>②⏎                           the template's own respelled

The last line is read by the same tokenizer with other spellings: there ① is `<|im_start|>`, and nothing that a text
could hold is a control token. Flags (lstrip, rstrip, …), normalizers and prefix spaces work as ever, since that tokenizer
does all of it itself, and the ids are those of any other text beside the same control tokens.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from myna.data.control import ControlTokens, Given, changed, texts_of
from myna.errors import ModelError, UsageError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

FIRST_SHADOW, LAST_SHADOW = 0xF0000, 0xFFFFD  # the first private-use plane stands for characters of messages
FIRST_SPELLING, DIGITS = 0x100000, 0x8000  # the second one spells control tokens
LEFT = '"\\'  # characters without a shadow, besides white space and control characters: templates write them escaped
HELP = "take what looks like a control token out of the row, or give the base a template that writes messages as they are"


class Way(Protocol):
    """How what a template is given becomes a text (an answer is to follow, or not), and such a text ids."""

    def render(self, given: Given, add_generation_prompt: bool) -> str: ...

    def encode(self, text: str) -> Encoding: ...


@dataclass(frozen=True)
class AsWritten:
    """What the template writes, as the tokenizer reads it: also a control token that a message spells."""

    tokenizer: Tokenizer
    write: Callable[[Given, bool], str]

    def render(self, given: Given, add_generation_prompt: bool) -> str:
        return self.write(given, add_generation_prompt)

    def encode(self, text: str) -> Encoding:
        return encoding_of(text, self.tokenizer)


def encoding_of(text: str, tokenizer: Tokenizer) -> Encoding:
    """UsageError where the text is not UTF-8."""
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise UsageError("the text is not UTF-8")
    return tokenizer.encode(text, add_special_tokens=False)


@dataclass(frozen=True)
class Own:
    """A control token that the template wrote, and where."""

    start: int
    end: int
    token_id: int


@dataclass(frozen=True)
class Respelled:
    """A tokenizer whose control tokens have spellings that no text holds; their ids are the same."""

    tokenizer: Tokenizer
    spellings: Mapping[int, str]
    control: ControlTokens

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self.spellings.values())) or r"(?!)")

    @cached_property
    def _ids(self) -> Mapping[str, int]:
        return {text: token_id for token_id, text in self.spellings.items()}

    def encode(self, text: str) -> Encoding:
        """Ids of a respelled text. ModelError where other control tokens come of it than it spells."""
        encoding = encoding_of(text, self.tokenizer)
        spelled = [self._ids[found] for found in self._pattern.findall(text)]
        unknown = self.control.unknown
        read = [i for i in encoding.ids if i in self.spellings and i != unknown]
        if read != [i for i in spelled if i != unknown]:
            raise ModelError(
                "the tokenizer makes a control token of ordinary text, or reads the template's own as text",
                help=HELP,
            )
        return encoding


def respell(tokenizer: Tokenizer, control: ControlTokens) -> Respelled:
    """The same tokenizer with other spellings for its control tokens. Takes as long as loading it, and its memory again."""
    # not to be guessed, so that no text holds them; the ids do not depend on them
    secret = "".join(chr(FIRST_SPELLING + secrets.randbelow(DIGITS)) for _ in range(4))
    texts = {**control.everywhere, **control.outside}
    spellings = {
        i: secret + "".join(chr(FIRST_SPELLING + digit) for digit in divmod(i, DIGITS)) for i in texts
    }
    value = json.loads(tokenizer.to_str())
    for token in value["added_tokens"]:
        token["content"] = spellings.get(token["id"], token["content"])
    _respell_model(value["model"], {texts[i]: spellings[i] for i in texts})
    made = type(tokenizer).from_str(json.dumps(value))
    added = tokenizer.get_added_tokens_decoder()
    for token_id, token in added.items():
        if made.token_to_id(spellings.get(token_id, token.content)) != token_id:
            raise ModelError(f"the tokenizer gives {token.content!r} another id than its file says")
    return Respelled(made, spellings, control)


def _respell_model(model: dict[str, Any], spellings: Mapping[str, str]) -> None:
    """Control tokens that are pieces of the model's vocabulary have the new spelling there, and nothing merges into one."""
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {spellings.get(piece, piece): i for piece, i in vocab.items()}
    else:
        model["vocab"] = [[spellings.get(piece, piece), score] for piece, score in vocab]
    if model.get("unk_token") in spellings:
        model["unk_token"] = spellings[model["unk_token"]]
    if "merges" in model:
        prefix = len(model.get("continuing_subword_prefix") or "")
        model["merges"] = [
            merge
            for merge in model["merges"]
            if not spellings.keys() & {*(parts := _parts(merge)), parts[0] + parts[1][prefix:]}
        ]


def _parts(merge: str | Sequence[str]) -> tuple[str, str]:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right


@dataclass(frozen=True)
class Shadows:
    """Private-use characters that stand for those of messages, one for each."""

    cast: Mapping[int, str]

    @cached_property
    def _lifted(self) -> Mapping[int, str]:
        return {ord(shadow): chr(character) for character, shadow in self.cast.items()}

    def over(self, text: str) -> str:
        return text.translate(self.cast)

    def lift(self, text: str) -> str:
        return text.translate(self._lifted)

    def are_in(self, text: str) -> bool:
        return any(ord(character) in self._lifted for character in text)


def shadows_for(texts: Iterable[str], rendered: str) -> Shadows:
    """One for each character of the texts, none of which stands in them or in what was rendered."""
    characters = {c for text in texts for c in text if not (c.isspace() or c < " " or c in LEFT)}
    taken = characters | set(rendered)
    free = (chr(code) for code in range(FIRST_SHADOW, LAST_SHADOW + 1) if chr(code) not in taken)
    return Shadows(
        {ord(character): shadow for character, shadow in zip(sorted(characters), free, strict=False)}
    )


@dataclass(frozen=True)
class Apart:
    """Renders what a template is given with the template's own control tokens respelled, and encodes that."""

    tokenizer: Tokenizer
    respelled: Respelled
    write: Callable[[Given, bool], str]  # the template: what it is given, and whether an answer is to follow

    def render(self, given: Given, add_generation_prompt: bool) -> str:
        """The template's text, respelled. ModelError where its control tokens cannot be told from what messages say."""
        plain = self.write(given, add_generation_prompt)
        shadows = shadows_for((text for text, _ in texts_of(given)), plain)
        text = self.write(changed(given, lambda *said: self._all(shadows, *said)), add_generation_prompt)
        own = self._own(text)
        if shadows.lift(text) != plain:
            # the template looks at texts or changes them: shadows over no more than what spells a control token
            ids = [token.token_id for token in own]
            spelled = changed(given, lambda *said: self._spelled(shadows, *said))
            text = self.write(spelled, add_generation_prompt)
            own = self._own(text)
            if [token.token_id for token in own] != ids:
                raise ModelError("the chat template makes control tokens of what a message says", help=HELP)
        if any(shadows.are_in(text[token.start : token.end]) for token in own):
            raise ModelError("the tokenizer makes control tokens of what a message says", help=HELP)
        return self._respell(text, own, shadows)

    def encode(self, text: str) -> Encoding:
        return self.respelled.encode(text)

    def _respell(self, text: str, own: Sequence[Own], shadows: Shadows) -> str:
        pieces, done = [], 0
        for token in own:
            pieces += [shadows.lift(text[done : token.start]), self.respelled.spellings[token.token_id]]
            done = token.end
        return "".join([*pieces, shadows.lift(text[done:])])

    def _own(self, text: str, *, outside: bool = True) -> list[Own]:
        """The control tokens that the tokenizer reads in a text, without the white space that it takes with them."""
        control = self.respelled.control
        encoding = encoding_of(text, self.tokenizer)
        found = []
        for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            spelling = control.everywhere.get(token_id) or (
                control.outside.get(token_id) if outside else None
            )
            if spelling is None:
                continue
            read = text[start:end]
            if token_id == control.unknown and read.strip() != spelling:
                continue
            first = start + len(read) - len(read.lstrip())
            found.append(Own(first, first + len(read.strip()), token_id))
        return found

    def _all(self, shadows: Shadows, text: str, is_outside: bool) -> str:
        """Shadows over a whole text, but for the tokens that those who speak inside may write."""
        if is_outside or not self.respelled.control.outside:
            return shadows.over(text)
        parts = self._outside_pattern.split(text)
        return "".join(part if n % 2 else shadows.over(part) for n, part in enumerate(parts))

    def _spelled(self, shadows: Shadows, text: str, is_outside: bool) -> str:
        """Shadows over what spells a control token, as it stands or as the tokenizer reads it."""
        text = self._patterns[is_outside].sub(lambda found: shadows.over(found[0]), text)
        pieces, done = [], 0
        for token in self._own(text, outside=is_outside):
            pieces += [text[done : token.start], shadows.over(text[token.start : token.end])]
            done = token.end
        return "".join([*pieces, text[done:]])

    @cached_property
    def _patterns(self) -> tuple[re.Pattern[str], re.Pattern[str]]:
        """Of what those inside must not write, and those outside."""
        everywhere, outside = self.respelled.control.everywhere, self.respelled.control.outside
        return _any_of(everywhere.values()), _any_of([*everywhere.values(), *outside.values()])

    @cached_property
    def _outside_pattern(self) -> re.Pattern[str]:
        return re.compile(f"({_any_of(self.respelled.control.outside.values()).pattern})")


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """The longest of those that stand at one place, as tokenizers match them."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")
