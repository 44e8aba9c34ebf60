"""The tokenizer as GGUF has it: tokens, merges or scores, special tokens, template, and how text is cut.

Read from `tokenizer.json` itself and not through a tokenizer: what llama.cpp cannot do alike is refused by
name rather than written nearly right. Byte-level BPE (llama.cpp's `gpt2`) and SentencePiece's BPE (its `llama`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from myna.data.render import load_chat_tokenizer
from myna.data.template import read_template
from myna.errors import DataError, ModelError
from myna.export.sentencepiece_scores import has_space_prefix, sentencepiece_scores, sentencepiece_types
from myna.export.tokens import CONTROL, UNKNOWN, USER_DEFINED, read_merges, read_tokens
from myna.model.gguf_tokenizer import KEPT_KEY, KEPT_STEPS, RSTRIP_EXCEPT, STRIPS_BY_NAME
from myna.model.pre_tokenizers import PRE_TOKENIZERS, pre_tokenizer_name
from myna.run import read_json


@dataclass(frozen=True)
class Vocabulary:
    """What stands under `tokenizer.*`. `tokens` has as many entries as the embeddings have rows.

    `model`: "gpt2" (with `merges`) or "llama" (with `scores`). `turn_end_id`: what closes an answer in the chat
    template, where that is not `eos_id`. `strips_behind`: white space behind special tokens is dropped, as Phi-3's
    tokenizer does. `kept`: steps of tokenizer.json that GGUF's keys say less of.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    token_types: tuple[int, ...]
    merges: tuple[str, ...]
    scores: tuple[float, ...]
    bos_id: int | None
    eos_id: int
    unk_id: int | None
    pad_id: int | None
    turn_end_id: int | None
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    strips_behind: bool
    kept: Mapping[str, Any]
    chat_template: str | None


def read_vocabulary(tokenizer_dir: Path, config: Mapping[str, Any]) -> Vocabulary:
    """From tokenizer.json, tokenizer_config.json, chat_template.jinja and the model's `config.json` values.

    Where the tokenizer's files name no special token, `config` may give its id. Raises ModelError for a
    tokenizer that is no BPE, one that llama.cpp would run differently, or one with more tokens than the model.
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
    is_sentencepiece = _is_sentencepiece(tokenizer, where)
    pre = "default" if is_sentencepiece else _pre_tokenizer(tokenizer, where)
    prefix = is_sentencepiece and has_space_prefix(tokenizer, where)
    tokens, types = read_tokens(tokenizer, int(config["vocab_size"]), where)
    scores: tuple[float, ...] = ()
    merges: tuple[str, ...] = ()
    if is_sentencepiece:
        types = sentencepiece_types(tokenizer, tokens, types, where)
        scores = sentencepiece_scores(tokenizer, tokens, types, where)
    else:
        merges = tuple(" ".join(pair) for pair in read_merges(tokenizer["model"].get("merges", ()), where))
    named = {kind: _special_id(kind, settings, config, tokens) for kind in ("bos", "eos", "unk", "pad")}
    eos_id = named["eos"]
    if eos_id is None:
        # llama.cpp would take token 11 or 2 for the end, whatever that is
        raise ModelError(
            "the tokenizer names no end token", where=str(settings_path), help="set eos_token in it"
        )
    add_bos, add_eos = _added_around(tokenizer.get("post_processor"), tokens, named["bos"], eos_id, where)
    return Vocabulary(
        model="llama" if is_sentencepiece else "gpt2",
        pre=pre,
        tokens=tokens,
        token_types=types,
        merges=merges,
        scores=scores,
        bos_id=named["bos"],
        eos_id=eos_id,
        unk_id=named["unk"],
        pad_id=named["pad"],
        turn_end_id=_turn_end(tokenizer_dir, settings, eos_id),
        add_bos=add_bos,
        add_eos=add_eos,
        add_space_prefix=prefix,
        strips_behind=_strips_behind(tokenizer, tokens, types),
        kept=_kept(tokenizer),
        chat_template=read_template(tokenizer_dir, settings),
    )


def add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    """Adds the `tokenizer.*` keys to a gguf.GGUFWriter."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.token_types)
    if vocabulary.model == "llama":
        writer.add_token_scores(vocabulary.scores)
    else:
        writer.add_token_merges(vocabulary.merges)
    writer.add_eos_token_id(vocabulary.eos_id)
    if vocabulary.bos_id is not None:
        writer.add_bos_token_id(vocabulary.bos_id)
    if vocabulary.unk_id is not None:
        writer.add_unk_token_id(vocabulary.unk_id)
    if vocabulary.pad_id is not None:
        writer.add_pad_token_id(vocabulary.pad_id)
    if vocabulary.turn_end_id is not None:
        writer.add_eot_token_id(vocabulary.turn_end_id)
    # Said even where false: llama.cpp's own default is true for some tokenizers.
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    writer.add_add_space_prefix(vocabulary.add_space_prefix)
    for name, value in vocabulary.kept.items():
        writer.add_string(KEPT_KEY % name, json.dumps(value, ensure_ascii=False))
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def shown_name(name: str, vocabulary: Vocabulary) -> str:
    """The name for `general.name`: llama.cpp strips white space behind special tokens by it.

    It does so for every model whose name holds "phi3" or "phi-3", and ends where such a model lacks Phi-3's tokens
    (`llama_vocab::impl::load`); there is no key for it.
    """
    if vocabulary.strips_behind:
        return name if STRIPS_BY_NAME.search(name) else f"{name} (Phi-3)"
    return re.sub("(?i)(phi)-?(3)", r"\1 \2", name)


def _is_sentencepiece(tokenizer: Mapping[str, Any], where: str) -> bool:
    """Whether the BPE is SentencePiece's; ModelError for anything that is neither that nor byte-level."""
    model = tokenizer.get("model") or {}
    is_sentencepiece = model.get("type") == "BPE" and bool(model.get("byte_fallback"))
    refused = ["dropout", "continuing_subword_prefix", "end_of_word_suffix"]
    odd = [
        f"{key} {model[key]!r}"
        for key in [*refused, *(["ignore_merges"] if is_sentencepiece else [])]
        if model.get(key)
    ]
    if model.get("type") != "BPE" or odd:
        kind = f"{model.get('type')}{' with ' if odd else ''}{', '.join(odd)}"
        raise ModelError(
            f"the tokenizer is {kind}; only BPE, byte-level or SentencePiece's, can be written as GGUF",
            where=where,
        )
    return is_sentencepiece


def _pre_tokenizer(tokenizer: Mapping[str, Any], where: str) -> str:
    """The pre-tokenizer's name in GGUF, after a look at the normalizer."""
    normalizer = tokenizer.get("normalizer")
    # llama.cpp normalises nothing. NFC leaves text alone that is composed already, as nearly all text is.
    if normalizer is not None and normalizer.get("type") != "NFC":
        raise ModelError(f"llama.cpp has no normalizer {normalizer.get('type')}", where=where)
    ignores_merges = bool(tokenizer["model"].get("ignore_merges"))
    name = pre_tokenizer_name(tokenizer.get("pre_tokenizer"), ignores_merges)
    if name is None:
        raise ModelError(
            "the pre_tokenizer is none that GGUF has a name for here; known are "
            + ", ".join(
                known + (" (ignore_merges)" if pre.ignores_merges else "")
                for known, pre in PRE_TOKENIZERS.items()
                if not pre.unlike
            ),
            where=where,
        )
    if PRE_TOKENIZERS[name].unlike:
        raise ModelError(f"the pre_tokenizer is {name}; {PRE_TOKENIZERS[name].unlike}", where=where)
    return name


def _kept(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """The steps that GGUF's own keys say less of: NFC, and a space before a text's beginning only."""
    if not tokenizer["model"].get("byte_fallback"):
        return {"normalizer": tokenizer["normalizer"]} if tokenizer.get("normalizer") else {}
    if (tokenizer.get("pre_tokenizer") or {}).get("type") == "Metaspace":
        return {step: tokenizer.get(step) for step in KEPT_STEPS}
    return {}


def _strips_behind(tokenizer: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> bool:
    """Whether the added tokens with `rstrip` are those that llama.cpp strips behind in a model named Phi-3."""
    stripped = {added["content"] for added in tokenizer.get("added_tokens", ()) if added.get("rstrip")}
    matched = (CONTROL, USER_DEFINED, UNKNOWN)
    special = {text for text, kind in zip(tokens, types, strict=True) if kind in matched} | {"</s>"}
    needed = {"</s>", *RSTRIP_EXCEPT}
    return bool(stripped) and stripped == special - RSTRIP_EXCEPT and needed <= set(tokens)


def _turn_end(tokenizer_dir: Path, settings: Mapping[str, Any], eos_id: int) -> int | None:
    """The token that closes an answer in the chat template, where it is not the end token."""
    if read_template(tokenizer_dir, settings) is None:
        return None
    try:
        closing = load_chat_tokenizer(tokenizer_dir).stop_ids - {eos_id}
    except (ModelError, DataError):
        # No conversation has that shape in this template, so nothing was trained or is gated on what closes it.
        return None
    return next(iter(closing), None)


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
