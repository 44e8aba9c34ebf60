"""What Myna did not train: adapters of plain peft, model folders and .gguf files go the same way as a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import Command
from tiny_adapters import lora, write_adapter

from myna.model.load import load_base
from myna.run import file_sha256, read_json

IDS = torch.tensor([[1, 40, 41, 200, 7, 9]])


@pytest.fixture(scope="module")
def adapter(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapters") / "theirs", tiny_base, lora())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("MYNA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def by_peft(adapter: Path, base: Path, num_tokens: int | None = None) -> torch.Tensor:
    """What plain peft makes of an adapter on its base."""
    from peft import PeftModel

    model = load_base(base, "fp32")
    if num_tokens is not None:
        model.resize_token_embeddings(num_tokens, mean_resizing=False)
    return logits(PeftModel.from_pretrained(model, str(adapter)).eval())


def test_somebodys_adapter_is_merged_exported_measured_and_verified(
    myna: Command, tmp_path: Path, adapter: Path, tiny_base: Path
) -> None:
    shutil.copytree(adapter, tmp_path / "theirs")
    for name in ("optimizer.pt", "training_args.bin"):
        (tmp_path / "theirs" / name).write_bytes(b"\x80\x04never read")
    merged = myna("merge", "theirs", "--json")
    assert merged.returncode == 0, merged.stderr
    folder = tmp_path / "runs/theirs"
    assert json.loads(merged.stdout)["merged"] == "runs/theirs/merged"
    torch.testing.assert_close(
        logits(load_base(folder / "merged", "fp32")), by_peft(adapter, tiny_base), atol=1e-4, rtol=1e-4
    )
    info = read_json(folder / "run.json")
    assert info["source"]["kind"] == "adapter" and info["base"]["name"] == tiny_base.name
    weights = file_sha256(adapter / "adapter_model.safetensors")
    assert info["stages"]["train"] | {"done": ""} == {
        "given": True,
        "seconds": 0.0,
        "adapter_sha256": weights,
        "done": "",
    }
    assert {path.name for path in (folder / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert "train" not in (folder / "recipe.yaml").read_text()
    no_rows = myna("evaluate", "theirs")
    assert no_rows.returncode == 2 and "--rows FILE" in no_rows.stderr
    exported = myna("export", "theirs", "--quantize", "Q8_0", "--json")
    assert exported.returncode == 0, exported.stderr
    assert json.loads(exported.stdout)["parity"]["files"]["Q8_0"]["verdict"] == "pass"
    tiny.write_rows(tmp_path / "rows.jsonl", tiny.rows(4))
    measured = myna("evaluate", "theirs", "--rows", "rows.jsonl", "--json")
    assert measured.returncode == 0, measured.stderr
    assert list(json.loads(measured.stdout)["evaluation"]) == ["base", "tuned", "Q8_0"]
    assert "not trained here" in (folder / "report.html").read_text()
    card = (folder / "README.md").read_text()
    assert "LORA adapter (`theirs`)" in card and "was not trained with it" in card
    assert myna("verify", "theirs").returncode == 0
    (folder / "adapter/adapter_model.safetensors").write_bytes(b"x")
    assert myna("verify", "theirs").returncode == 5


def test_a_model_folder_is_exported_as_it_lies(myna: Command, tmp_path: Path, tiny_base: Path) -> None:
    shutil.copytree(tiny_base, tmp_path / "given")
    refused = myna("merge", "given")
    assert (
        refused.returncode == 2
        and "nothing to merge" in refused.stderr
        and "myna export given" in refused.stderr
    )
    assert not (tmp_path / "runs").exists()
    exported = myna("export", "given", "--quantize", "Q8_0")
    assert exported.returncode == 0, exported.stderr
    run = tmp_path / "runs/given"
    assert (run / "gguf/given-Q8_0.gguf").is_file()
    assert not (run / "merged").exists() and not (run / "adapter").exists()
    tiny.write_rows(tmp_path / "rows.jsonl", tiny.rows(4))
    measured = myna("evaluate", "given", "--rows", "rows.jsonl", "--json")
    assert list(json.loads(measured.stdout)["evaluation"]) == ["model", "Q8_0"], measured.stderr
    assert myna("verify", "given").returncode == 0
    # its weights are looked at before each use
    tiny.write_base(tmp_path / "given", initializer_range=0.3)
    changed = myna("export", "runs/given", "--quantize", "Q8_0,F16")
    assert changed.returncode == 2 and "are not those the run was made with" in changed.stderr
    again = myna("export", "given", "--quantize", "F16")
    assert again.returncode == 2 and "--name NAME" in again.stderr


def test_a_gguf_file_is_quantized_again_and_answers(myna: Command, tmp_path: Path, tiny_base: Path) -> None:
    from myna.export.gguf import write_gguf

    write_gguf(tiny_base, tiny_base, tmp_path / "their.gguf", "F32", name="tiny")
    exported = myna("export", "their.gguf", "--quantize", "Q8_0", "--json")
    assert exported.returncode == 0, exported.stderr
    assert read_json(tmp_path / "runs/their/run.json")["source"]["kind"] == "gguf"
    assert json.loads(exported.stdout)["files"] == {"Q8_0": "runs/their/gguf/their-Q8_0.gguf"}


def test_the_same_command_again_goes_on_and_another_adapter_is_refused(
    myna: Command, tmp_path: Path, adapter: Path, tiny_base: Path
) -> None:
    shutil.copytree(adapter, tmp_path / "theirs")
    assert myna("merge", "theirs").returncode == 0
    again = myna("merge", "theirs", "--base", str(tiny_base))
    assert again.returncode == 0 and "merged already" in again.stderr
    config = read_json(tmp_path / "theirs/adapter_config.json") | {"lora_alpha": 16}
    (tmp_path / "theirs/adapter_config.json").write_text(json.dumps(config))
    other = myna("merge", "theirs")
    assert other.returncode == 2 and "was made from" in other.stderr and "--name NAME" in other.stderr
    assert myna("merge", "theirs", "--name", "second").returncode == 0
    assert (tmp_path / "runs/second/merged").is_dir()
    flag = myna("merge", "runs/second", "--base", str(tiny_base))
    assert flag.returncode == 2 and "--base is for" in flag.stderr


METHODS: dict[str, Callable[[], Any]] = {
    "rslora": lambda: lora(use_rslora=True),
    "dora": lambda: lora(use_dora=True),
    "bias": lambda: lora(bias="lora_only"),
    "a head of its own": lambda: lora(modules_to_save=["lm_head"]),
    "tied_embedding": lambda: lora(target_modules=["embed_tokens", "q_proj"]),
    "two tokens": lambda: lora(trainable_token_indices=[5, 200]),
    "LoHa": lambda: _config("LoHaConfig", r=4),
    "LoKr": lambda: _config("LoKrConfig", r=4),
    "IA3": lambda: _config("IA3Config", feedforward_modules=[]),
    "AdaLoRA": lambda: _config("AdaLoraConfig", init_r=4, target_r=2, total_step=10),
    "OFT": lambda: _config("OFTConfig", r=0, oft_block_size=16),
}


def _config(name: str, **settings: Any) -> Any:
    import peft

    return getattr(peft, name)(task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj"], **settings)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore")  # what peft says to those who save
def test_whatever_peft_can_merge_is_merged(
    myna: Command, tmp_path: Path, tiny_base: Path, method: str
) -> None:
    write_adapter(tmp_path / "theirs", tiny_base, METHODS[method]())
    done = myna("merge", "theirs")
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    expected = by_peft(tmp_path / "theirs", tiny_base)
    found = logits(load_base(tmp_path / "runs/theirs/merged", "fp32"))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, logits(load_base(tiny_base, "fp32")), atol=1e-2)


@pytest.mark.filterwarnings("ignore")
def test_added_tokens_come_with_the_adapter(myna: Command, tmp_path: Path, tiny_base: Path) -> None:
    config = lora(modules_to_save=["embed_tokens", "lm_head"])
    write_adapter(tmp_path / "theirs", tiny_base, config, num_tokens=408)
    done = myna("merge", "theirs")
    assert done.returncode == 0, done.stderr
    merged = load_base(tmp_path / "runs/theirs/merged", "fp32")
    assert merged.get_input_embeddings().weight.shape[0] == 408 == merged.config.vocab_size
    expected = by_peft(tmp_path / "theirs", tiny_base, 408)
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)


def test_the_tokenizer_beside_an_adapter_is_the_runs(myna: Command, tmp_path: Path, adapter: Path) -> None:
    shutil.copytree(adapter, tmp_path / "own")
    theirs = "{# theirs #}" + tiny.CHATML
    tiny.write_tokenizer(tmp_path / "own", template=theirs)
    config = read_json(tmp_path / "own/tokenizer_config.json") | {"model_max_length": 77}
    (tmp_path / "own/tokenizer_config.json").write_text(json.dumps(config))
    shutil.copytree(adapter, tmp_path / "bare")
    tiny.write_tokenizer(tmp_path / "bare", template=None)
    for name, template in (("own", theirs), ("bare", tiny.CHATML)):
        done = myna("merge", name)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "runs" / name / "tokenizer/chat_template.jinja").read_text() == template
    assert read_json(tmp_path / "runs/own/tokenizer/tokenizer_config.json")["model_max_length"] == 77
