"""merge: written tensor by tensor where the adapter is plain, through peft where it is more, and the same either way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_gguf import write_tokenizer
from tiny_lora import merged_by_peft, new_adapter, new_base

from myna.errors import CheckFailed, ModelError
from myna.export import merge as module
from myna.export.lora_file import LoraFile
from myna.export.merge import MergedParity, merge
from myna.model.families import FAMILIES

ROWS = [[(7 * i) % 290 + 2 for i in range(40)], [5, 17, 99]]
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


def merged(base: Path, adapter: Path, tokenizer_dir: Path, folder: Path, dtype: str = "fp32") -> MergedParity:
    return merge(base, adapter, tokenizer_dir, folder, dtype=dtype, rows=ROWS)


def forbid(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    def never(*_: Any) -> None:
        raise AssertionError(f"{way} was taken")

    monkeypatch.setattr(module, way, never)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_streamed_merged_is_what_peft_and_transformers_write(
    model_type: str, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid(monkeypatch, "_merge_in_memory")
    base = new_base(tmp_path / "base", model_type)
    adapter = new_adapter(base, tmp_path / "adapter")
    parity = merged(base, adapter, tokenizer_dir, tmp_path / "merged")
    assert parity.relative <= 1e-5 and parity.num_tokens == 43
    assert parity.dtype_relative == 0.0
    merged_by_peft(base, adapter).save_pretrained(tmp_path / "theirs")
    for path in (tmp_path / "theirs").iterdir():
        assert (tmp_path / "merged" / path.name).read_bytes() == path.read_bytes(), path.name
    assert load_file(base / WEIGHTS).keys() == load_file(tmp_path / "merged" / WEIGHTS).keys()
    assert (tmp_path / "merged/tokenizer.json").read_bytes() == (
        tokenizer_dir / "tokenizer.json"
    ).read_bytes()


@pytest.mark.parametrize(("dtype", "name"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_a_smaller_dtype_is_the_rounded_sum(
    tokenizer_dir: Path, tmp_path: Path, dtype: str, name: str
) -> None:
    base = new_base(tmp_path / "base", tie_word_embeddings=True)
    adapter = new_adapter(base, tmp_path / "adapter")
    parity = merged(base, adapter, tokenizer_dir, tmp_path / "merged", dtype)
    assert parity.relative <= 1e-5 < parity.dtype_relative < 0.05
    merged_by_peft(base, adapter).to(getattr(torch, name)).save_pretrained(tmp_path / "theirs")
    for path in (tmp_path / "theirs").iterdir():
        assert (tmp_path / "merged" / path.name).read_bytes() == path.read_bytes(), path.name
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == name


def test_generation_settings_of_the_base_are_kept(tokenizer_dir: Path, tmp_path: Path) -> None:
    base = new_base(tmp_path / "base")
    settings = {"do_sample": True, "temperature": 0.6, "eos_token_id": [1, 7]}
    (base / "generation_config.json").write_text(json.dumps(settings))
    merged(base, new_adapter(base, tmp_path / "adapter"), tokenizer_dir, tmp_path / "merged")
    kept = json.loads((tmp_path / "merged/generation_config.json").read_text())
    assert settings.items() <= kept.items()


# --- heads that are the embeddings


def test_a_tied_head_is_written_once(
    tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the base's file holds both, alike."""
    forbid(monkeypatch, "_merge_in_memory")
    base = new_base(tmp_path / "base", tie_word_embeddings=True)
    tensors = load_file(base / WEIGHTS)
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
        base / WEIGHTS,
        {"format": "pt"},
    )
    merged(base, new_adapter(base, tmp_path / "adapter"), tokenizer_dir, tmp_path / "merged")
    assert load_file(tmp_path / "merged" / WEIGHTS).keys() == tensors.keys()


def test_what_is_called_tied_and_is_not_goes_through_transformers(
    tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid(monkeypatch, "_merge_streamed")
    base = new_base(tmp_path / "base", tie_word_embeddings=True)
    head = torch.randn(300, 64)
    save_file(load_file(base / WEIGHTS) | {"lm_head.weight": head}, base / WEIGHTS, {"format": "pt"})
    parity = merged(base, new_adapter(base, tmp_path / "adapter"), tokenizer_dir, tmp_path / "merged")
    assert parity.relative <= 1e-5
    assert torch.equal(load_file(tmp_path / "merged" / WEIGHTS)["lm_head.weight"], head)


def test_adapters_on_both_ends(tokenizer_dir: Path, tmp_path: Path) -> None:
    targets = ["q_proj", "lm_head", "embed_tokens"]
    apart = new_base(tmp_path / "apart", tie_word_embeddings=False)
    adapter = new_adapter(apart, tmp_path / "adapter", target_modules=targets)
    assert merged(apart, adapter, tokenizer_dir, tmp_path / "merged").relative <= 1e-5
    tied = new_base(tmp_path / "tied", tie_word_embeddings=True)
    adapter = new_adapter(tied, tmp_path / "adapter", target_modules=targets)
    with pytest.raises(ModelError, match="one tensor in this base"):
        merged(tied, adapter, tokenizer_dir, tmp_path / "never")
    assert not (tmp_path / "never").exists()


# --- what goes through peft


def test_names_that_transformers_changes_as_it_loads(
    tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder saved from the model without its head, `model.` missing before every name."""
    forbid(monkeypatch, "_merge_streamed")
    base = new_base(tmp_path / "base", tie_word_embeddings=True)
    adapter = new_adapter(base, tmp_path / "adapter")
    wanted = merged_by_peft(base, adapter).state_dict()
    tensors = load_file(base / WEIGHTS)
    save_file({k.removeprefix("model."): v for k, v in tensors.items()}, base / WEIGHTS, {"format": "pt"})
    assert merged(base, adapter, tokenizer_dir, tmp_path / "merged").relative <= 1e-5
    written = load_file(tmp_path / "merged" / WEIGHTS)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in written.items())


def test_other_methods_are_merged_by_peft(
    tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peft

    forbid(monkeypatch, "_merge_streamed")
    base = new_base(tmp_path / "base")
    for number, config in enumerate(
        [
            peft.LoraConfig(r=4, use_dora=True, target_modules=["q_proj"], task_type="CAUSAL_LM"),
            peft.LoKrConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
            peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
        ]
    ):
        adapter = new_adapter(base, tmp_path / f"adapter-{number}", config)
        for dtype in ("fp32", "bf16"):
            assert merged(base, adapter, tokenizer_dir, tmp_path / "merged", dtype).relative <= 1e-5


# --- faults


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("fault", ["twice the scale", "no adapter"])
def test_a_wrong_sum_is_caught(
    tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, fault: str
) -> None:
    base = new_base(tmp_path / "base")
    adapter = new_adapter(base, tmp_path / "adapter")
    honest, factor = LoraFile.delta, {"twice the scale": 2, "no adapter": 0}[fault]
    monkeypatch.setattr(LoraFile, "delta", lambda self, name: factor * honest(self, name))
    with pytest.raises(CheckFailed, match="merged is not base"):
        merged(base, adapter, tokenizer_dir, tmp_path / "merged", dtype)
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_another_base_is_refused_before_anything_is_written(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    adapter = new_adapter(new_base(tmp_path / "wide", hidden_size=128), tmp_path / "adapter")
    with pytest.raises(ModelError, match="does not fit"):
        merged(new_base(tmp_path / "base"), adapter, tokenizer_dir, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
