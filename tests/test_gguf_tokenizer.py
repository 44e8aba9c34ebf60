"""The tokenizer inside a .gguf file as a Hugging Face folder: old files, files of others, files that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
from tiny_tokenizers import write_family_tokenizer
from tokenizers import Tokenizer

from myna.data.render import load_chat_tokenizer
from myna.errors import ModelError
from myna.export.vocabulary import add_vocabulary, read_vocabulary
from myna.model.gguf_tokenizer import write_gguf_tokenizer

Write = Callable[[gguf.GGUFWriter], None]


def write_keys(path: Path, *write: Write, name: str = "tiny") -> Path:
    """A .gguf file with keys alone."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    for add in write:
        add(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tokens(model: str, texts: Sequence[str], types: Sequence[int] | None = None) -> Write:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model(model)
        writer.add_token_list(texts)
        if types is not None:
            writer.add_token_types(types)

    return add


def read(path: Path) -> dict[str, Any]:
    write_gguf_tokenizer(path, path.parent / "back")
    value: dict[str, Any] = json.loads((path.parent / "back" / "tokenizer.json").read_text())
    return value


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "llama3", "qwen3"])
def test_ids_texts_and_kinds_come_back(model_type: str, tmp_path: Path) -> None:
    original = write_family_tokenizer(tmp_path, model_type)
    vocabulary = read_vocabulary(tmp_path, {"vocab_size": original.get_vocab_size() + 2})
    back = read(write_keys(tmp_path / "m.gguf", lambda writer: add_vocabulary(writer, vocabulary)))
    vocab = original.get_vocab(with_added_tokens=True)
    assert {text: back["model"]["vocab"][text] for text in vocab} == vocab
    added = {token["id"]: (token["content"], token["special"]) for token in back["added_tokens"]}
    theirs = original.get_added_tokens_decoder().items()
    expected = {index: (token.content, token.special) for index, token in theirs if "▁" not in token.content}
    assert added == expected
    assert not (tmp_path / "back" / "special_tokens_map.json").exists()


def test_a_file_of_upstreams_converter_with_spaces_in_tokens(tmp_path: Path) -> None:
    """It writes Gemma's runs of spaces as user-defined tokens of real spaces, found before all merging."""
    texts = [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        "  ",
        "▁",
        "a",
        "▁a",
        *(f"<0x{byte:02X}>" for byte in range(256)),
    ]
    kinds = [3, 3, 3, 2, 4, 1, 1, 1, *[6] * 256]
    path = write_keys(
        tmp_path / "m.gguf",
        tokens("llama", texts, kinds),
        lambda writer: writer.add_token_scores([0.0] * 4 + [-1000.0, -3.0, -2.0, -1.0] + [0.0] * 256),
        lambda writer: writer.add_add_space_prefix(False),
        lambda writer: writer.add_bos_token_id(2),
        lambda writer: writer.add_eos_token_id(1),
        lambda writer: writer.add_unk_token_id(3),
    )
    tokenizer = Tokenizer.from_str(json.dumps(read(path)))
    assert tokenizer.encode("  a   a<eos> b").ids == [2, 4, 6, 4, 7, 1, 5, 8 + ord("b")]
    assert tokenizer.decode([4, 6, 5, 7]) == "  a  a"
    assert load_chat_tokenizer(tmp_path / "back").special_tokens == {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
    }


def test_what_llama_cpp_takes_where_a_file_does_not_say(tmp_path: Path) -> None:
    old = read(write_keys(tmp_path / "old.gguf", tokens("llama", ["<unk>", "<s>", "</s>", "▁", "a", "▁a"])))
    assert old["normalizer"]["normalizers"][0] == {"type": "Prepend", "prepend": "▁"}
    assert old["added_tokens"] == [] and old["model"]["merges"] == [["▁", "a"]]
    bos = [
        tokens("gpt2", ["a", "<s>"], [1, 3]),
        lambda writer: writer.add_token_merges([]),
        lambda writer: writer.add_bos_token_id(1),
    ]
    for pre, ids in (("llama3", [1, 0]), ("gpt-2", [0])):
        path = write_keys(
            tmp_path / f"{pre}.gguf", *bos, lambda writer, pre=pre: writer.add_tokenizer_pre(pre)
        )
        assert Tokenizer.from_str(json.dumps(read(path))).encode("a").ids == ids


def test_the_pair_of_the_highest_score_is_joined_first(tmp_path: Path) -> None:
    """Whatever the ids: in llama.cpp scores alone decide."""
    texts = ["<unk>", "a", "b", "c", "ab", "bc"]
    for scores, ids in (([-1.0, -2.0], [4, 3]), ([-2.0, -1.0], [1, 5])):
        path = write_keys(
            tmp_path / "m.gguf",
            tokens("llama", texts, [2, 1, 1, 1, 1, 1]),
            lambda writer, scores=scores: writer.add_token_scores([0.0] * 4 + scores),
            lambda writer: writer.add_add_space_prefix(False),
        )
        assert Tokenizer.from_str(json.dumps(read(path))).encode("abc").ids == ids


def test_a_model_named_phi3_drops_what_is_behind_its_tokens(tmp_path: Path) -> None:
    vocabulary = tokens("llama", ["<unk>", "<s>", "</s>", "<|end|>", "<call>"], [2, 3, 3, 3, 4])
    for name, strips in (("My Phi-3 orders", [False, False, True, True, True]), ("orders", [False] * 5)):
        back = read(write_keys(tmp_path / "m.gguf", vocabulary, name=name))
        assert [token["rstrip"] for token in back["added_tokens"]] == strips


@pytest.mark.parametrize(
    ("write", "said"),
    [
        ([], "no tokenizer in this file"),
        ([tokens("gpt2", [])], "no tokenizer in this file"),
        ([tokens("bert", ["a"])], "of kind 'bert'; read are llama"),
        ([tokens("gpt2", ["a"]), lambda writer: writer.add_tokenizer_pre("nonesuch")], "by 'nonesuch'"),
        ([tokens("gpt2", ["a"])], "by None before merging"),
        (
            [
                tokens("gpt2", ["a"]),
                lambda writer: writer.add_tokenizer_pre("qwen2"),
                lambda writer: writer.add_token_merges(["a b"]),
            ],
            "its tokenizer cannot be read",
        ),
        ([tokens("llama", ["a", "b"], [1])], "its tokenizer cannot be read"),
        ([tokens("llama", ["a"]), lambda writer: writer.add_bos_token_id(7)], "its tokenizer cannot be read"),
        (
            [tokens("llama", ["a"]), lambda writer: writer.add_string("myna.tokenizer.normalizer", "{")],
            "its tokenizer cannot be read",
        ),
    ],
)
def test_files_refused(write: list[Write], said: str, tmp_path: Path) -> None:
    path = write_keys(tmp_path / "m.gguf", *write)
    with pytest.raises(ModelError, match=said) as error:
        write_gguf_tokenizer(path, tmp_path / "back")
    assert error.value.where == str(path) and not (tmp_path / "back").exists()
