"""The vocabulary: what a GGUF file says of a tokenizer, and which are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
from llama_server import llama_cpp
from tiny_families import new_model
from tiny_gguf import CONFIG, VOCAB_SIZE, write_tokenizer
from tiny_tokenizers import write_family_tokenizer
from tokenizers import Tokenizer

from myna.data.render import load_chat_tokenizer
from myna.errors import DataError, ModelError
from myna.export.gguf import write_gguf
from myna.export.tokens import CONTROL, NORMAL, UNUSED, USER_DEFINED
from myna.export.vocabulary import read_vocabulary, shown_name
from myna.model.folders import check_model_folder
from myna.model.pre_tokenizers import (
    ALIASES,
    PRE_TOKENIZERS,
    known_name,
    pre_tokenizer_json,
    pre_tokenizer_name,
)
from myna.prepare import save_tokenizer


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


def changed_tokenizer(folder: Path, source: Path, **changes: Any) -> Path:
    """A copy with keys replaced; `model__x` replaces `model.x`."""
    shutil.copytree(source, folder)
    value = json.loads((folder / "tokenizer.json").read_text())
    for key, new in changes.items():
        outer, _, inner = key.partition("__")
        if inner:
            value[outer][inner] = new
        else:
            value[outer] = new
    (folder / "tokenizer.json").write_text(json.dumps(value))
    return folder


def test_tokens_types_and_merges(tokenizer_dir: Path) -> None:
    vocabulary = read_vocabulary(tokenizer_dir, CONFIG)
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    assert len(vocabulary.tokens) == len(vocabulary.token_types) == VOCAB_SIZE
    for index in range(297):
        assert vocabulary.tokens[index] == tokenizer.id_to_token(index)
    assert vocabulary.tokens[297:] == ("[PAD297]", "[PAD298]", "[PAD299]")
    assert vocabulary.token_types[:3] == (CONTROL, CONTROL, NORMAL)
    assert vocabulary.token_types[295:] == (NORMAL, USER_DEFINED, UNUSED, UNUSED, UNUSED)


def test_what_gguf_reads_of_the_same_folder(tokenizer_dir: Path) -> None:
    upstream = gguf.SpecialVocab(tokenizer_dir, load_merges=True)
    vocabulary = read_vocabulary(tokenizer_dir, CONFIG)
    assert list(vocabulary.merges) == upstream.merges and len(upstream.merges) > 30
    assert vocabulary.chat_template == upstream.chat_template
    ids = {"bos": vocabulary.bos_id, "eos": vocabulary.eos_id, "pad": vocabulary.pad_id}
    assert ids == upstream.special_token_ids


def test_merges_as_pairs_or_as_text(tokenizer_dir: Path, tmp_path: Path) -> None:
    pairs = json.loads((tokenizer_dir / "tokenizer.json").read_text())["model"]["merges"]
    assert isinstance(pairs[0], list)
    lines = changed_tokenizer(tmp_path / "t", tokenizer_dir, model__merges=[" ".join(pair) for pair in pairs])
    assert read_vocabulary(lines, CONFIG).merges == read_vocabulary(tokenizer_dir, CONFIG).merges


@pytest.mark.parametrize(
    ("single", "around"),
    [
        (["A"], (False, False)),
        (["<s>", "A"], (True, False)),
        (["A", "</s>"], (False, True)),
        (["<s>", "A", "</s>"], (True, True)),
    ],
)
def test_what_the_tokenizer_adds_around_a_text(
    single: list[str], around: tuple[bool, bool], tokenizer_dir: Path, tmp_path: Path
) -> None:
    pieces = [
        {"Sequence": {"id": "A", "type_id": 0}}
        if piece == "A"
        else {"SpecialToken": {"id": piece, "type_id": 0}}
        for piece in single
    ]
    template = {"type": "TemplateProcessing", "single": pieces, "pair": [], "special_tokens": {}}
    both = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, template]}
    for index, processor in enumerate((template, both)):
        folder = changed_tokenizer(tmp_path / str(index), tokenizer_dir, post_processor=processor)
        vocabulary = read_vocabulary(folder, CONFIG)
        assert (vocabulary.add_bos, vocabulary.add_eos) == around


def test_special_ids_and_template_from_elsewhere(tokenizer_dir: Path, tmp_path: Path) -> None:
    folder = changed_tokenizer(tmp_path / "t", tokenizer_dir)
    (folder / "chat_template.jinja").unlink()
    templates = [{"name": "tools", "template": "no"}, {"name": "default", "template": "yes"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates, "bos_token": None}))
    vocabulary = read_vocabulary(folder, CONFIG | {"eos_token_id": 1, "pad_token_id": 5})
    assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.unk_id, vocabulary.pad_id) == (None, 1, None, 5)
    assert vocabulary.chat_template == "yes"
    with pytest.raises(ModelError, match="no end token"):
        read_vocabulary(folder, CONFIG | {"eos_token_id": [1, 2]})


_SPECIAL = {"SpecialToken": {"id": "<call>", "type_id": 0}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__type": "Unigram"}, "Unigram; only BPE, byte-level or SentencePiece's"),
        ({"model__type": "WordPiece"}, "WordPiece"),
        ({"model__byte_fallback": True}, "Sequence.* are not among those of SentencePiece"),
        ({"model__dropout": 0.1}, "dropout"),
        ({"model__ignore_merges": True}, "pre_tokenizer is none"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "known are smollm, gpt-2"),
        ({"pre_tokenizer": None}, "pre_tokenizer is none"),
        ({"normalizer": {"type": "Lowercase"}}, "no normalizer Lowercase"),
        ({"post_processor": {"type": "RobertaProcessing"}}, "RobertaProcessing"),
        ({"post_processor": {"type": "TemplateProcessing", "single": [_SPECIAL]}}, "<call>"),
        ({"model__merges": ["a b c"]}, "no pair"),
        ({"model__merges": [["a", "b c"]]}, "no pair"),
        ({"added_tokens": [{"id": 290, "content": "a", "special": True}]}, "'a' has two ids"),
        ({"model__vocab": {"a": 0, "b": 0}}, "id 0 stands for both 'a' and 'b'"),
    ],
)
def test_tokenizers_refused(changes: dict[str, Any], said: str, tokenizer_dir: Path, tmp_path: Path) -> None:
    folder = changed_tokenizer(tmp_path / "t", tokenizer_dir, **changes)
    with pytest.raises(ModelError, match=said) as error:
        read_vocabulary(folder, CONFIG)
    assert error.value.where == str(folder / "tokenizer.json")


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        read_vocabulary(tmp_path, CONFIG)


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_pre_tokenizers_are_known_both_ways(pre: str, tmp_path: Path) -> None:
    """As tokenizers itself writes them, whatever it adds or leaves out."""
    value = write_tokenizer(tmp_path, pre)
    assert pre_tokenizer_name(value["pre_tokenizer"], value["model"]["ignore_merges"]) == pre
    if PRE_TOKENIZERS[pre].unlike:
        with pytest.raises(ModelError, match=f"the pre_tokenizer is {pre}; llama.cpp"):
            read_vocabulary(tmp_path, CONFIG)
    else:
        assert read_vocabulary(tmp_path, CONFIG).pre == pre


def test_pre_tokenizers_that_cut_alike_have_one_name() -> None:
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False}
    assert pre_tokenizer_name(bytes_) == "gpt-2"
    assert (
        pre_tokenizer_name({"type": "Sequence", "pretokenizers": [bytes_ | {"trim_offsets": False}]})
        == "gpt-2"
    )
    assert pre_tokenizer_name(bytes_ | {"add_prefix_space": True}) is None
    assert pre_tokenizer_json("who-knows") is None


def test_all_but_the_matches_removed_is_the_matches_isolated() -> None:
    """As tokenizers made from tiktoken's have it; only where one pattern matches all there is."""
    qwen2 = json.loads(json.dumps(PRE_TOKENIZERS["qwen2"].value))
    qwen2["pretokenizers"][0] |= {"behavior": "Removed", "invert": True}
    assert pre_tokenizer_name(qwen2) == "qwen2"
    several = json.loads(json.dumps(PRE_TOKENIZERS["deepseek-v3"].value))
    several["pretokenizers"][0] |= {"behavior": "Removed", "invert": True}
    assert pre_tokenizer_name(several) is None


def test_other_names_lead_to_a_line_of_the_table() -> None:
    others = [other for names in ALIASES.values() for other in names]
    assert set(ALIASES) <= set(PRE_TOKENIZERS) and len(others) == len(set(others))
    assert not set(others) & set(PRE_TOKENIZERS)
    assert (known_name("llama3"), known_name("olmo"), known_name("qwen2")) == ("llama-bpe", "gpt-2", "qwen2")
    assert known_name("default") is None


def test_what_closes_a_turn_is_named_where_it_is_not_the_end_token(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    folder = changed_tokenizer(tmp_path / "t", tokenizer_dir)
    assert read_vocabulary(folder, CONFIG).turn_end_id is None
    turns = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + TURN_END }}{% endfor %}"
    for text, turn_end in (("'</s>'", None), ("'<s>'", 0)):
        (folder / "chat_template.jinja").write_text(turns.replace("TURN_END", text))
        assert read_vocabulary(folder, CONFIG).turn_end_id == turn_end
    (folder / "chat_template.jinja").unlink()
    assert read_vocabulary(folder, CONFIG).turn_end_id is None


def test_a_row_without_a_token_never_takes_the_name_of_one(tokenizer_dir: Path, tmp_path: Path) -> None:
    added = [{"id": 296, "content": "[PAD298]", "special": False}]
    folder = changed_tokenizer(tmp_path / "t", tokenizer_dir, added_tokens=added)
    assert read_vocabulary(folder, CONFIG).tokens[296:] == ("[PAD298]", "[PAD297]", "[PAD298]_", "[PAD299]")


def test_only_a_phi3_tokenizer_has_a_name_that_says_so(tokenizer_dir: Path, tmp_path: Path) -> None:
    plain = read_vocabulary(tokenizer_dir, CONFIG)
    assert [shown_name(name, plain) for name in ("orders", "my-phi3", "Phi-3.5 orders")] == [
        "orders",
        "my-phi 3",
        "Phi 3.5 orders",
    ]
    write_family_tokenizer(tmp_path, "phi3")
    phi3 = read_vocabulary(tmp_path, {"vocab_size": 651})
    assert phi3.strips_behind
    assert [shown_name(name, phi3) for name in ("orders", "my-phi3", "Phi-3.5 orders")] == [
        "orders (Phi-3)",
        "my-phi3",
        "Phi-3.5 orders",
    ]


def test_an_added_token_without_an_embedding_is_left_out_and_the_others_are_llama_cpps(
    tmp_path: Path,
) -> None:
    """As Gemma 3's text models have it: <image_soft_token> is one beyond the embeddings."""
    tokenizer = write_family_tokenizer(tmp_path, "gemma2")
    rows = tokenizer.get_vocab_size()
    value = json.loads((tmp_path / "tokenizer.json").read_text())
    value["added_tokens"].append(value["added_tokens"][0] | {"id": rows, "content": "<image_soft_token>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(value))
    new_model(tmp_path, "gemma3_text", rows)
    check_model_folder(tmp_path)
    write_gguf(tmp_path, tmp_path, tmp_path / "m.gguf", "F16", name="soft")
    assert len(read_vocabulary(tmp_path, {"vocab_size": rows}).tokens) == rows
    ours = load_chat_tokenizer(tmp_path)
    text = "<bos><start_of_turn>user\nThe quick brown fox, 12 times<end_of_turn>\n"
    with llama_cpp(tmp_path / "m.gguf", tmp_path) as server:
        assert server.tokens(text) == ours.encode(text)
    with pytest.raises(DataError, match="'<image_soft_token>', a token of the tokenizer"):
        ours.encode("see <image_soft_token>")
    save_tokenizer(tmp_path, tmp_path / "run", ours)
    with pytest.raises(DataError, match="no embedding for"):
        load_chat_tokenizer(tmp_path / "run").encode("see <image_soft_token>")
