"""Every line of PRE_TOKENIZERS in llama.cpp itself, with merges that show each cut made in another place."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llama_server import llama_cpp
from tiny_families import new_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from myna.export.gguf import write_gguf
from myna.model.pre_tokenizers import PRE_TOKENIZERS, pre_tokenizer_json

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="llama.cpp is reached on a unix socket")

# Cut in another place, these would be other tokens: each pair of neighbours of them is learnt as one.
CUT_HERE = [
    *(
        "abc",
        "XYZ",
        "'s",
        "'t",
        "'LL",
        "'re",
        "12",
        "345",
        "½",
        "²",
        "٣",
        "é",
        "É",
        "ß",
        "Ж",
        "北",
        "の",
        "한",
        "ก",
        "ी",
    ),
    *(
        "\u0301",
        ".",
        ",",
        "!",
        "--",
        "=>",
        "$",
        "(",
        "_",
        "`",
        "#",
        "~",
        "^",
        "|",
        "😀",
        "\u200d",
        "\ufe0f",
        "。",
        "“",
        "…",
    ),
    *(
        "€",
        "©",
        "ª",
        "Ⅷ",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\r\n",
        "\t",
        "\xa0",
        "\u3000",
        "\u2003",
        "\x85",
        "\u2028",
        "\u200b",
        "ſ",
    ),
]


def new_tokenizer(folder: Path, pre: str) -> Tokenizer:
    """A byte-level BPE with the pre-tokenizer `pre` and merges across all its cuts (Falcon's own: it cuts bytes)."""
    value = json.loads(Tokenizer(models.BPE(ignore_merges=PRE_TOKENIZERS[pre].ignores_merges)).to_str())
    cut = pre_tokenizer_json(pre)
    uncut = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer = Tokenizer.from_str(json.dumps(value | {"pre_tokenizer": cut if pre == "falcon" else uncut}))
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([left + right for left in CUT_HERE for right in CUT_HERE], trainer)
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    around = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }
    value = json.loads(tokenizer.to_str()) | {"pre_tokenizer": cut, "post_processor": around}
    (folder / "tokenizer.json").write_text(json.dumps(value))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module", params=[pre for pre in PRE_TOKENIZERS if not PRE_TOKENIZERS[pre].unlike])
def cut(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Tokenizer, Callable[..., list[int]]]]:
    folder = tmp_path_factory.mktemp("p")
    tokenizer = new_tokenizer(folder, request.param)
    new_model(folder, "llama", tokenizer.get_vocab_size(), num_hidden_layers=1)
    write_gguf(folder, folder, folder / "m.gguf", "F16", name="tiny")
    with llama_cpp(folder / "m.gguf", folder) as server:
        yield tokenizer, server.tokens


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(pieces=st.lists(st.sampled_from(CUT_HERE), max_size=16))
def test_texts_are_cut_alike(cut: tuple[Tokenizer, Callable[..., list[int]]], pieces: list[str]) -> None:
    tokenizer, tokens = cut
    text = "".join(pieces)
    assert tokens(text) == tokenizer.encode(text, add_special_tokens=False).ids
    assert tokens(text, add_special=True) == tokenizer.encode(text).ids
