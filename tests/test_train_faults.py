"""A loss or gradient that is not finite ends the run before it is used, and names step and rows."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from myna.data.render import load_chat_tokenizer
from myna.errors import CheckFailed
from myna.pipeline import train_stage
from myna.recipe import Recipe, load_recipe
from myna.stored import run_of

LARGEST = torch.finfo(torch.float32).max
STRANGE = {9: "«", 30: "»"}  # the lines that hold a word whose embedding is planted


def recipe_of(folder: Path, base: Path, **train: object) -> Recipe:
    made = tiny.rows(40)
    for line, word in STRANGE.items():
        made[line - 1]["prompt"] += word
    rows = tiny.write_rows(folder / "orders.jsonl", made)
    path = folder / "recipe.yaml"
    data = {"test_fraction": 0.0, "test": str(tiny.write_rows(folder / "test.jsonl", tiny.rows(4, start=90)))}
    path.write_text(tiny.recipe_text(base, rows, train=train, data=data))
    return load_recipe(path)


def plant(base: Path, words: str) -> None:
    """Finite weights that overflow for these words alone: only they have a first column, which v makes too large."""
    tokenizer = load_chat_tokenizer(base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"][:, 0] = 0
    tensors["model.layers.0.self_attn.v_proj.weight"][:, 0] = LARGEST / 2
    for word in words:
        tensors["model.embed_tokens.weight"][tokenizer.encode(word)[-1], 0] = 1.0
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def untied_base(folder: Path) -> Path:
    return tiny.write_base(folder / "own", tie_word_embeddings=False)


@pytest.mark.parametrize("packed", [True, False])
def test_the_rows_are_named_and_the_last_good_checkpoint_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    base = untied_base(tmp_path)
    plant(base, "»")
    recipe = recipe_of(tmp_path, base, packed=packed, save_every_steps=1, seed=1)
    with pytest.raises(CheckFailed) as caught:
        train_stage(recipe)
    error, run = caught.value, run_of(recipe)
    found = re.search(r"the loss of step (\d+) is nan", error.message)
    assert found is not None and error.exit_code == 5
    assert f"not finite by themselves: {tmp_path / 'orders.jsonl'}:30" in error.message
    assert error.message.count("orders.jsonl:") == 1
    step = int(found[1])
    assert step > 1  # else there is no checkpoint to be kept
    names = sorted(path.name for path in run.checkpoints_dir.iterdir())
    assert f"the last good checkpoint is checkpoints/{names[-1]}" in (error.help or "")
    assert names[-1] == f"step-{step - 1:06d}" and not run.adapter_dir.exists()
    assert len(run.metrics_path.read_text().splitlines()) == step - 1
    tensors = load_file(run.checkpoints_dir / names[-1] / "adapter.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
    with pytest.raises(CheckFailed, match=f"the loss of step {step} is nan"):  # going on comes to the same
        train_stage(recipe, resume=True)


def test_a_model_that_is_broken_names_the_rows_of_the_pack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row of the first pack is at fault; more than are shown are counted."""
    monkeypatch.chdir(tmp_path)
    base = untied_base(tmp_path)
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= LARGEST / 4
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckFailed, match="loss of step 1 is nan") as caught:
        train_stage(recipe_of(tmp_path, base, batch_size=8, pack_tokens=4096))
    assert caught.value.message.count("orders.jsonl:") == 6 and "and 2 more" in caught.value.message
    assert "every row of a pack, so rather the adapter than the rows" in caught.value.message
    assert "gradient" not in caught.value.message, "none was made"
    assert "no checkpoint had been saved yet" in (caught.value.help or "")
    assert not list(Path("runs").rglob("step-*"))


def test_a_gradient_that_is_not_finite_is_never_used(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is finite, its gradient is too large for float32: an adapter scaled beyond measure."""
    monkeypatch.chdir(tmp_path)
    recipe = recipe_of(tmp_path, tiny_base)
    adapter = recipe.adapter.model_copy(update={"alpha": 4e38 / 10})
    with pytest.raises(
        CheckFailed, match=r"the norm of the gradient of step 1 is (inf|nan), its loss \d"
    ) as caught:
        train_stage(recipe.model_copy(update={"adapter": adapter}))
    assert "orders.jsonl:" in caught.value.message
    assert not Path("runs/orders/adapter").exists() and not list(Path("runs").rglob("step-*"))


def test_the_command_exits_with_5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from myna.cli import exit_code

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["myna"])
    base = untied_base(tmp_path)
    plant(base, "«»")
    recipe_of(tmp_path, base)
    assert exit_code(["train", "recipe.yaml"]) == 5
