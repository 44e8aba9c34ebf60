"""Every family's tokenizer in llama.cpp itself, and back from the file.

Ids through `tokenizers` must be llama.cpp's ids. What is known to differ is left out here by name:

    Mistral      a space is put before a text's beginning only; llama.cpp is told to put none. Conversations begin
                 with a control token, before which there is no text
    Phi-3        behind its tokens Unicode's spaces are dropped too, by llama.cpp ASCII's only
    Gemma        ▁ itself, next to spaces
    Qwen, NeoX   what is not composed (NFC)
"""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llama_server import LlamaCpp, llama_cpp
from tiny_families import new_model
from tiny_sentencepiece import SENTENCES
from tiny_tokenizers import BYTE_LEVEL, FAMILY_TOKENIZERS, write_family_tokenizer
from tokenizers import Tokenizer

from myna.data.conversation import Conversation, Message
from myna.data.render import ChatTokenizer, load_chat_tokenizer
from myna.export.gguf import write_gguf
from myna.model.gguf_tokenizer import write_gguf_tokenizer

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="llama.cpp is reached on a unix socket")

TEXTS = [
    *SENTENCES,
    *(
        "",
        " ",
        "\n",
        "\t",
        "   ",
        "hello world",
        " hello",
        "  hello   world  ",
        "x" + " " * 33,
        " " * 40 + "x",
    ),
    "Order 1234 4x don't\n\n  x  it's WE'LL see 12345678 apples   \n they're 1234 12345678 1234567",
    "naïve café 北京 №½² ٣٤ 😀 👨‍👩‍👧 🏳️‍🌈\tend\r\n\r\n",
    "\n\n hello\n\n\n\n\n\n\n x\r\n\r\n x\r\t\tif x:\n\t\t\ty",
    "\x00\x01\x7f\x85\xa0\u2003\u200bx\ufeff",
    "<s> hello</s>x <s>y </s></s>\nhello <unk> <0x0A> <0xF0>",
    "[INST] hi [/INST] <|im_start|>user\nhi<|im_end|> <|eot_id|> <|endoftext|> a >>TITLE<<x",
    "<|user|>\n hi<|end|>\n<|assistant|>\nok<|end|>",
    "<start_of_turn>user\n<b>x</b><table><2mass><mask><unused0><end_of_turn>\n<bos><eos><pad>",
    "</ s> < s> <|im_ end|> <|im_end|><|im_end |> <| user|> [ INST] [PAD640]",
    "+++ --- === $$$ ``` ~~~ ^^^ x**2 a" + "a" * 50,
]
PIECES = [
    *"abcxyzABCXYZ0123456789.,!?;:'\"-_=+*/<>()[]{}|$#@^~`\\",
    *(
        "hello",
        "there",
        " the",
        "don't",
        "'S",
        "'ll",
        "1234",
        "user",
        "assistant",
        "  ",
        "    ",
        "\n",
        "\n\n",
    ),
    *(
        "\t",
        "\r\n",
        "é",
        "ß",
        "Ж",
        "при",
        "вет",
        "λ",
        "北京",
        "日本",
        "안녕",
        "नम",
        "स्ते",
        "مر",
        "حبا",
        "ก็",
        "😀",
    ),
    *("\u200d", "\ufe0f", "²", "½", "٣", "\u200b", "\x00", "\x1f", "…", "“", "。"),
    *(
        "<s>",
        "</s>",
        "<unk>",
        "<0x0A>",
        "[INST]",
        "[/INST]",
        "<|im_start|>",
        "<|im_end|>",
        "<|end|>",
        "<|user|>",
    ),
    *(
        "<|eot_id|>",
        "<|endoftext|>",
        "<bos>",
        "<eos>",
        "<start_of_turn>",
        "<end_of_turn>",
        "<b>",
        ">>TITLE<<",
    ),
    *("<think>", "<|im_", "end|>", "</", "s>", "<start_of_"),
]


@dataclass(frozen=True)
class Served:
    """A family's tokenizer, llama.cpp with its file, and the tokenizer read back from that file."""

    model_type: str
    gguf_path: Path
    tokenizer: ChatTokenizer
    server: LlamaCpp
    back: ChatTokenizer

    def text(self, text: str) -> str:
        """The text without what is known to differ; see above."""
        if self.model_type == "mistral":
            return "<s>" + text
        if self.model_type == "phi3":
            return "".join(character for character in text if character.isascii() or not character.isspace())
        is_nfc = self.model_type in BYTE_LEVEL and BYTE_LEVEL[self.model_type].is_nfc
        return unicodedata.normalize("NFC", text) if is_nfc else text


def write_file(folder: Path, tokenizer: Tokenizer, name: str = "orders") -> Path:
    """A model of one layer with the tokenizer in `folder`; three rows of its embeddings have no token."""
    new_model(folder, "llama", tokenizer.get_vocab_size() + 3, num_hidden_layers=1)
    write_gguf(folder, folder, folder / "m.gguf", "F16", name=name)
    return folder / "m.gguf"


@pytest.fixture(scope="module", params=FAMILY_TOKENIZERS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("t")
    path = write_file(folder, write_family_tokenizer(folder, request.param))
    write_gguf_tokenizer(path, folder / "back")
    back = load_chat_tokenizer(folder / "back")
    with llama_cpp(path, folder) as server:
        yield Served(request.param, path, load_chat_tokenizer(folder), server, back)


def conversations(served: Served) -> list[Conversation]:
    """In several scripts, with and without a system line, of several turns, with text that looks like control tokens."""
    turns = [
        ("hello  there 1234", "the other"),
        ("Привет, как дела? 😀", "  это тест\n"),
        ("北京 是 中国 的 首都\n\nनमस्ते", "안녕하세요 مرحبا"),
        ("say <s> </s> [INST] <|im_end|> <end_of_turn> <|end|>\n x <|eot_id|>", "</s >"),
        ("\t\tif x:\n\t\t\ty\n\n\n", "{}"),
    ]
    said = [(Message("user", user), Message("assistant", answer)) for user, answer in turns]
    system = () if served.model_type == "gemma2" else (Message("system", "Be kind.\n Always."),)
    return [
        *(Conversation((*system, *turn)) for turn in said),
        *(Conversation(turn) for turn in said),
        Conversation((*system, *(message for turn in said for message in turn))),
    ]


def test_texts_have_the_same_ids(served: Served) -> None:
    for text in map(served.text, TEXTS):
        assert served.server.tokens(text) == served.tokenizer.encode(text), repr(text)


def test_what_is_put_around_a_text_is_the_same(served: Served) -> None:
    for text in ("hello world", "", "  x\n"):
        if served.model_type != "mistral":
            ids = served.tokenizer.tokenizer.encode(text).ids
            assert served.server.tokens(text, add_special=True) == ids
            assert served.back.tokenizer.encode(text).ids == ids
    added = served.tokenizer.tokenizer.encode("hello").ids[0]
    has_bos = served.model_type in ("llama", "mistral", "gemma2", "gemma3_text", "llama3")
    assert (
        added == served.tokenizer.tokenizer.token_to_id(served.tokenizer.special_tokens.get("bos_token", ""))
    ) == (has_bos)


def test_rendered_conversations_have_the_same_ids(served: Served) -> None:
    for conversation in conversations(served):
        text = served.tokenizer.render_text(conversation, add_generation_prompt=False)
        assert served.server.tokens(text) == served.tokenizer.encode(text), text


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=24))
def test_any_text_has_the_same_ids(served: Served, pieces: list[str]) -> None:
    text = served.text("".join(pieces))
    ids = served.tokenizer.encode(text)
    assert served.server.tokens(text) == ids
    assert served.back.encode(text) == ids


def test_the_file_gives_the_tokenizer_back(served: Served) -> None:
    for text in TEXTS:
        assert served.back.encode(text) == served.tokenizer.encode(text), repr(text)
    assert served.back.template_text == served.tokenizer.template_text
    # a bos that only config.json names, as Qwen's, is in the file too
    assert (
        dict(served.back.special_tokens) | dict(served.tokenizer.special_tokens) == served.back.special_tokens
    )
    assert served.back.stop_ids == served.tokenizer.stop_ids
    ids = served.tokenizer.encode("The quick brown café 北京 😀\n")
    assert served.back.decode(ids) == served.tokenizer.decode(ids) != ""


@pytest.mark.parametrize(("model_type", "name"), [("llama", "my-phi3"), ("qwen2", "Phi-3 orders")])
def test_a_name_does_not_change_the_tokens(model_type: str, name: str, tmp_path: Path) -> None:
    """llama.cpp drops white space behind special tokens in whatever is named phi3, and wants Phi-3's tokens there."""
    write_family_tokenizer(tmp_path, model_type)
    tokenizer = load_chat_tokenizer(tmp_path)
    text = "<s> hello </s>\n <|im_start|> x <|im_end|>\n"
    with llama_cpp(write_file(tmp_path, tokenizer.tokenizer, name), tmp_path) as server:
        assert server.tokens(text) == tokenizer.encode(text)


def test_a_tab_that_has_its_bytes_id_has_it_in_llama_cpp(tmp_path: Path) -> None:
    """As transformers makes of Gemma's, whose tabs are merged although none is a token."""
    write_family_tokenizer(tmp_path, "gemma2")
    path = tmp_path / "tokenizer.json"
    value = json.loads(path.read_text())
    value["model"]["vocab"]["\t"] = value["model"]["vocab"]["<0x09>"]
    path.write_text(json.dumps(value))
    tokenizer = load_chat_tokenizer(tmp_path)
    with llama_cpp(write_file(tmp_path, tokenizer.tokenizer), tmp_path) as server:
        for text in ("\t", "\t\tx\ty", "\n\t\t\t:\n\t\t"):
            assert server.tokens(text) == tokenizer.encode(text)


def test_llamas_runs_of_spaces(tmp_path: Path) -> None:
    """Sixteen pieces with one score between them, whose merges stand mixed in the files of Llama 2, TinyLlama and Phi-3."""
    write_family_tokenizer(tmp_path, "llama")
    path = tmp_path / "tokenizer.json"
    value = json.loads(path.read_text())
    vocab = value["model"]["vocab"]
    runs = ["▁" * count for count in range(2, 17)]
    vocab |= {run: len(vocab) + place for place, run in enumerate(run for run in runs if run not in vocab)}
    merges = [merge for merge in value["model"]["merges"] if "".join(merge) not in runs]
    mixed = [["▁" * left, "▁" * right] for left in range(15, 0, -1) for right in range(16 - left, 0, -1)]
    value["model"]["merges"] = merges + mixed
    value["model"]["vocab"] = {text: vocab[text] for text in vocab}
    path.write_text(json.dumps(value))
    tokenizer = load_chat_tokenizer(tmp_path)
    write_gguf_tokenizer(write_file(tmp_path, tokenizer.tokenizer), tmp_path / "back")
    back = load_chat_tokenizer(tmp_path / "back")
    with llama_cpp(tmp_path / "m.gguf", tmp_path) as server:
        for text in (
            f"{before}{' ' * count}{after}"
            for count in range(40)
            for before in "x:"
            for after in ("", "a", "\n")
        ):
            assert server.tokens(text) == tokenizer.encode(text) == back.encode(text), repr(text)


def test_what_is_refused_would_be_cut_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reasons for refusing are real: without a merge that SentencePiece has, llama.cpp joins all the same."""
    write_family_tokenizer(tmp_path, "llama")
    path = tmp_path / "tokenizer.json"
    value = json.loads(path.read_text())
    value["model"]["merges"] = [merge for merge in value["model"]["merges"] if "".join(merge) != "he"]
    path.write_text(json.dumps(value))
    monkeypatch.setattr("myna.export.sentencepiece_scores._refuse_missing", lambda *_: None)
    tokenizer = load_chat_tokenizer(tmp_path)
    with llama_cpp(write_file(tmp_path, tokenizer.tokenizer), tmp_path) as server:
        assert server.tokens("xhex") != tokenizer.encode("xhex")
