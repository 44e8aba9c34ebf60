"""Every line of FAMILIES the whole way: train, merge, two files, parity, with a tokenizer of the family's own class."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny_families import new_model
from tiny_tokenizers import write_family_tokenizer

from myna.export.stage import export_stage, merge_stage
from myna.model.families import FAMILIES
from myna.pipeline import train_stage
from myna.recipe import load_recipe

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="llama.cpp is reached on a unix socket")


def write_base(folder: Path, model_type: str) -> Path:
    """A tiny base of a family, its own tokenizer and template with it."""
    tokenizer = write_family_tokenizer(folder, "gemma2" if model_type == "gemma" else model_type)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    sizes = {
        "eos_token_id": tokenizer.token_to_id(settings["eos_token"]),
        "max_position_embeddings": 512,
        "initializer_range": 0.1,  # the width that models have: wider ones lose too much in eight bits
    }
    new_model(folder, model_type, tokenizer.get_vocab_size() + 3, **sizes)
    return folder


# Two with all that is special here; the others are as long.
QUICK = ("gemma2", "gpt_neox")
CASES = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in FAMILIES]


@pytest.mark.parametrize("model_type", CASES)
def test_a_tuned_family_is_the_same_in_llama_cpp(model_type: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", model_type)
    rows = tiny.write_rows(tmp_path / "orders.jsonl", tiny.rows(16))
    blocks: dict[str, Any] = {
        "train": {"max_steps": 3, "batch_size": 4},
        "export": {"quantize": ["F32", "Q8_0"]},
        "run": {"name": str(tmp_path / "run")},
    }
    (tmp_path / "recipe.yaml").write_text(tiny.recipe_text(base, rows, **blocks))
    run = train_stage(load_recipe(tmp_path / "recipe.yaml"))
    merge_stage(run)
    files = export_stage(run, ["F32", "Q8_0"])

    parity = json.loads(run.parity_path.read_text())
    assert parity["verdict"] == "pass" and set(files) == {"F32", "Q8_0"}
    assert parity["merged"]["relative"] <= 1e-5
    exact = parity["files"]["F32"]
    print(
        f"{model_type}: mean KL {exact['mean_kl_all']:.1e}, Q8_0 {parity['files']['Q8_0']['mean_kl_all']:.1e}"
    )
    assert exact["mean_kl_all"] < 1e-5 and exact["same_top_all"] > 0.98
    trained = {name for name in load_file(run.adapter_dir / "adapter_model.safetensors") if "lora_B" in name}
    before, after = (load_file(folder / "model.safetensors") for folder in (base, run.merged_dir))
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert len(changed) == len(trained) and all(FAMILIES[model_type].layers in name for name in changed)
