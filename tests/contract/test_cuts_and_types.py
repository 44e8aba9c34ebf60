"""Every line of PRE_TOKENIZERS and QUANT_TYPES in llama.cpp itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from llama_server import llama_cpp
from tiny_families import log_probabilities, new_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from myna.export.gguf import write_gguf
from myna.export.importance import measure_importance
from myna.export.quantize import QUANT_TYPES
from myna.model.families import FAMILIES
from myna.model.pre_tokenizers import PRE_TOKENIZERS, pre_tokenizer_json

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="llama.cpp is reached on a unix socket")

TEXTS = [
    "Order 1234 4x don't\n\n  x  it's WE'LL see 12345678 apples   \n they're 1234 12345678 1234567",
    "naïve café 北京 №½² ٣٤ 😀\u200d\tend\r\n\r\n",
    "def f(x):\n    return x**2 + 3.14 # ok\n\n\n",
    "</s><s>user\nhello <call> there",
    " ",
    "",
]
# What is trained on holds what is tested, so that every cut made in another place would learn another token.
WORDS = "def f(x): return x**2\n\nthe quick brown fox jumps over the lazy dog, isn't it?  " + " ".join(
    TEXTS[:3]
)


def new_tokenizer(folder: Path, pre: str, add_bos: bool = False) -> Tokenizer:
    """A byte-level BPE of about 400 tokens, trained on `WORDS` with the pre-tokenizer `pre`."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=PRE_TOKENIZERS[pre].ignores_merges))
    tokenizer.decoder = decoders.ByteLevel()
    value = json.loads(tokenizer.to_str()) | {"pre_tokenizer": pre_tokenizer_json(pre)}
    if add_bos:
        single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        value["post_processor"] = {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
        }
    tokenizer = Tokenizer.from_str(json.dumps(value))
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS] * 20, trainer)
    tokenizer.add_tokens(["<call>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return tokenizer


# KL of the next token in the model below, three times what is measured or more.
NEAR = {
    "F32": 1e-6,
    "F16": 1e-5,
    "BF16": 1e-3,
    "Q8_0": 1e-3,
    "Q6_K": 3e-3,
    **dict.fromkeys(("Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0"), 0.02),
    **dict.fromkeys(("Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS"), 0.08),
    **dict.fromkeys(("Q3_K_L", "Q3_K_M", "Q3_K_S"), 0.15),
    **dict.fromkeys(("Q2_K", "Q2_K_S"), 0.35),
}


def test_every_file_type_loads_and_stays_near(tmp_path: Path) -> None:
    """In a model of 256 columns, so that K-quants are what they are called; the server names whole characters only."""
    tokenizer = new_tokenizer(tmp_path, "gpt-2")
    vocab_size = tokenizer.get_vocab_size()
    sizes = {"hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.05}
    model = new_model(tmp_path, "qwen2", vocab_size, **sizes)
    texts = [tokenizer.decode([index]) for index in range(vocab_size)]
    model.lm_head.weight.data[[not (text and text.isascii()) for text in texts]] *= 0.1  # never the likeliest
    model.save_pretrained(tmp_path)
    prompt = tokenizer.encode(WORDS * 3).ids[:100]
    here = log_probabilities(model, prompt)
    importance = measure_importance(model, FAMILIES["qwen2"], [prompt])
    divergence = {}
    for file_type, kind in QUANT_TYPES.items():
        weights = importance if kind.needs_importance else None
        write_gguf(tmp_path, tmp_path, tmp_path / "m.gguf", file_type, name="tiny", importance=weights)
        with llama_cpp(tmp_path / "m.gguf", tmp_path) as server:
            there = server.log_probabilities(prompt, vocab_size)
        divergence[file_type] = float((here.exp() * (here - there)).sum())
    assert {name for name, value in divergence.items() if not abs(value) < NEAR[name]} == set(), divergence
