"""What every GGUF vocabulary has: a text and a type for each row of the embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from myna.errors import ModelError

# gguf.TokenType. A control token is matched where special tokens are asked for, a user-defined one always; a byte
# stands for itself where no token has a character.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

BYTES = {f"<0x{byte:02X}>": chr(byte) for byte in range(256)}


def read_tokens(
    tokenizer: Mapping[str, Any], vocab_size: int, where: str
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Texts and types by id; rows of the embeddings without a token get a placeholder of type unused.

    Added tokens beyond the embeddings are left out: a model cannot be given them (`ChatTokenizer.encode` refuses).
    ModelError for more tokens than embeddings, and for a text that would stand at two ids or an id with two texts.
    """
    by_id = _vocab_by_id(tokenizer["model"]["vocab"], where)
    for added in tokenizer.get("added_tokens", ()):
        if added["id"] >= vocab_size:
            by_id.pop(added["id"], None)
            continue
        by_id[added["id"]] = (added["content"], CONTROL if added.get("special") else USER_DEFINED)
    if max(by_id, default=-1) >= vocab_size:
        raise ModelError(
            f"the tokenizer has ids up to {max(by_id)}, the model only {vocab_size} embeddings",
            where=where,
            help="give the tokenizer that belongs to this model",
        )
    ids: dict[str, int] = {}
    for index, (text, _) in by_id.items():
        if ids.setdefault(text, index) != index:
            raise ModelError(f"the token {text!r} has two ids, {ids[text]} and {index}", where=where)
    filled = [by_id.get(index) or (_placeholder(index, ids), UNUSED) for index in range(vocab_size)]
    return tuple(text for text, _ in filled), tuple(kind for _, kind in filled)


def read_merges(merges: Sequence[str | Sequence[str]], where: str) -> tuple[tuple[str, str], ...]:
    """(left, right) each. tokenizer.json has them as `left right`, or as pairs since transformers 4.45."""
    pairs = []
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else list(merge)
        if len(pair) != 2 or not all(pair) or any(" " in part for part in pair):
            raise ModelError(f"the merge {' '.join(pair)!r} is no pair of two tokens", where=where)
        pairs.append((pair[0], pair[1]))
    return tuple(pairs)


def _vocab_by_id(vocab: Mapping[str, int], where: str) -> dict[int, tuple[str, int]]:
    by_id: dict[int, tuple[str, int]] = {}
    for text, index in vocab.items():
        known = by_id[index][0] if index in by_id else text
        # a character may have its byte's id, as transformers gives Gemma a tab: the byte says as much
        if BYTES.get(known) == text and text != known:
            continue
        if known not in (text, BYTES.get(text)):
            raise ModelError(f"id {index} stands for both {known!r} and {text!r}", where=where)
        by_id[index] = (text, NORMAL)
    return by_id


def _placeholder(index: int, taken: Mapping[str, int]) -> str:
    text = f"[PAD{index}]"
    while text in taken:
        text += "_"
    return text
