"""Pickles and modules that lie in folders which Myna reads are never opened; where nothing else is there, that is said."""

from __future__ import annotations

import importlib.util
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import traps
from conftest import Command
from tiny_adapters import lora, write_adapter

from myna.errors import CheckpointError, ModelError
from myna.export.lora_file import read_lora
from myna.model.folders import check_model_folder
from myna.pipeline import train_stage
from myna.recipe import load_recipe
from myna.run import Run
from myna.verify import verify_run

CHAT = ("--once", "Hello", "--max-tokens", "1")


@pytest.fixture
def sprung(tmp_path: Path) -> Path:
    """The folder that any trap would make."""
    return tmp_path / "sprung"


@pytest.fixture
def base(tmp_path: Path, tiny_base: Path, sprung: Path) -> Path:
    """A sound base that trainers and an author of code left things in."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    traps.lay(folder, sprung)
    traps.name_code(folder / "config.json")
    return folder


def written_recipe(tmp_path: Path, base: Path, **train: object) -> Path:
    rows = tiny.write_rows(tmp_path / "orders.jsonl", tiny.rows(40))
    path = tmp_path / "recipe.yaml"
    blocks = {"train": {"max_steps": 3, "save_every_steps": 1, **train}, "run": {"name": "run"}}
    path.write_text(tiny.recipe_text(base, rows, **blocks), encoding="utf-8")
    return path


RECORDED = ("adapter", "tokenizer", "merged")  # folders whose every file is known: what came to them is told


def folders_of(run: Run) -> list[Path]:
    """The run's folder and every one below it but the recorded ones."""
    return [run.path, *(p for p in sorted(run.path.rglob("*")) if p.is_dir() and p.name not in RECORDED)]


@pytest.mark.parametrize("name", traps.FILES)
def test_every_trap_springs_where_it_is_opened(name: str, tmp_path: Path, sprung: Path) -> None:
    """Else none of these tests could fail."""
    traps.lay(tmp_path, sprung, name)
    path, make = tmp_path / name, traps.FILES[name]
    assert not sprung.exists()
    if make is traps.module:
        spec = importlib.util.spec_from_file_location("trap", path)
        assert spec and spec.loader
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    elif make is traps.array:
        np.load(path, allow_pickle=True)
    elif make is traps.zipped:
        torch.load(path, weights_only=False)
    else:
        pickle.loads(path.read_bytes())
    assert sprung.is_dir()


def test_a_whole_run_in_the_midst_of_traps(
    tmp_path: Path, base: Path, sprung: Path, myna: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained, gone on with, looked at, merged, exported, talked to: in the end every folder is full of them."""
    monkeypatch.setenv("MYNA_CACHE", str(tmp_path / "cache"))
    recipe = written_recipe(tmp_path, base)
    done = myna("train", str(recipe))
    assert done.returncode == 0, done.stderr
    run = Run(tmp_path / "runs" / "run")
    for step in (
        ("train", str(recipe), "--set", "train.max_steps=5", "--resume"),
        ("verify", "run"),
        ("merge", "run"),
        ("export", "run"),
        ("evaluate", "run"),
        ("verify", "run"),
        ("chat", "run", *CHAT),
    ):
        for folder in folders_of(run):
            traps.lay(folder, sprung)
        done = myna(*step)
        assert done.returncode == 0, (step, done.stdout, done.stderr)
        assert not sprung.exists(), step
    assert (run.checkpoints_dir / "step-000005").is_dir() and (run.path / "evaluation.json").is_file()
    for folder in RECORDED:
        traps.lay(run.path / folder, sprung)
    told = {found.name for found in verify_run(run) if found.verdict == "fail"}
    assert {f"{folder}/{name}" for folder in RECORDED for name in ("x.pkl", "modeling_x.py")} <= told
    assert myna("verify", "run").returncode == 5 and not sprung.exists()


@pytest.mark.parametrize(
    "command", [("merge",), ("export", "--quantize", "Q8_0"), ("chat", *CHAT)], ids=lambda words: words[0]
)
def test_an_adapter_in_the_midst_of_traps(
    command: tuple[str, ...],
    tmp_path: Path,
    tiny_base: Path,
    sprung: Path,
    myna: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What another trainer saved, pickles of its optimizer and its arguments beside."""
    monkeypatch.setenv("MYNA_CACHE", str(tmp_path / "cache"))
    folder = write_adapter(tmp_path / "theirs", tiny_base, lora())
    traps.lay(folder, sprung)
    done = myna(command[0], str(folder), "--base", str(tiny_base), *command[1:])
    assert done.returncode == 0, done.stderr
    assert not sprung.exists()


WEIGHTS = [name for name in traps.FILES if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))]


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_base_of_pickles_alone_is_refused(name: str, tmp_path: Path, tiny_base: Path, sprung: Path) -> None:
    folder = tmp_path / "theirs"
    shutil.copytree(tiny_base, folder)
    (folder / "model.safetensors").unlink()
    traps.lay(folder, sprung, name)
    with pytest.raises(ModelError) as caught:
        check_model_folder(folder)
    assert name in caught.value.message and "safetensors" in (caught.value.help or "")
    with pytest.raises(ModelError, match="pickled"):
        train_stage(load_recipe(written_recipe(tmp_path, folder)))
    assert not sprung.exists()


def replaced(folder: Path, sprung: Path, *names: str) -> None:
    """The folder as another trainer writes it: all its tensors pickled, none in safetensors."""
    for path in folder.iterdir():
        path.unlink()
    traps.lay(folder, sprung, *names)


OTHERS_CHECKPOINT = (
    "optimizer.pt",
    "rng_state.pth",
    "training_args.bin",
    "adapter_model.bin",
    "x.npy",
    "modeling_x.py",
)


def test_a_checkpoint_of_pickles_alone_is_refused(
    tmp_path: Path, tiny_base: Path, sprung: Path, myna: Command
) -> None:
    """And named, with what would be read instead."""
    recipe = written_recipe(tmp_path, tiny_base, max_steps=1)
    assert myna("train", str(recipe)).returncode == 0
    run = Run(tmp_path / "runs" / "run")
    replaced(run.checkpoints_dir / "step-000001", sprung, *OTHERS_CHECKPOINT)
    (finding,) = [found for found in verify_run(run) if found.name == "step-000001"]
    assert finding.verdict == "fail" and "adapter_model.bin is pickled" in finding.detail
    elsewhere = tmp_path / "theirs" / "step-000005"
    shutil.copytree(run.checkpoints_dir / "step-000001", elsewhere)
    longer = load_recipe(recipe, ["train.max_steps=3"])
    with pytest.raises(CheckpointError) as caught:
        train_stage(longer, resume=True)
    assert "adapter_model.bin is pickled" in caught.value.message
    assert "safetensors" in caught.value.message
    with pytest.raises(CheckpointError) as caught:
        train_stage(longer, resume_from=elsewhere)
    assert "adapter_model.bin is pickled" in f"{caught.value.message} {caught.value.help}"
    assert not sprung.exists()


def test_an_older_checkpoint_serves_where_the_newest_is_pickles(
    tmp_path: Path, tiny_base: Path, sprung: Path, myna: Command
) -> None:
    recipe = written_recipe(tmp_path, tiny_base, max_steps=3)
    assert myna("train", str(recipe)).returncode == 0
    run = Run(tmp_path / "runs" / "run")
    replaced(run.checkpoints_dir / "step-000003", sprung, *OTHERS_CHECKPOINT)
    (run.checkpoints_dir / "step-000005").mkdir()
    replaced(run.checkpoints_dir / "step-000005", sprung, *OTHERS_CHECKPOINT)
    done = myna("train", str(recipe), "--set", "train.max_steps=4", "--resume")
    assert done.returncode == 0, done.stderr
    said = " ".join((done.stdout + done.stderr).split())
    assert "step-000005 is damaged" in said and "adapter_model.bin is pickled" in said
    assert (run.checkpoints_dir / "step-000004").is_dir() and not sprung.exists()


@pytest.mark.parametrize("command", [("merge", "run"), ("chat", "run", *CHAT)], ids=lambda words: words[0])
def test_a_run_whose_adapter_is_a_pickle_is_refused(
    command: tuple[str, ...], tmp_path: Path, tiny_base: Path, sprung: Path, myna: Command
) -> None:
    """By the digests that the run keeps: the cure is the file that was there."""
    recipe = written_recipe(tmp_path, tiny_base, max_steps=1)
    assert myna("train", str(recipe)).returncode == 0
    adapter = tmp_path / "runs" / "run" / "adapter"
    (adapter / "adapter_model.safetensors").unlink()
    traps.lay(adapter, sprung, "adapter_model.bin")
    done = myna(*command)
    said = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == 2 and "Traceback" not in said
    assert "adapter/adapter_model.bin was not there" in said and "put back what was there" in said
    assert not sprung.exists()


def test_the_reader_of_adapters_names_the_pickle_and_the_cure(
    tmp_path: Path, tiny_base: Path, sprung: Path
) -> None:
    folder = write_adapter(tmp_path / "theirs", tiny_base, lora())
    (folder / "adapter_model.safetensors").unlink()
    traps.lay(folder, sprung, "adapter_model.bin")
    with pytest.raises(ModelError) as caught:
        read_lora(folder)
    assert ".bin" in caught.value.message and "safetensors" in (caught.value.help or "")
    assert not sprung.exists()
