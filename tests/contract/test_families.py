"""Every line of FAMILIES, PRE_TOKENIZERS and QUANT_TYPES in llama.cpp itself.

A tiny random model of transformers, written as GGUF, must say there what it says here. llama.cpp runs in a
child on a unix socket, with its key-value cache in float32 so that nothing but the file can make a
difference.
"""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from myna.export.gguf import write_gguf
from myna.export.quantize import QUANT_TYPES
from myna.model.families import FAMILIES
from myna.model.pre_tokenizers import PRE_TOKENIZERS, pre_tokenizer_json

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="llama.cpp is reached on a unix socket")

SERVE = """
import ctypes, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # end with the test
import xllamacpp as x
p = x.CommonParams()
p.model.path, p.hostnames, p.port, p.api_keys = sys.argv[1], [sys.argv[2]], 1, ["key"]
p.n_ctx, p.n_parallel, p.warmup, p.ui, p.fit_params, p.verbosity = 256, 1, False, False, False, 1
p.cache_type_k = p.cache_type_v = x.ggml_type.GGML_TYPE_F32
p.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
p.cpuparams.n_threads = 1
server = x.Server(p)  # returns when the model is loaded
print("ready", flush=True)
sys.stdin.read()
"""

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
ROPE_BASE = {"rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_theta": 500.0},
    "linear": {"rope_theta": 500.0, "factor": 4.0},
    "yarn": ROPE_BASE,
    "llama3": ROPE_BASE | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}


@dataclass(frozen=True)
class LlamaCpp:
    socket_path: Path

    def post(self, endpoint: str, body: dict[str, Any]) -> Any:
        connection = http.client.HTTPConnection("localhost")
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.connect(str(self.socket_path))
        headers = {"Authorization": "Bearer key", "Content-Type": "application/json"}
        connection.request("POST", endpoint, json.dumps(body), headers)
        response = connection.getresponse()
        answer = json.loads(response.read())
        connection.close()
        assert response.status == 200, answer
        return answer

    def tokens(self, text: str, add_special: bool = False) -> list[int]:
        body = {"content": text, "add_special": add_special, "parse_special": True}
        ids: list[int] = self.post("/tokenize", body)["tokens"]
        return ids

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        body = {"prompt": list(prompt), "n_predict": count, "temperature": 0, "return_tokens": True}
        ids: list[int] = self.post("/completion", body)["tokens"]
        return ids

    def log_probabilities(self, prompt: Sequence[int], vocab_size: int) -> torch.Tensor:
        """[V] of the token after `prompt`. The server only tells where that token is whole UTF-8."""
        body = {
            "prompt": list(prompt),
            "n_predict": 1,
            "temperature": 0,
            "n_probs": vocab_size,
            "cache_prompt": False,
        }
        entries = self.post("/completion", body)["completion_probabilities"][0]["top_logprobs"]
        assert len(entries) == vocab_size
        answer = torch.zeros(vocab_size)
        for entry in entries:
            answer[entry["id"]] = entry["logprob"]
        return answer


@contextmanager
def llama_cpp(gguf_path: Path, tmp_path: Path) -> Iterator[LlamaCpp]:
    socket_path = tmp_path / "s.sock"
    command = [sys.executable, "-c", SERVE, str(gguf_path), str(socket_path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as child:
        try:
            assert child.stdout and child.stderr
            assert child.stdout.readline() == "ready\n", child.stderr.read()[-2000:]
            yield LlamaCpp(socket_path)
        finally:
            child.kill()
            socket_path.unlink(missing_ok=True)


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


def new_model(folder: Path, model_type: str, vocab_size: int, **changes: Any) -> Any:
    """Two layers of random weights, wide enough that each one moves the answer; biases and norms too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(sizes | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def log_probabilities(model: Any, prompt: Sequence[int]) -> torch.Tensor:
    answer: torch.Tensor = model(torch.tensor([list(prompt)])).logits[0, -1].log_softmax(-1)
    return answer


@torch.no_grad()
def greedy(model: Any, prompt: Sequence[int], count: int) -> list[int]:
    ids = list(prompt)
    while len(ids) < len(prompt) + count and (len(ids) == len(prompt) or ids[-1] != 1):
        ids.append(int(log_probabilities(model, ids).argmax()))
    return ids[len(prompt) :]


def long_prompt(model: Any, tokenizer: Tokenizer, length: int = 100) -> list[int]:
    """About `length` tokens, beyond every original context of ROPES, after which the likeliest is a
    character."""
    ids: list[int] = tokenizer.encode(WORDS * 3).ids[:length]
    while not (text := tokenizer.decode([int(log_probabilities(model, ids).argmax())])) or not text.isascii():
        ids.pop()
    assert len(ids) > 64
    return ids


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_says_the_same_in_llama_cpp(model_type: str, tmp_path: Path) -> None:
    tokenizer = new_tokenizer(tmp_path, "qwen2" if model_type.startswith("qwen") else "smollm")
    vocab_size = tokenizer.get_vocab_size() + 3
    model = new_model(tmp_path, model_type, vocab_size)
    write_gguf(tmp_path, tmp_path, tmp_path / "m.gguf", "F32", name="tiny")
    prompt = long_prompt(model, tokenizer)
    with llama_cpp(tmp_path / "m.gguf", tmp_path) as server:
        assert server.greedy(prompt[:20], 24) == greedy(model, prompt[:20], 24)
        there = server.log_probabilities(prompt, vocab_size)
        torch.testing.assert_close(there, log_probabilities(model, prompt), rtol=0, atol=2e-4)
        for text in TEXTS:
            assert server.tokens(text) == tokenizer.encode(text, add_special_tokens=False).ids


VARIANTS = [
    *[
        (kind, {"rope_parameters": {"rope_type": rope} | ROPES[rope]})
        for kind in FAMILIES
        for rope in FAMILIES[kind].rope_types
    ],
    ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
    ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    ("mistral", {"head_dim": 32, "num_key_value_heads": 4}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
]


@pytest.mark.parametrize(("model_type", "changes"), VARIANTS)
def test_variants_of_a_family(model_type: str, changes: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = new_tokenizer(tmp_path, "gpt-2")
    vocab_size = tokenizer.get_vocab_size()
    model = new_model(tmp_path, model_type, vocab_size, **changes)
    write_gguf(tmp_path, tmp_path, tmp_path / "m.gguf", "F32", name="tiny")
    prompt = long_prompt(model, tokenizer)
    with llama_cpp(tmp_path / "m.gguf", tmp_path) as server:
        there = server.log_probabilities(prompt, vocab_size)
    torch.testing.assert_close(there, log_probabilities(model, prompt), rtol=0, atol=2e-4)


def test_up_to_its_window_mistral_is_the_same(tmp_path: Path) -> None:
    tokenizer = new_tokenizer(tmp_path, "gpt-2")
    vocab_size = tokenizer.get_vocab_size()
    model = new_model(tmp_path, "mistral", vocab_size, sliding_window=72)
    write_gguf(tmp_path, tmp_path, tmp_path / "m.gguf", "F32", name="tiny")
    prompt = long_prompt(model, tokenizer, 71)  # llama.cpp itself keeps to the context that the file names
    with llama_cpp(tmp_path / "m.gguf", tmp_path) as server:
        there = server.log_probabilities(prompt, vocab_size)
    torch.testing.assert_close(there, log_probabilities(model, prompt), rtol=0, atol=2e-4)


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_texts_are_cut_alike(pre: str, add_bos: bool, tmp_path: Path) -> None:
    tokenizer = new_tokenizer(tmp_path, pre, add_bos)
    new_model(tmp_path, "llama", tokenizer.get_vocab_size(), num_hidden_layers=1)
    write_gguf(tmp_path, tmp_path, tmp_path / "m.gguf", "F16", name="tiny")
    with llama_cpp(tmp_path / "m.gguf", tmp_path) as server:
        for text in TEXTS:
            assert server.tokens(text, add_special=True) == tokenizer.encode(text).ids
    assert tokenizer.encode("x").ids[0] == 0 or not add_bos


def test_every_file_type_loads_and_stays_near(tmp_path: Path) -> None:
    """KL of the next token, in a model of 256 columns so that K-quants are what they are called."""
    tokenizer = new_tokenizer(tmp_path, "gpt-2")
    vocab_size = tokenizer.get_vocab_size()
    sizes = {"hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.05}
    model = new_model(tmp_path, "qwen2", vocab_size, **sizes)
    prompt = long_prompt(model, tokenizer)
    here = log_probabilities(model, prompt)
    divergence = {}
    for file_type in QUANT_TYPES:
        write_gguf(tmp_path, tmp_path, tmp_path / "m.gguf", file_type, name="tiny")
        with llama_cpp(tmp_path / "m.gguf", tmp_path) as server:
            there = server.log_probabilities(prompt, vocab_size)
        divergence[file_type] = float((here.exp() * (here - there)).sum())
    assert abs(divergence["F32"]) < 1e-6 and divergence["F16"] < 1e-5 and divergence["BF16"] < 1e-3
    assert divergence["Q8_0"] < 1e-3 and divergence["Q6_K"] < 3e-3
    assert all(divergence[name] < 0.02 for name in ("Q5_K_M", "Q5_K_S"))
    assert all(divergence[name] < 0.1 for name in ("Q4_K_M", "Q4_K_S", "Q4_0")), divergence
