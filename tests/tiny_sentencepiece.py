"""SentencePiece tokenizers as their families have them, trained on a few kB; see `tiny_tokenizers`."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SENTENCES = (
    "The quick brown fox jumps over the lazy dog, isn't it? They're here, we'll see, I'd say; it's DON'T and WE'VE.",
    "Order 1234: 4x red lamp, 12 chairs at 3.50 each, 12345678 in all. Write user, assistant, system, model.",
    "def f(x):\n    return x ** 2 + 3.14  # ok\n\n\tif x == 1:\n\t\tprint('a  b   c    d')\n\n\n",
    "naïve café, déjà vu, Straße, ação, señor, Łódź. Привет, как дела? Это тест. Γειά σου κόσμε.",
    "北京 是 中国 的 首都。 日本語 の テスト です。 안녕하세요 세계. नमस्ते दुनिया. مرحبا بالعالم.",
    '{"colour": "red", "thing": "lamp", "number": 17}\n{"colour": "green", "thing": "table", "number": 18}\n',
    "hello world, hello there, the other one. user\nhello\nassistant\nthere\n[INST] say hello [/INST] <<SYS>> be kind",
)


def added_token(content: str, special: bool = True, **changes: Any) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"content": content, "special": special, **flags, **changes}


def around(bos: str, bos_id: int) -> dict[str, Any]:
    """The post_processor that puts bos before a text."""
    first = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    second = [{"SpecialToken": {"id": bos, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    named = {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}}
    return {"type": "TemplateProcessing", "single": first, "pair": first + second, "special_tokens": named}


_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_PREPEND = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, _REPLACE]}
_METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
_SPACES = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}


@dataclass(frozen=True)
class Sentencepiece:
    """`pieces`: what is in the sentencepiece model; `added`: what tokenizer.json adds or says of these."""

    control: tuple[str, ...]
    user_defined: tuple[str, ...] = ()
    special_ids: Mapping[str, int] | None = None
    normalizer: Mapping[str, Any] | None = None
    pre_tokenizer: Mapping[str, Any] | None = None
    added: tuple[dict[str, Any], ...] = ()
    strips_first_space: bool = True
    config: Mapping[str, Any] | None = None

    @property
    def adds_bos(self) -> bool:
        return bool((self.config or {}).get("add_bos_token", True))


_LLAMA2 = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "LlamaTokenizer"}
_PHI3 = [
    *("<|assistant|>", "<|placeholder1|>", "<|placeholder2|>", "<|placeholder3|>", "<|placeholder4|>"),
    *("<|system|>", "<|end|>", "<|placeholder5|>", "<|placeholder6|>", "<|user|>"),
]
_GEMMA = {
    "unk_token": "<unk>",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "tokenizer_class": "GemmaTokenizer",
    "add_bos_token": True,
    "add_eos_token": False,
}
_GEMMA_IDS = {"pad": 0, "eos": 1, "bos": 2, "unk": 3}
_GEMMA_USER = (
    *("<mask>", "<2mass>", "[@BOS@]", "<unused0>", "<unused1>", "<start_of_turn>", "<end_of_turn>"),
    *("\n" * count for count in range(1, 6)),
    *("▁" * count for count in range(2, 9)),
    *("<table>", "<b>", "</b>"),
)


def _gemma() -> Sentencepiece:
    plain = {text for text in _GEMMA_USER if text[0] in "\n▁" or text in ("<table>", "<b>", "</b>")}
    added = tuple(
        added_token(text, special=text not in plain)
        for text in ("<pad>", "<eos>", "<bos>", "<unk>", *_GEMMA_USER)
    )
    return Sentencepiece((), _GEMMA_USER, _GEMMA_IDS, _REPLACE, _SPACES, added, False, _GEMMA)


SENTENCEPIECE: dict[str, Sentencepiece] = {
    "llama": Sentencepiece(
        (),
        normalizer=_PREPEND,
        added=tuple(added_token(text) for text in ("<unk>", "<s>", "</s>")),
        config=_LLAMA2 | {"legacy": False, "add_bos_token": True, "add_eos_token": False},
    ),
    "mistral": Sentencepiece(
        ("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
        pre_tokenizer=_METASPACE,
        added=tuple(
            added_token(text)
            for text in (
                *("<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
                *("[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
            )
        ),
        config=_LLAMA2 | {"legacy": False, "add_bos_token": True, "add_eos_token": False},
    ),
    "phi3": Sentencepiece(
        (),
        normalizer=_PREPEND,
        added=(
            *(added_token("<unk>"), added_token("<s>"), added_token("</s>", special=False, rstrip=True)),
            *(added_token("<|endoftext|>"), *(added_token(text, rstrip=True) for text in _PHI3)),
        ),
        config=_LLAMA2
        | {
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "legacy": False,
            "add_bos_token": False,
        },
    ),
    "gemma2": _gemma(),
    "gemma3_text": _gemma(),
}


def train_sentencepiece(
    family: Sentencepiece, vocab_size: int = 640, texts: Sequence[str] = SENTENCES
) -> bytes:
    """The serialized sentencepiece model: BPE with byte fallback, text left as it is."""
    import sentencepiece

    model = io.BytesIO()
    ids = family.special_ids or {"unk": 0, "bos": 1, "eos": 2, "pad": -1}
    pieces = {"unk": "<unk>", "bos": "<s>", "eos": "</s>", "pad": "<pad>"}
    if family.special_ids:
        pieces = {kind: f"<{kind}>" for kind in pieces}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*texts] * 4),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        character_coverage=0.985,  # the rarest characters fall back to bytes
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        add_dummy_prefix=family.strips_first_space,
        normalization_rule_name="identity",
        control_symbols=list(family.control),
        user_defined_symbols=list(family.user_defined),
        minloglevel=2,
        **{f"{kind}_id": ids[kind] for kind in ids},
        **{f"{kind}_piece": piece for kind, piece in pieces.items()},
    )
    return model.getvalue()


def merges_of(scores: Mapping[str, float], skip: Iterable[str] = ()) -> list[list[str]]:
    """Every way to make a piece of two, by falling score, as transformers' converters order them."""
    skipped = set(skip)
    merges = [
        (score, piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if not {piece, piece[:cut], piece[cut:]} & skipped and piece[:cut] in scores and piece[cut:] in scores
    ]
    merges.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [[left, right] for _, left, right in merges]


def sentencepiece_json(model: bytes, family: Sentencepiece) -> dict[str, Any]:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    size = processor.get_piece_size()
    scores = {processor.id_to_piece(i): processor.get_score(i) for i in range(size)}
    if (
        family.special_ids
    ):  # Gemma's pieces of spaces and line breaks have one score; its merges are ordered by id
        scores = {piece: -float(place) for place, piece in enumerate(scores)}
    vocab = {piece: i for i, piece in enumerate(scores)}
    everything = dict(vocab)
    added = []
    for token in family.added:
        everything.setdefault(token["content"], len(everything))
        added.append({"id": everything[token["content"]]} | token)
    control = [token["content"] for token in family.added if token["special"]]
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if family.strips_first_space else []
    replace = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    bos = (family.config or {})["bos_token"]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(added, key=lambda token: token["id"]),
        "normalizer": family.normalizer,
        "pre_tokenizer": family.pre_tokenizer,
        "post_processor": around(bos, vocab[bos]) if family.adds_bos else None,
        "decoder": {
            "type": "Sequence",
            "decoders": [replace, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges_of(scores, control),
        },
    }
