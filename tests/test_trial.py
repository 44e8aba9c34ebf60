"""The longest pack tried first: which one that is, that nothing of the run changes, what is said where it does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from exactness import example

import myna.pipeline
import myna.ready
import myna.steps
from myna.data.packing import Batch, collate
from myna.engine.step import FastStepper, ReferenceStepper
from myna.errors import Interrupted, MachineError
from myna.pipeline import train_stage
from myna.recipe import Recipe, load_recipe
from myna.run import Run
from myna.show import Show
from myna.stored import run_of
from myna.trial import FEWEST_STEPS, largest_pack, room_required

WAYS: dict[str, dict[str, dict[str, Any]]] = {
    "fast": {},
    "dropout": {"adapter": {"dropout": 0.2}},
    "reference": {"train": {"packed": False}, "adapter": {"dropout": 0.2}},  # draws from torch's own state
}


def a_recipe(folder: Path, base: Path, name: str, **blocks: dict[str, Any]) -> Recipe:
    rows = tiny.write_rows(folder / "orders.jsonl", tiny.rows(40))
    train = {"epochs": 3, "save_every_steps": 100, **blocks.pop("train", {})}
    path = folder / "recipe.yaml"
    path.write_text(tiny.recipe_text(base, rows, run={"name": name}, train=train, **blocks))
    return load_recipe(path)


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The packs that are tried, each as its rows' lengths."""
    seen: list[list[int]] = []
    whole = myna.ready.try_pack

    def noted(batch: Any, *others: Any) -> None:
        seen.append(list(batch.lengths))
        whole(batch, *others)

    monkeypatch.setattr(myna.ready, "try_pack", noted)
    return seen


def trained(recipe: Recipe, **settings: Any) -> tuple[Run, list[str], bytes]:
    said: list[str] = []
    run = train_stage(recipe, show=Show(say=said.append), **settings)
    return run, said, (run.adapter_dir / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_run_is_the_same_bytes_with_and_without_it(
    tmp_path: Path,
    tiny_base: Path,
    monkeypatch: pytest.MonkeyPatch,
    tried: list[list[int]],
    way: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    _, said, found = trained(a_recipe(tmp_path, tiny_base, "with", **WAYS[way]))
    assert len(tried) == 1
    assert any("the longest pack fits" in line and "were estimated" in line for line in said)
    monkeypatch.setattr(myna.ready, "FEWEST_STEPS", 1000)
    _, said, without = trained(a_recipe(tmp_path, tiny_base, "without", **WAYS[way]))
    assert len(tried) == 1 and not any("longest pack" in line for line in said)
    assert found == without


@pytest.mark.slow
def test_a_short_run_tries_nothing_and_a_resumed_one_what_is_to_come(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, tried: list[list[int]]
) -> None:
    monkeypatch.chdir(tmp_path)
    trained(a_recipe(tmp_path, tiny_base, "short", train={"max_steps": FEWEST_STEPS - 1}))
    assert not tried
    recipe = a_recipe(tmp_path, tiny_base, "stopped")
    numbers = iter([None] * 3 + [2] * 100)
    with monkeypatch.context() as patch:
        stopping = myna.pipeline.catch_signals

        class Stopping:
            def __enter__(self) -> Any:
                self.inner = stopping()
                self.inner.__enter__()
                return lambda: next(numbers)

            def __exit__(self, *found: Any) -> None:
                self.inner.__exit__(*found)

        patch.setattr(myna.pipeline, "catch_signals", Stopping)
        with pytest.raises(Interrupted):
            train_stage(recipe)
    of_all: list[list[int]] = []
    largest = myna.steps.largest_pack

    def noted(packs: Any, lay: Any, **settings: Any) -> Batch:
        packs = list(packs)
        of_all.append([step for step, _ in packs])
        found = largest(packs, lay, **settings)
        assert len(found.input_ids_T) == max(len(lay(*numbered).input_ids_T) for numbered in packs)
        return found

    monkeypatch.setattr(myna.steps, "largest_pack", noted)
    trained(recipe, resume=True)
    assert len(tried) == 2 and min(of_all[0]) == 5, "the packs of the steps to come"


def test_the_longest_pack_is_the_one_that_takes_the_most() -> None:
    shared = [example(list(range(3, 63)) + [70 + n] * 4) for n in range(4)]  # 256 tokens, 76 of them once
    plain = [example([100 + n] + [n + 1] * 59) for n in range(3)]  # 180, all their own
    ragged = [example([5] * 100), example([6] * 3), example([7] * 3)]  # 106; padded, 300
    packs = list(enumerate([plain[:1], shared, plain, ragged]))

    def lay(_: int, pack: Any) -> Batch:
        return collate(pack, share=True)

    assert len(largest_pack(packs, lay, fast=True).input_ids_T) == 180
    assert len(largest_pack([*[packs[1]] * 9, packs[2]], lay, fast=True).input_ids_T) == 180
    assert largest_pack(packs[2:], lambda _, pack: collate(pack), fast=False).lengths == (100, 3, 3)


def raises(error: Exception) -> Any:
    def loss(*_: Any, **__: Any) -> torch.Tensor:
        raise error

    return loss


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("std::bad_alloc"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("std::bad_alloc"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[Errno 12] Cannot allocate memory"),
    ],
    ids=["python", "cpu", "gpu", "c++", "cublas", "system"],
)
@pytest.mark.parametrize(("way", "stepper"), [("fast", FastStepper), ("reference", ReferenceStepper)])
def test_a_pack_that_does_not_fit_ends_the_run_before_it_begins(
    tmp_path: Path,
    tiny_base: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    way: str,
    stepper: type,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stepper, "loss", raises(error))
    recipe = a_recipe(tmp_path, tiny_base, "large", **WAYS[way])
    with pytest.raises(MachineError, match="does not fit into memory") as caught:
        train_stage(recipe)
    assert (caught.value.exit_code, caught.value.code) == (4, "memory")
    assert caught.value.help is not None
    assert "train.pack_tokens=512" in caught.value.help
    assert "train.gradient_checkpointing=all" in caught.value.help
    assert ("model.quantize=int8" in caught.value.help) == (way == "fast")
    assert not run_of(recipe).path.exists()  # the corrected recipe may have the same name


def test_memory_that_ends_while_the_run_is_set_up_is_the_same_error(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(myna.ready, "make_stepper", raises(RuntimeError("can't allocate memory")))
    with pytest.raises(MachineError, match="does not fit into memory") as caught:
        train_stage(a_recipe(tmp_path, tiny_base, "large"))
    assert caught.value.code == "memory"


def test_another_error_stays_what_it_is() -> None:
    from test_plan import plan

    with pytest.raises(RuntimeError, match="shapes"), room_required(plan()):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
