"""SentencePiece's BPE as GGUF has it: types, scores, and which tokenizers are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tiny_sentencepiece import SENTENCEPIECE
from tiny_tokenizers import write_family_tokenizer
from tokenizers import Tokenizer

from myna.errors import ModelError
from myna.export.tokens import BYTE, CONTROL, NORMAL, UNUSED, USER_DEFINED
from myna.export.vocabulary import Vocabulary, read_vocabulary

ROWS = {"vocab_size": 660}


def changed(folder: Path, model_type: str = "llama", **changes: Any) -> Path:
    """A family's tokenizer with keys replaced; `model__x` replaces `model.x`. A function is given the old value."""
    write_family_tokenizer(folder, model_type)
    path = folder / "tokenizer.json"
    value = json.loads(path.read_text())
    for key, new in changes.items():
        outer, _, inner = key.partition("__")
        place = value[outer] if inner else value
        place[inner or outer] = new(place[inner or outer]) if callable(new) else new
    path.write_text(json.dumps(value))
    return folder


def kinds(vocabulary: Vocabulary) -> dict[str, int]:
    return dict(zip(vocabulary.tokens, vocabulary.token_types, strict=True))


@pytest.mark.parametrize("model_type", SENTENCEPIECE)
def test_tokens_and_scores_stand_in_the_order_of_the_pieces(model_type: str, tmp_path: Path) -> None:
    """sentencepiece itself scores its pieces in the order that their merges have."""
    tokenizer = write_family_tokenizer(tmp_path, model_type)
    vocabulary = read_vocabulary(tmp_path, ROWS)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    pieces = [processor.id_to_piece(index) for index in range(processor.get_piece_size())]
    assert list(vocabulary.tokens[: len(pieces)]) == pieces
    joined = [
        index
        for index, kind in enumerate(vocabulary.token_types)
        if kind == NORMAL and len(vocabulary.tokens[index]) > 1 and "▁▁" not in vocabulary.tokens[index]
    ]
    ranks = {index: -vocabulary.scores[index] for index in joined}
    assert len(joined) > 100 and len(set(ranks.values())) == len(joined)
    assert sorted(joined, key=lambda index: -processor.get_score(index)) == sorted(
        joined, key=lambda index: ranks[index]
    )
    assert (vocabulary.model, vocabulary.pre, vocabulary.merges) == ("llama", "default", ())
    assert vocabulary.tokens[tokenizer.get_vocab_size() :][0].startswith("[PAD")


def test_types(tmp_path: Path) -> None:
    gemma = kinds(read_vocabulary(changed(tmp_path / "g", "gemma2"), ROWS))
    assert [gemma[text] for text in ("<bos>", "<unk>", "<start_of_turn>", "<mask>")] == [CONTROL] * 4
    assert [gemma[text] for text in ("\n\n", "<table>", "<0x0A>", "▁▁", "▁", "[PAD650]")] == [
        *(USER_DEFINED, USER_DEFINED, BYTE, NORMAL, NORMAL, UNUSED)
    ]
    assert list(gemma.values()).count(BYTE) == 256
    phi3 = kinds(read_vocabulary(changed(tmp_path / "p", "phi3"), ROWS))
    assert [phi3[text] for text in ("</s>", "<|end|>", "<|user|>")] == [USER_DEFINED, CONTROL, CONTROL]


@pytest.mark.parametrize(
    ("model_type", "prefix", "ids", "kept"),
    [
        ("llama", True, {"bos": 1, "eos": 2, "unk": 0, "pad": None, "turn_end": None}, False),
        ("mistral", False, {"bos": 1, "eos": 2, "unk": 0, "pad": None, "turn_end": None}, True),
        ("gemma2", False, {"bos": 2, "eos": 1, "unk": 3, "pad": 0, "turn_end": 10}, False),
        ("phi3", True, {"bos": 1, "eos": 640, "unk": 0, "pad": 640, "turn_end": 647}, False),
    ],
)
def test_what_is_said_beside_the_tokens(
    model_type: str, prefix: bool, ids: dict[str, int | None], kept: bool, tmp_path: Path
) -> None:
    write_family_tokenizer(tmp_path, model_type)
    vocabulary = read_vocabulary(tmp_path, ROWS)
    assert {kind: getattr(vocabulary, f"{kind}_id") for kind in ids} == ids
    assert vocabulary.add_space_prefix == prefix and vocabulary.strips_behind == (model_type == "phi3")
    assert vocabulary.add_bos == (model_type != "phi3") and not vocabulary.add_eos
    assert ("pre_tokenizer" in vocabulary.kept) == kept


def test_a_tab_that_has_its_bytes_id_is_that_byte(tmp_path: Path) -> None:
    """As transformers makes of Gemma's: both texts, one id, and merges of tabs."""

    def with_tab(vocab: dict[str, int]) -> dict[str, int]:
        return {**vocab, "\t": vocab["<0x09>"]}

    for turn in (with_tab, lambda vocab: dict(reversed(with_tab(vocab).items()))):
        vocabulary = read_vocabulary(changed(tmp_path / "t", model__vocab=turn), ROWS)
        assert vocabulary.tokens[12] == "<0x09>" and "\t" not in vocabulary.tokens


def torn(merges: list[list[str]]) -> list[list[str]]:
    """The first of two merges that make the same token put last."""
    at = next(i for i in range(len(merges)) if "".join(merges[i]) == "".join(merges[i + 1]))
    return [*merges[:at], *merges[at + 1 :], merges[at]]


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"normalizer": None, "pre_tokenizer": METASPACE}, r"\(Metaspace\) are not among"),
        ({"normalizer": None}, r"\(None\) are not among"),
        ({"normalizer": {"type": "NFKC"}}, r"\(NFKC, None\)"),
        ({"model__ignore_merges": True}, "BPE with ignore_merges True"),
        ({"model__dropout": 0.1}, "dropout"),
        ({"model__merges": lambda merges: merges[:40] + merges[41:]}, "no merge says so"),
        ({"model__merges": torn}, "do not stand together"),
        (
            {"model__vocab": lambda vocab: {t: i for t, i in vocab.items() if t != "<0x41>"}},
            "no token for the bytes <0x41>",
        ),
        (
            {"added_tokens": lambda added: [*added, {"id": 650, "content": "<call>", "normalized": True}]},
            "'<call>' is `normalized`",
        ),
    ],
)
def test_tokenizers_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = changed(tmp_path, **changes)
    with pytest.raises(ModelError, match=said) as error:
        read_vocabulary(folder, ROWS)
    assert error.value.where == str(folder / "tokenizer.json")


def test_a_tokenizer_that_transformers_made_of_the_model(tmp_path: Path) -> None:
    """transformers' own conversion of tokenizer.model: the same merges as the tests' tokenizer, the same scores."""
    from transformers.convert_slow_tokenizer import generate_merges

    write_family_tokenizer(tmp_path, "llama")
    value = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab = value["model"]["vocab"]
    theirs = [list(merge) for merge in generate_merges(vocab, None, ("<unk>", "<s>", "</s>"))]
    assert sorted(theirs) == sorted(value["model"]["merges"])
    ours = read_vocabulary(tmp_path, ROWS)
    value["model"]["merges"] = theirs
    (tmp_path / "tokenizer.json").write_text(json.dumps(value))
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert read_vocabulary(tmp_path, ROWS).scores == ours.scores
