"""One run, many ways: kernels, int8, checkpointing, the reference path. Rounding apart they are one; each is repeatable."""

from __future__ import annotations

import gc
import json
import signal
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import tiny
import torch

import myna.engine.step
import myna.ready
from myna.checkpoint import MANIFEST, list_checkpoints
from myna.engine.compiler import NotNative
from myna.engine.memory import collector_at_rest
from myna.engine.step import ROUND_TOKENS, best_kernels
from myna.errors import Interrupted, MachineError, RecipeError
from myna.metrics import StepReport
from myna.pipeline import train_stage
from myna.plan import read_plan
from myna.prepare import prepare
from myna.recipe import Recipe, load_recipe
from myna.run import Run, write_json
from myna.show import Show
from myna.stored import run_of
from myna.train import train

has_native = best_kernels("cpu", "fp32")[0] == "native"
KERNELS = [
    pytest.param("native", marks=pytest.mark.skipif(not has_native, reason="no C kernels here")),
    "torch",
]


@pytest.fixture
def recipe(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.chdir(tmp_path)
    rows = tiny.write_rows(tmp_path / "orders.jsonl", tiny.rows(40))
    path = tmp_path / "recipe.yaml"
    settings = {"max_steps": 4, "save_every_steps": 9}
    path.write_text(tiny.recipe_text(tiny_base, rows, train=settings))
    return load_recipe(path)


def with_settings(recipe: Recipe, name: str, **blocks: dict[str, object]) -> Recipe:
    update = {block: getattr(recipe, block).model_copy(update=settings) for block, settings in blocks.items()}
    update["run"] = recipe.run.model_copy(update={"name": name})
    return recipe.model_copy(update=update)


def trained(recipe: Recipe, said: list[str] | None = None) -> tuple[Run, list[float]]:
    reports: list[StepReport] = []
    say = (said if said is not None else []).append
    run = train_stage(recipe, show=Show(step=reports.append, say=say))
    return run, [report.loss for report in reports]


def adapter_bytes(run: Run) -> bytes:
    return (run.adapter_dir / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_the_same_recipe_twice_is_the_same_bytes(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, kernels: str, dtype: str
) -> None:
    monkeypatch.setenv("MYNA_KERNELS", kernels)
    first, second = (trained(with_settings(recipe, name, model={"dtype": dtype}))[0] for name in "ab")
    assert read_plan(first.plan_path) == read_plan(second.plan_path)
    assert read_plan(first.plan_path).kernels == kernels
    assert adapter_bytes(first) == adapter_bytes(second)


@pytest.mark.skipif(not has_native, reason="no C kernels here")
def test_kernels_differ_by_rounding_alone(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = []
    for kernels in ("native", "torch"):
        monkeypatch.setenv("MYNA_KERNELS", kernels)
        losses.append(trained(with_settings(recipe, kernels))[1])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


WAYS: dict[str, tuple[dict[str, dict[str, object]], float]] = {
    "unpacked": ({"train": {"packed": False}}, 1e-4),
    "unpacked, layers again": ({"train": {"packed": False, "gradient_checkpointing": "all"}}, 1e-4),
    "layers again": ({"train": {"gradient_checkpointing": "all"}}, 1e-4),
    "two layers again": ({"train": {"gradient_checkpointing": 2}}, 1e-4),
    "layers again, inputs on disk": (
        {"train": {"gradient_checkpointing": "all", "checkpoint_to": "disk"}},
        1e-4,
    ),
    "int8": ({"model": {"quantize": "int8"}}, 0.03),
}


SLOW_WAYS = ("unpacked, layers again", "two layers again")


@pytest.mark.slow
@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[pytest.mark.slow] * (way in SLOW_WAYS)) for way in WAYS]
)
def test_every_way_is_the_same_run(recipe: Recipe, way: str) -> None:
    blocks, bound = WAYS[way]
    said: list[str] = []
    run, losses = trained(with_settings(recipe, "other", **blocks), said)
    _, plain = trained(with_settings(recipe, "plain"))
    assert losses == pytest.approx(plain, rel=bound)
    assert way != "int8" or losses != plain
    told = " ".join(said)
    assert ("train.packed is false" in told) == ("unpacked" in way)
    assert ("gradient checkpointing: every" in told) == ("again" in way)
    assert ("inputs on disk" in told) == ("disk" in way)
    assert ("the frozen base is kept" in told) == (way == "int8")
    line = json.loads(run.metrics_path.read_text().splitlines()[0])
    assert (line["share_of_peak"] is None) == ("unpacked" in way)


def stopping_after(step: int) -> Iterator[int | None]:
    yield from [None] * (step - 1)
    while True:
        yield signal.SIGTERM


@pytest.mark.parametrize(
    ("quantize", "packed", "integers"),
    [
        ("int8", True, True),
        ("int8", True, False),
        pytest.param("none", False, True, marks=pytest.mark.slow),
    ],
)
def test_stopped_and_resumed_is_not_stopped(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, quantize: str, packed: bool, integers: bool
) -> None:
    """An int8 base on a CPU that is fast at integers and on one that is not, even where it is resumed on the other."""
    monkeypatch.setattr("myna.plan.fast_in_int8", lambda: integers)
    settings: dict[str, dict[str, object]] = {"model": {"quantize": quantize}, "train": {"packed": packed}}
    straight, _ = trained(with_settings(recipe, "straight", **settings))
    stopped = with_settings(recipe, "stopped", **settings)
    asked = stopping_after(2)
    with pytest.raises(Interrupted):
        list(train(prepare(stopped, run_of(stopped), print), print, lambda: next(asked)))
    monkeypatch.setattr("myna.plan.fast_in_int8", lambda: not integers)
    run = train_stage(stopped, resume=True)
    assert read_plan(run.plan_path).int8_products == ("int8" if integers else "fp32")
    assert adapter_bytes(run) == adapter_bytes(straight)


def test_int8_is_multiplied_as_the_plan_says(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """In integers or in float32: nearly the same losses, other bytes, and never a product of the other kind."""
    asked: list[bool] = []
    measured: list[str] = []
    honest = torch._int_mm

    def counted(*given: torch.Tensor) -> torch.Tensor:
        asked.append(True)
        return honest(*given)

    def peak(dtype: str, threads: int, device: str) -> float:
        measured.append(dtype)
        return 1e9

    monkeypatch.setattr(torch, "_int_mm", counted)
    monkeypatch.setattr("myna.ready._measured_peak", peak)
    found: list[tuple[bytes, list[float]]] = []
    for integers, name in ((True, "integers"), (False, "widened")):
        monkeypatch.setattr("myna.plan.fast_in_int8", lambda fast=integers: fast)
        asked.clear()
        said: list[str] = []
        run, losses = trained(with_settings(recipe, name, model={"quantize": "int8", "dtype": "bf16"}), said)
        found.append((adapter_bytes(run), losses))
        assert bool(asked) == integers
        assert ("multiplied as int8" in " ".join(said)) == integers
        assert ("kept as int8 and multiplied in fp32" in " ".join(said)) == (not integers)
    assert measured == ["int8", "fp32"]  # what its share of the peak is of
    assert found[0][1] == pytest.approx(found[1][1], rel=0.03) and found[0][0] != found[1][0]


def interrupted(recipe: Recipe) -> Run:
    asked, run = stopping_after(2), run_of(recipe)
    with pytest.raises(Interrupted):
        list(train(prepare(recipe, run, print), print, lambda: next(asked)))
    return run


def as_of_before(run: Run) -> None:
    """The manifests of its checkpoints as they were when they did not say what they are of."""
    for path in list_checkpoints(run.checkpoints_dir):
        manifest = json.loads((path / MANIFEST).read_text())
        write_json(path / MANIFEST, {key: manifest[key] for key in ("made", "files")})


def planned_otherwise(run: Run, **changes: object) -> None:
    as_of_before(run)
    write_json(run.plan_path, asdict(replace(read_plan(run.plan_path), **changes)))  # type: ignore[arg-type]
    run.record([run.plan_path])


def test_a_resume_obeys_the_plan(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the plan says is done, whatever this machine would choose now."""
    monkeypatch.setenv("MYNA_KERNELS", "torch")
    run = interrupted(recipe)
    monkeypatch.delenv("MYNA_KERNELS")
    planned_otherwise(run, checkpoint_layers=2, round_tokens=32, head_tokens=7, threads=1)
    seen: dict[str, object] = {}
    honest = myna.engine.step.make_stepper

    def watched(*arguments: object, **settings: object) -> object:
        seen.update(settings)
        return honest(*arguments, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr("myna.ready.make_stepper", watched)
    train_stage(recipe, resume=True)
    assert (seen["checkpoint_layers"], seen["round_tokens"], seen["head_tokens"]) == (2, 32, 7)
    assert getattr(seen["kernels"], "name", None) == "torch"


def test_planned_kernels_that_are_gone_end_a_resume(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MYNA_KERNELS", "torch")
    run = interrupted(recipe)
    planned_otherwise(run, kernels="native", kernels_reason="")

    def no_compiler(*_: object) -> None:
        raise NotNative("there is no C compiler")

    monkeypatch.setattr(myna.engine.step, "load_native", no_compiler)
    with pytest.raises(MachineError, match="begun with C kernels") as caught:
        train_stage(recipe, resume=True)
    assert "install a C compiler" in (caught.value.help or "")
    assert not run.adapter_dir.exists()


def test_a_plan_that_was_changed_by_hand_is_refused_entry_by_entry(recipe: Recipe) -> None:
    run = interrupted(recipe)
    plan = read_plan(run.plan_path)
    write_json(run.plan_path, asdict(replace(plan, threads=plan.threads + 1, pack_tokens=64)))
    with pytest.raises(RecipeError) as caught:
        train_stage(recipe, resume=True)
    assert f"plan.json: threads: {plan.threads} → {plan.threads + 1}" in caught.value.message
    assert "plan.json: pack_tokens: 1024 → 64" in caught.value.message and caught.value.exit_code == 2
    train_stage(recipe, resume=True, force=True)


def test_a_run_of_before_goes_on_with_torchs_kernels(recipe: Recipe) -> None:
    run = interrupted(recipe)
    as_of_before(run)
    new = (
        "kernels",
        "kernels_reason",
        "quantize",
        "int8_products",
        "checkpoint_layers",
        "round_tokens",
        "head_tokens",
    )
    plan = json.loads(run.plan_path.read_text())
    write_json(
        run.plan_path, {k: v for k, v in plan.items() if k not in (*new, "memory_mb", "total_memory_mb")}
    )
    run.record([run.plan_path])
    said: list[str] = []
    train_stage(recipe, resume=True, show=Show(say=said.append))
    assert any("torch's (the run began before there were C kernels)" in sentence for sentence in said)


@pytest.mark.parametrize("was_on", [True, False])
def test_the_collector_is_put_back(was_on: bool) -> None:
    honest = gc.isenabled()
    try:
        gc.enable() if was_on else gc.disable()
        with pytest.raises(ZeroDivisionError), collector_at_rest():
            assert not gc.isenabled() and gc.get_freeze_count()
            raise ZeroDivisionError
        assert gc.isenabled() == was_on and not gc.get_freeze_count()
    finally:
        gc.enable() if honest else gc.disable()


def test_a_disk_without_room_for_the_inputs_is_refused_first(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 rows of 48 tokens, two layers of width 64 in float32: 98 kB, asked for before a step."""
    asked: list[tuple[int, str]] = []
    honest = myna.ready.require_room

    def watched(path: Path, num_bytes: int, what: str) -> None:
        asked.append((num_bytes, what))
        honest(path, 10**18 if "inputs" in what else num_bytes, what)

    monkeypatch.setattr(myna.ready, "require_room", watched)
    settings = {"gradient_checkpointing": "all", "checkpoint_to": "disk"}
    full = with_settings(recipe, "full", train=settings)
    with pytest.raises(
        MachineError, match=r"no room for the inputs of layers \(train\.checkpoint_to: disk\)"
    ):
        train_stage(full)
    tokens = -(-4 * 48 // ROUND_TOKENS) * ROUND_TOKENS
    assert [number for number, what in asked if "inputs" in what] == [2 * tokens * 64 * 4]
    assert not run_of(full).metrics_path.exists()
