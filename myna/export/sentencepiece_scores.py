"""SentencePiece's BPE as GGUF has it: a score for each token in place of merges.

tokenizer.json has pairs in an order (`merges`): the pair that stands first is joined first. llama.cpp
(`llm_tokenizer_spm`) joins whatever two neighbours make a token, the one with the highest score first. Both do the
same where every pair that makes a token is a merge, and the pairs of one token stand together:

    merges     h e · he l · h el · …          score(he) = -1 · score(hel) = -2 · …

Looked at and refused where it is not so. Among pairs of one score llama.cpp takes the leftmost, as sentencepiece does;
so Llama's runs of spaces, whose merges stand mixed because sentencepiece has one score for all of them, have one here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from myna.errors import ModelError
from myna.export.tokens import BYTE, BYTES, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, read_merges

SPACE = "▁"
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PREPEND = {"type": "Prepend", "prepend": SPACE}
_SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}

# normalizer and pre_tokenizer → whether a space is put before each piece of text (`add_space_prefix`).
_SPACE_PREFIX: Sequence[tuple[list[Mapping[str, Any]], Mapping[str, Any] | None, bool]] = (
    ([_PREPEND, _REPLACE], None, True),
    ([_REPLACE], None, False),
    ([_REPLACE], _SPLIT, False),  # cuts at spaces, of which the normalizer leaves none
    ([], {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always", "split": False}, True),
    # Before the first piece only, which in a conversation is a control token. llama.cpp: before each piece or none.
    ([], {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}, False),
    ([], {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "never", "split": False}, False),
)


def has_space_prefix(tokenizer: Mapping[str, Any], where: str) -> bool:
    """Whether llama.cpp is to put a space before a text; ModelError for a text treated as llama.cpp cannot."""
    normalizer = tokenizer.get("normalizer")
    steps = [normalizer] if normalizer else []
    if normalizer and normalizer.get("type") == "Sequence":
        steps = list(normalizer.get("normalizers", ()))
    pre_tokenizer = tokenizer.get("pre_tokenizer")
    prefix = next(
        (
            prefix
            for known, known_pre, prefix in _SPACE_PREFIX
            if known == steps and known_pre == pre_tokenizer
        ),
        None,
    )
    if prefix is None:
        named = [*(step.get("type") for step in steps), (pre_tokenizer or {}).get("type")]
        raise ModelError(
            f"normalizer and pre_tokenizer ({', '.join(str(name) for name in named)}) are not among those of "
            "SentencePiece that llama.cpp does alike: spaces become ▁, with one put before the text or not",
            where=where,
        )
    if _PREPEND in steps:
        _refuse_normalized(tokenizer, where)
    return prefix


def sentencepiece_types(
    tokenizer: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], where: str
) -> tuple[int, ...]:
    """The types of `read_tokens` with bytes and the unknown token told apart.

    An added token that holds ▁ is looked for in the text before its spaces are ▁ and so is never found there: it
    comes about by merges, like any other. ModelError where a byte has no token.
    """
    missing = sorted(set(BYTES) - set(tokens))
    if missing:
        raise ModelError(f"the tokenizer has no token for the bytes {', '.join(missing[:4])}", where=where)
    unknown = tokenizer["model"].get("unk_token")
    made = {left + right for left, right in read_merges(tokenizer["model"].get("merges", ()), where)}

    def kind_of(text: str, kind: int) -> int:
        if kind == NORMAL:
            return BYTE if text in BYTES else UNKNOWN if text == unknown else NORMAL
        return NORMAL if kind == USER_DEFINED and SPACE in text and text in made else kind

    return tuple(kind_of(text, kind) for text, kind in zip(tokens, types, strict=True))


def sentencepiece_scores(
    tokenizer: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], where: str
) -> tuple[float, ...]:
    """A score for each token under which llama.cpp joins what the merges join, in their order; see above."""
    merges = read_merges(tokenizer["model"].get("merges", ()), where)
    order = _order(merges, where)
    _refuse_missing(set(merges), tokens, types, where)
    return tuple(-float(order.get(text, len(order) + 1)) for text in tokens)


def _order(merges: Sequence[tuple[str, str]], where: str) -> dict[str, int]:
    """The rank of each token made by merges: one for each, or for all tokens of a run (`_is_run`)."""
    last = {left + right: at for at, (left, right) in enumerate(merges)}
    order: dict[str, int] = {}
    start = 0
    while start < len(merges):
        end = start
        at = start
        while at <= end:  # the tokens whose merges stand mixed with those of the first one
            end = max(end, last["".join(merges[at])])
            at += 1
        made = {left + right for left, right in merges[start:at]}
        if len(made) > 1 and not _is_run(merges[start : at + 1]):
            raise ModelError(
                f"the merges of {''.join(merges[start])!r} do not stand together ({''.join(merges[start + 1])!r} comes "
                "between), and llama.cpp has one score for all of them",
                where=where,
            )
        order |= dict.fromkeys(made, len(order) + 1)
        start = at
    return order


def _is_run(merges: Sequence[tuple[str, str]]) -> bool:
    """Whether these are all ways to make n … 2 of one character, the longest left part first.

    Then the leftmost token grows first, as it does in llama.cpp where all of them have one score (and two of the
    character, whose one merge stands last, a lower one).
    """
    character, longest = merges[0][0][0], max(len(left + right) for left, right in merges)
    run = [
        (character * left, character * right)
        for left in range(longest - 1, 0, -1)
        for right in range(longest - left, 0, -1)
    ]
    return list(merges) == run


def _refuse_missing(
    merges: set[tuple[str, str]], tokens: Sequence[str], types: Sequence[int], where: str
) -> None:
    """ModelError for two neighbours that llama.cpp would join although they are no merge.

    A neighbour is a token or any single character. What is matched before all merging is neither part nor whole.
    """
    matched = (CONTROL, USER_DEFINED, UNKNOWN)
    whole = {text for text, kind in zip(tokens, types, strict=True) if kind in matched}
    texts = set(tokens) - whole
    for text in texts:
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in whole or right in whole or (left, right) in merges:
                continue
            if (left in texts or len(left) == 1) and (right in texts or len(right) == 1):
                raise ModelError(
                    f"{left!r} and {right!r} make the token {text!r}, but no merge says so; llama.cpp would join "
                    "them. The tokenizer was not made by SentencePiece",
                    where=where,
                )


def _refuse_normalized(tokenizer: Mapping[str, Any], where: str) -> None:
    """The normalizer that puts ▁ before a text puts it before such an added token too; llama.cpp does not."""
    for added in tokenizer.get("added_tokens", ()):
        if added.get("normalized"):
            raise ModelError(
                f"the added token {added['content']!r} is `normalized`, so it is only found behind a space; "
                "llama.cpp finds it anywhere",
                where=where,
                help=f'set "normalized": false for {added["content"]} under added_tokens',
            )
