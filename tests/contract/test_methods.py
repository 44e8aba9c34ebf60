"""Every line of METHODS: trains, is saved in PEFT's layout, loads in plain peft, and merges to the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
import torch

from myna.adapters.files import load_adapter, save_adapter
from myna.adapters.methods import METHODS, add_adapter, trainable_parameters
from myna.model.load import load_base
from myna.settings import AdapterSettings


def test_the_recipe_names_every_method() -> None:
    assert set(get_args(AdapterSettings.model_fields["method"].annotation)) == set(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_survives_the_disk_and_the_merge(method: str, tiny_base: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    settings = AdapterSettings(method=method, r=4, alpha=6)  # type: ignore[arg-type]
    ids = torch.tensor([[1, 40, 41, 200, 7]])
    model = add_adapter(load_base(tiny_base, "fp32"), settings, seed=1, base_name="tiny")
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=0.05)
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_adapter(model, tmp_path / "adapter")
    plain = PeftModel.from_pretrained(load_base(tiny_base, "fp32"), str(tmp_path / "adapter"))
    with torch.no_grad():
        trained = model.eval()(ids).logits
        torch.testing.assert_close(plain(ids).logits, trained)
        merged = load_adapter(load_base(tiny_base, "fp32"), tmp_path / "adapter").merge_and_unload()
        assert (merged(ids).logits - trained).norm() <= 1e-5 * trained.norm()
        assert (load_base(tiny_base, "fp32")(ids).logits - trained).norm() > 0.05 * trained.norm()
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["base_model_name_or_path"] == "tiny"
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        *("adapter_config.json", "adapter_model.safetensors")
    ]


@pytest.mark.parametrize("method", METHODS)
def test_the_seed_decides_the_first_weights(method: str, tiny_base: Path) -> None:
    settings = AdapterSettings(method=method, r=4)  # type: ignore[arg-type]
    first, again, other = (
        trainable_parameters(add_adapter(load_base(tiny_base, "fp32"), settings, seed=seed, base_name="tiny"))
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
