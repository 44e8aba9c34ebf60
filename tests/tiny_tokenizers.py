"""A tokenizer of each family's class, trained here on a few kB and shaped as the family's own files are.

SentencePiece families are trained by `sentencepiece` itself and become a tokenizer.json as transformers makes one: a merge
for each way to put a piece together, the highest score first. `tokenizer.model` lies beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny_sentencepiece import (
    SENTENCEPIECE,
    SENTENCES,
    added_token,
    around,
    sentencepiece_json,
    train_sentencepiece,
)
from tiny_templates import TEMPLATES
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from myna.model.pre_tokenizers import PRE_TOKENIZERS, pre_tokenizer_json


@dataclass(frozen=True)
class ByteLevel:
    """`first` have the first ids and `last` the ones behind the trained tokens, as the family has them."""

    pre: str
    config: Mapping[str, Any]
    first: tuple[dict[str, Any], ...] = ()
    last: tuple[dict[str, Any], ...] = ()
    is_nfc: bool = False
    adds_bos: bool = False


def _tokens(*texts: str, special: bool = True, **changes: Any) -> tuple[dict[str, Any], ...]:
    return tuple(added_token(text, special, **changes) for text in texts)


_FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
_QWEN = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
_QWEN_TOKENS = _tokens("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_LLAMA3_TOKENS = _tokens(
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|start_header_id|>"),
    *("<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
)
_FALCON_TOKENS = _tokens(
    *(f">>{name}<<" for name in ("TITLE", "ABSTRACT", "INTRODUCTION", "SUMMARY", "COMMENT", "ANSWER")),
    *(">>QUESTION<<", ">>DOMAIN<<", ">>PREFIX<<", ">>SUFFIX<<", ">>MIDDLE<<", "<|endoftext|>"),
)
_NEOX = {f"{kind}_token": "<|endoftext|>" for kind in ("bos", "eos", "unk")}

BYTE_LEVEL: dict[str, ByteLevel] = {
    "llama3": ByteLevel(
        "llama-bpe",
        _FAST | {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        last=_LLAMA3_TOKENS,
        adds_bos=True,
    ),
    "smollm": ByteLevel(
        "smollm",
        {
            "tokenizer_class": "GPT2Tokenizer",
            "unk_token": "<|endoftext|>",
            "pad_token": "<|im_end|>",
            "bos_token": "<|im_start|>",
            "eos_token": "<|im_end|>",
        },
        first=_tokens("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"),
    ),
    "qwen2": ByteLevel("qwen2", _QWEN, last=_QWEN_TOKENS, is_nfc=True),
    "qwen3": ByteLevel(
        "qwen2",
        _QWEN,
        last=_QWEN_TOKENS + _tokens("<tool_call>", "</tool_call>", "<think>", "</think>", special=False),
        is_nfc=True,
    ),
    "falcon": ByteLevel(
        "falcon", _FAST | {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}, first=_FALCON_TOKENS
    ),
    "gpt_neox": ByteLevel(
        "gpt-2",
        _NEOX | {"tokenizer_class": "GPTNeoXTokenizer"},
        first=_tokens("<|endoftext|>", "<|padding|>"),
        last=_tokens(*(" " * count for count in range(12, 1, -1)), special=False, normalized=True),
        is_nfc=True,
    ),
}


def _byte_level_json(family: ByteLevel, vocab_size: int) -> dict[str, Any]:
    ignore_merges = PRE_TOKENIZERS[family.pre].ignores_merges
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    value = json.loads(tokenizer.to_str()) | {"pre_tokenizer": pre_tokenizer_json(family.pre)}
    if family.is_nfc:
        value["normalizer"] = {"type": "NFC"}
    tokenizer = Tokenizer.from_str(json.dumps(value))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[token["content"] for token in family.first],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*SENTENCES] * 4, trainer)
    value = json.loads(tokenizer.to_str())
    ids = value["model"]["vocab"]
    first = [{"id": ids[token["content"]]} | token for token in family.first]
    last = [{"id": len(ids) + place} | token for place, token in enumerate(family.last)]
    value["added_tokens"] = first + last
    value["decoder"] = value["post_processor"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    if family.adds_bos:
        bos = family.config["bos_token"]
        bos_id = next(token["id"] for token in value["added_tokens"] if token["content"] == bos)
        steps = [value["post_processor"], around(bos, bos_id)]
        value["post_processor"] = {"type": "Sequence", "processors": steps}
    return value


FAMILY_TOKENIZERS = (*SENTENCEPIECE, *BYTE_LEVEL)


def write_family_tokenizer(folder: Path, model_type: str, template: bool = True) -> Tokenizer:
    """tokenizer.json, tokenizer_config.json, tokenizer.model (SentencePiece) and chat_template.jinja of a family.

    `model_type` is one of FAMILY_TOKENIZERS: those of transformers and, for Llama's later tokenizers, "llama3" and
    "smollm". About 640 tokens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if model_type in SENTENCEPIECE:
        model = train_sentencepiece(SENTENCEPIECE[model_type])
        (folder / "tokenizer.model").write_bytes(model)
        value = sentencepiece_json(model, SENTENCEPIECE[model_type])
        config = SENTENCEPIECE[model_type].config
    else:
        value = _byte_level_json(BYTE_LEVEL[model_type], vocab_size=600)
        config = BYTE_LEVEL[model_type].config
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    settings = {
        **(config or {}),
        "added_tokens_decoder": {
            str(token["id"]): {key: token[key] for key in token if key != "id"}
            for token in value["added_tokens"]
        },
        "model_max_length": 256,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    if template:
        (folder / "chat_template.jinja").write_text(TEMPLATES[model_type], encoding="utf-8")
    return Tokenizer.from_file(str(path))
