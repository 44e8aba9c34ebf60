"""Conversation → Example: the only place where a chat template is applied and the only place where the loss mask is made.

Training, chat, evaluation and export all call `render_prompt` or `render_example`, so they cannot disagree.

    <|im_start|>user⏎Hi<|im_end|>⏎<|im_start|>assistant⏎ │ Hello!<|im_end|> │ ⏎<|im_start|>user⏎Bye …
    └──────────── prompt: label -100 ────────────────────┘ └── trained ─────┘ └── next prompt ──────

A conversation is cut at exactly these borders and each piece is tokenized by itself. So the ids a model is trained
on are the ids it is prompted with later, also where a tokenizer would have merged across the border.

Nothing that a message says becomes a control token. Those of a rendered conversation are compared with what its template
writes by itself (`control.py`); where they differ it is rendered anew, with these kept apart from what is said
(`apart.py`). Backends are given ids: none reads a text again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from myna.data.apart import Apart, AsWritten, respell
from myna.data.control import TALK, ControlTokens, Given, control_tokens, neutral
from myna.data.conversation import Conversation, Message, Place
from myna.data.lost_tools import refuse_lost_tools
from myna.data.pieces import IGNORE as IGNORE  # noqa: PLC0414 (others take it from here)
from myna.data.pieces import IntArray, pieces_of
from myna.data.template import PLAIN_TEMPLATE, compile_template, plain_template, read_template
from myna.errors import DataError, ModelError
from myna.run import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MOST_KINDS = 4096  # of conversations whose control tokens are remembered


@dataclass(frozen=True)
class Example:
    """One rendered row: `input_ids_T` and, aligned with it, `labels_T` (the id itself where trained, else IGNORE)."""

    input_ids_T: IntArray
    labels_T: IntArray
    num_cut: int = 0
    place: Place | None = None

    @property
    def num_targets(self) -> int:
        """Target tokens: the first position of a document predicts nothing, so a label there does not count."""
        return int((self.labels_T[1:] != IGNORE).sum())


@dataclass(frozen=True)
class ChatTokenizer:
    """A tokenizer and its own chat template, read from a folder without transformers (which would load torch)."""

    tokenizer: Tokenizer
    template_text: str
    special_tokens: Mapping[str, str]
    num_rows: int | None = None  # of the model's embeddings, where the folder tells

    @cached_property
    def _template(self) -> Any:
        return compile_template(self.template_text)

    @cached_property
    def has_opaque_template(self) -> bool:
        """Whether the template only hands contents through, as its code shows."""
        return bool(self._template.is_opaque())

    @property
    def has_own_template(self) -> bool:
        """False where the base brought none and PLAIN_TEMPLATE stands in."""
        return not self.template_text.endswith(PLAIN_TEMPLATE)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        added = self.tokenizer.get_added_tokens_decoder()
        return frozenset(i for i, token in added.items() if token.special)

    @cached_property
    def closing_ids(self) -> frozenset[int]:
        """The special tokens, one of which ends an assistant turn. What stands for unknown characters ends none."""
        return self.special_ids - {self.control.unknown}

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """What ends an answer: the token that closes an assistant turn in the template, and the tokenizer's EOS."""
        probe = Conversation((Message("user", "a"), Message("assistant", "b")))
        ids, labels = render_pieces(probe, self)
        closing = int(ids[labels != IGNORE][-1])
        eos = self.special_tokens.get("eos_token")
        eos_id = self.tokenizer.token_to_id(eos) if eos else None
        return frozenset({closing} if eos_id is None else {closing, int(eos_id)})

    @property
    def vocab_size(self) -> int:
        return int(self.tokenizer.get_vocab_size(with_added_tokens=True))

    def render_text(
        self, conversation: Conversation, *, add_generation_prompt: bool, **variables: str
    ) -> str:
        """The template's text, as `transformers`' apply_chat_template(tokenize=False) gives it."""
        return self._write(given(conversation), add_generation_prompt, **variables)

    def _write(self, told: Given, add_generation_prompt: bool, **variables: str) -> str:
        import jinja2

        try:
            text = self._template.render(
                **told, add_generation_prompt=add_generation_prompt, **self.special_tokens, **variables
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise ModelError(f"the chat template refuses a conversation: {error}") from error
        return str(text)

    def encode(self, text: str) -> list[int]:
        """Ids of raw text: control tokens spelled in it are read as such, none are added. UsageError: no UTF-8."""
        return self.within_rows(self.as_written.encode(text).ids)

    def encode_said(self, text: str) -> list[int]:
        """Ids of what somebody says, without a template: nothing in it is a control token. UsageError: no UTF-8."""
        ids = self.as_written.encode(text).ids
        if not self.control.everywhere.keys().isdisjoint(ids):
            ids = self.apart.encode(text).ids
        return self.within_rows(ids)

    @cached_property
    def control(self) -> ControlTokens:
        try:
            text = self.render_text(TALK, add_generation_prompt=True)
        except ModelError:  # a template may want a system line
            text = ""
        return control_tokens(self.tokenizer, self.template_text, self.as_written.encode(text).ids)

    @cached_property
    def as_written(self) -> AsWritten:
        """The template's text as the tokenizer reads it."""
        return AsWritten(self.tokenizer, self._write)

    @cached_property
    def apart(self) -> Apart:
        """The same with control tokens kept apart from what is said. Made when first needed: it takes a second tokenizer."""
        return Apart(self.tokenizer, respell(self.tokenizer, self.control), self._write)

    @cached_property
    def _kinds(self) -> dict[tuple[str, bool], bytes | None]:
        return {}

    def own_control(self, told: Given, add_generation_prompt: bool) -> bytes | None:
        """The control tokens that the template writes, whatever is said; None where it wants to be told more than that."""
        unsaid = neutral(told)
        kind = (repr(unsaid), add_generation_prompt)
        if kind not in self._kinds:
            if len(self._kinds) >= MOST_KINDS:
                self._kinds.clear()
            try:
                ids_T, _ = pieces_of(
                    unsaid, self.as_written, self.closing_ids, add_generation_prompt=add_generation_prompt
                )
            except ModelError:
                self._kinds[kind] = None
            else:
                self._kinds[kind] = self.control.among(ids_T)
        return self._kinds[kind]

    @cached_property
    def exceeds_rows(self) -> bool:
        """Whether it has added tokens that the model has no embedding for."""
        added = self.tokenizer.get_added_tokens_decoder()
        return self.num_rows is not None and max(added, default=-1) >= self.num_rows

    def within_rows(self, ids: Sequence[int]) -> list[int]:
        """The ids, or DataError where one is an added token that the model has no embedding for."""
        if self.num_rows is not None and max(ids, default=0) >= self.num_rows:
            text = self.tokenizer.id_to_token(int(max(ids)))
            raise DataError(
                f"the text holds {text!r}, a token of the tokenizer that the model has no embedding for",
                help=f"take {text!r} out of the text or the chat template, or give a base that was resized for it",
            )
        return [int(i) for i in ids]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


def load_chat_tokenizer(folder: Path) -> ChatTokenizer:
    """Reads tokenizer.json, its special tokens and its chat template from a Hugging Face folder.

    Raises ModelError where the folder has no fast tokenizer.
    """
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(
            "there is no tokenizer.json",
            where=str(folder),
            help="save it once with transformers: AutoTokenizer.from_pretrained(…).save_pretrained(folder)",
        )
    config_path = folder / "tokenizer_config.json"
    config = read_json(config_path) if config_path.is_file() else {}
    special = {}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = config.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            special[key] = value
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ModelError(f"cannot be read: {error}", where=str(path)) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    template = read_template(folder, config)
    text = plain_template(special) if template is None else template
    model_path = folder / "config.json"
    rows = read_json(model_path).get("vocab_size") if model_path.is_file() else None
    return ChatTokenizer(tokenizer, text, special, rows if isinstance(rows, int) else None)


def render_prompt(conversation: Conversation, tokenizer: ChatTokenizer) -> list[int]:
    """Token ids a model is given to write the next assistant turn; the last message is the user's."""
    ids, _ = render_pieces(conversation, tokenizer, add_generation_prompt=True)
    return [int(i) for i in ids]


def render_example(conversation: Conversation, tokenizer: ChatTokenizer, max_length: int) -> Example:
    """A training row: assistant turns trained, each up to and with its stop token; the rest masked.

    Longer than `max_length` tokens is cut at the end, and `num_cut` says by how many.
    Raises DataError where an assistant turn would end without a stop token, ModelError where the template drops tools.
    """
    if conversation.uses_tools:
        refuse_lost_tools(conversation, tokenizer.render_text)
    ids_T, labels_T = (text_ids if conversation.is_text else render_pieces)(conversation, tokenizer)
    num_cut = max(0, len(ids_T) - max_length)
    return Example(ids_T[:max_length], labels_T[:max_length], num_cut, conversation.place)


def given(conversation: Conversation) -> dict[str, Any]:
    """What a template is told of a conversation."""
    return {"messages": conversation.as_dicts(), "tools": conversation.tool_dicts()}


def render_examples(
    conversation: Conversation, tokenizer: ChatTokenizer, max_length: int
) -> Iterator[Example]:
    """`render_example`, but all of a long text: in pieces that begin with the last token of the one before.

    a b c d e f g       max_length 4:   [a b c d] [d e f g]         every token but the first is a target once
    """
    if not conversation.is_text:
        yield render_example(conversation, tokenizer, max_length)
        return
    ids_T, labels_T = text_ids(conversation, tokenizer)
    for start in range(0, max(1, len(ids_T) - 1), max_length - 1):  # one piece of a text without tokens
        span = slice(start, start + max_length)
        yield Example(ids_T[span], labels_T[span], 0, conversation.place)


def text_ids(conversation: Conversation, tokenizer: ChatTokenizer) -> tuple[IntArray, IntArray]:
    """(input_ids_T, labels_T) of plain text: BOS where the tokenizer puts one before a text, the text, EOS; all trained.

    DataError where the tokenizer has no EOS.
    """
    import numpy as np

    eos = tokenizer.special_tokens.get("eos_token")
    eos_id = tokenizer.tokenizer.token_to_id(eos) if eos else None
    if eos_id is None:
        raise DataError(
            "the tokenizer has no EOS token: a model would never learn where a text ends",
            where=str(conversation.place) if conversation.place else None,
            help="give the base an eos_token in tokenizer_config.json",
            code="no-stop-token",
        )
    bos = tokenizer.special_tokens.get("bos_token")
    first = [
        i for i in tokenizer.tokenizer.encode("").ids if bos and i == tokenizer.tokenizer.token_to_id(bos)
    ]
    ids_T = np.asarray([*first[:1], *tokenizer.encode_said(conversation.answer()), eos_id], dtype=np.int64)
    return ids_T, ids_T.copy()


def render_pieces(
    conversation: Conversation, tokenizer: ChatTokenizer, *, add_generation_prompt: bool = False
) -> tuple[IntArray, IntArray]:
    """(input_ids_T, labels_T) of a conversation; with `add_generation_prompt` it ends open for an answer."""
    told = given(conversation)
    cut = partial(
        pieces_of,
        told,
        closing_ids=tokenizer.closing_ids,
        add_generation_prompt=add_generation_prompt,
        trained=[message.trained for message in conversation.messages],
    )
    try:
        ids_T, labels_T = cut(tokenizer.as_written)
        own = tokenizer.own_control(told, add_generation_prompt)
        if own != tokenizer.control.among(ids_T) or tokenizer.control.is_watched_in(told):
            ids_T, labels_T = cut(tokenizer.apart)
        if tokenizer.exceeds_rows:
            tokenizer.within_rows(ids_T.tolist())
    except (ModelError, DataError) as error:
        error.where = error.where or (str(conversation.place) if conversation.place else None)
        raise
    return ids_T, labels_T
