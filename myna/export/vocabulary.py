"""The tokenizer as GGUF has it: tokens, merges, special tokens, template, and the name of the pre-tokenizer.

Read from `tokenizer.json` itself and not through a tokenizer: what llama.cpp cannot do alike is refused by
name rather than written nearly right. Only byte-level BPE so far.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from myna.errors import ModelError
from myna.model.pre_tokenizers import PRE_TOKENIZERS, pre_tokenizer_name
from myna.run import read_json

# gguf.TokenType. A control token is matched where special tokens are asked for, a user-defined one always.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


@dataclass(frozen=True)
class Vocabulary:
    """What stands under `tokenizer.*`. `tokens` has as many entries as the embeddings have rows."""

    pre: str
    tokens: tuple[str, ...]
    token_types: tuple[int, ...]
    merges: tuple[str, ...]
    bos_id: int | None
    eos_id: int
    unk_id: int | None
    pad_id: int | None
    add_bos: bool
    add_eos: bool
    chat_template: str | None


def read_vocabulary(tokenizer_dir: Path, config: Mapping[str, Any]) -> Vocabulary:
    """From tokenizer.json, tokenizer_config.json, chat_template.jinja and the model's `config.json` values.

    Where the tokenizer's files name no special token, `config` may give its id. Raises ModelError for a
    tokenizer that is no byte-level BPE, one that llama.cpp would run differently, or one with more tokens
    than the model.
    """
    path = tokenizer_dir / "tokenizer.json"
    if not path.is_file():
        raise ModelError(
            "the tokenizer has no tokenizer.json, so it cannot be written into a GGUF file",
            where=str(tokenizer_dir),
        )
    tokenizer = read_json(path)
    settings_path = tokenizer_dir / "tokenizer_config.json"
    settings = read_json(settings_path) if settings_path.is_file() else {}
    where = str(path)
    pre = _pre_tokenizer(tokenizer, where)
    tokens, token_types = _tokens(tokenizer, int(config["vocab_size"]), where)
    named = {kind: _special_id(kind, settings, config, tokens) for kind in ("bos", "eos", "unk", "pad")}
    eos_id = named["eos"]
    if eos_id is None:
        # llama.cpp would take token 11 for the end, whatever that is
        raise ModelError(
            "the tokenizer names no end token", where=str(settings_path), help="set eos_token in it"
        )
    add_bos, add_eos = _added_around(tokenizer.get("post_processor"), tokens, named["bos"], eos_id, where)
    return Vocabulary(
        pre=pre,
        tokens=tokens,
        token_types=token_types,
        merges=_merges(tokenizer["model"].get("merges", ()), where),
        bos_id=named["bos"],
        eos_id=eos_id,
        unk_id=named["unk"],
        pad_id=named["pad"],
        add_bos=add_bos,
        add_eos=add_eos,
        chat_template=_chat_template(tokenizer_dir, settings),
    )


def add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    """Adds the `tokenizer.*` keys to a gguf.GGUFWriter."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.token_types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_eos_token_id(vocabulary.eos_id)
    if vocabulary.bos_id is not None:
        writer.add_bos_token_id(vocabulary.bos_id)
    if vocabulary.unk_id is not None:
        writer.add_unk_token_id(vocabulary.unk_id)
    if vocabulary.pad_id is not None:
        writer.add_pad_token_id(vocabulary.pad_id)
    # Said even where false: llama.cpp's own default is true for some pre-tokenizers.
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    writer.add_add_space_prefix(False)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def _pre_tokenizer(tokenizer: Mapping[str, Any], where: str) -> str:
    """The pre-tokenizer's name in GGUF, after a look at all else that llama.cpp's BPE cannot do."""
    model = tokenizer.get("model") or {}
    odd = [
        f"{key} {model[key]!r}"
        for key in ("dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
        if model.get(key)
    ]
    if model.get("type") != "BPE" or odd:
        kind = f"{model.get('type')}{' with ' if odd else ''}{', '.join(odd)}"
        raise ModelError(
            f"the tokenizer is {kind}; only byte-level BPE can be written as GGUF so far", where=where
        )
    normalizer = tokenizer.get("normalizer")
    # llama.cpp normalises nothing. NFC leaves text alone that is composed already, as nearly all text is.
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise ModelError(f"llama.cpp has no normalizer {normalizer.get('type')}", where=where)
    name = pre_tokenizer_name(tokenizer.get("pre_tokenizer"), bool(model.get("ignore_merges")))
    if name is None:
        raise ModelError(
            "the pre_tokenizer is none that GGUF has a name for here; known are "
            + ", ".join(
                known + (" (ignore_merges)" if pre.ignores_merges else "")
                for known, pre in PRE_TOKENIZERS.items()
            ),
            where=where,
        )
    return name


def _tokens(
    tokenizer: Mapping[str, Any], vocab_size: int, where: str
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Texts and types by id; rows of the embeddings without a token get a placeholder of type unused."""
    by_id = {index: (text, NORMAL) for text, index in tokenizer["model"]["vocab"].items()}
    for added in tokenizer.get("added_tokens", ()):
        by_id[added["id"]] = (added["content"], CONTROL if added.get("special") else USER_DEFINED)
    if max(by_id, default=-1) >= vocab_size:
        raise ModelError(
            f"the tokenizer has ids up to {max(by_id)}, the model only {vocab_size} embeddings",
            where=where,
            help="give the tokenizer that belongs to this model",
        )
    filled = [by_id.get(index, (f"[PAD{index}]", UNUSED)) for index in range(vocab_size)]
    return tuple(text for text, _ in filled), tuple(kind for _, kind in filled)


def _merges(merges: Sequence[str | Sequence[str]], where: str) -> tuple[str, ...]:
    """`left right` each. tokenizer.json has them so, or as pairs since transformers 4.45."""
    lines = tuple(merge if isinstance(merge, str) else " ".join(merge) for merge in merges)
    for line in lines:
        if line.count(" ") != 1:
            raise ModelError(f"the merge {line!r} is no pair of two tokens", where=where)
    return lines


def _special_id(
    kind: str, settings: Mapping[str, Any], config: Mapping[str, Any], tokens: Sequence[str]
) -> int | None:
    """The id of the bos, eos, unk or pad token: the tokenizer's own word first, then the model's."""
    named = settings.get(f"{kind}_token")
    text = named.get("content") if isinstance(named, Mapping) else named
    if text in tokens:
        return tokens.index(text)
    value = config.get(f"{kind}_token_id")
    return value if isinstance(value, int) and 0 <= value < len(tokens) else None


def _added_around(
    post_processor: Mapping[str, Any] | None,
    tokens: Sequence[str],
    bos_id: int | None,
    eos_id: int,
    where: str,
) -> tuple[bool, bool]:
    """Whether the tokenizer puts bos before and eos behind a text; ModelError where it puts anything else."""
    steps = (post_processor or {}).get("processors", [post_processor] if post_processor else [])
    around: list[list[str]] = [[], []]
    for step in steps:
        if step.get("type") == "ByteLevel":
            continue
        if step.get("type") != "TemplateProcessing":
            raise ModelError(f"llama.cpp has no post_processor {step.get('type')}", where=where)
        behind = False
        for piece in step.get("single", ()):
            behind = behind or "Sequence" in piece
            if "SpecialToken" in piece:
                around[behind].append(piece["SpecialToken"]["id"])
    bos = [] if bos_id is None else [tokens[bos_id]]
    if around[0] not in ([], bos) or around[1] not in ([], [tokens[eos_id]]):
        raise ModelError(
            f"the post_processor puts {around[0]} before and {around[1]} behind a text", where=where
        )
    return bool(around[0]), bool(around[1])


def _chat_template(tokenizer_dir: Path, settings: Mapping[str, Any]) -> str | None:
    """The default template: the file where there is one, as transformers does."""
    path = tokenizer_dir / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        return next((entry["template"] for entry in template if entry.get("name") == "default"), None)
    return template
