"""Training a tiny model: it learns, twice the same bytes, and whatever stops it, it goes on bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny

from myna.errors import DataError, Interrupted, RecipeError, UsageError
from myna.metrics import METRICS, StepReport
from myna.pipeline import train_stage
from myna.prepare import prepare
from myna.recipe import Recipe, load_recipe
from myna.run import Run
from myna.show import Show
from myna.stored import run_of
from myna.train import train

ROOT = Path(__file__).parent.parent


@pytest.fixture
def recipe(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.chdir(tmp_path)
    rows = tiny.write_rows(tmp_path / "orders.jsonl", tiny.rows(40))
    path = tmp_path / "recipe.yaml"
    path.write_text(tiny.recipe_text(tiny_base, rows))
    return load_recipe(path)


def changed(recipe: Recipe, block: str, **settings: object) -> Recipe:
    return recipe.model_copy(update={block: getattr(recipe, block).model_copy(update=settings)})


def named(recipe: Recipe, name: str) -> Recipe:
    return changed(recipe, "run", name=name)


def adapter_bytes(run: Run) -> bytes:
    return (run.adapter_dir / "adapter_model.safetensors").read_bytes()


def test_it_learns_and_says_what_it_did(recipe: Recipe) -> None:
    reports: list[StepReport] = []
    said: list[str] = []
    run = train_stage(changed(recipe, "train", epochs=3), show=Show(step=reports.append, say=said.append))
    assert run.path == Path("runs/orders")
    assert [report.step for report in reports] == list(range(1, 28))  # 36 rows, 4 a step, 3 epochs
    assert sum(r.loss for r in reports[-5:]) < 0.7 * sum(r.loss for r in reports[:5])
    lines = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 28))
    assert tuple(lines[0]) == METRICS
    for line, report in zip(lines, reports, strict=True):
        assert line["tokens_per_s"] == pytest.approx(line["tokens"] / line["seconds"], rel=0.01)
        assert line["target_tokens_per_s"] < line["tokens_per_s"] and line["num_packs"] == 1
        assert 0 < line["memory_mb"] <= 1.05 * line["peak_mb"]
        assert report.peak_flops is not None and 0 < line["share_of_peak"] < 1
        assert line["share_of_peak"] == pytest.approx(
            line["product_flops"] / line["seconds"] / report.peak_flops, rel=0.01, abs=1e-4
        )
    assert {"run.json", "recipe.yaml", "plan.json", "rows", "tokenizer", "adapter", "checkpoints"} <= {
        path.name for path in run.path.iterdir()
    }
    assert len(run.test_path.read_text().splitlines()) == 4
    assert "fast path" in " ".join(said)


def test_the_same_recipe_twice_gives_the_same_bytes(recipe: Recipe) -> None:
    first, second = (train_stage(named(recipe, name)) for name in ("a", "b"))
    assert adapter_bytes(first) == adapter_bytes(second)
    other = train_stage(changed(named(recipe, "c"), "train", seed=43))
    assert adapter_bytes(other) != adapter_bytes(first)


def test_micro_batches_are_the_same_run(recipe: Recipe) -> None:
    """One pack of four rows, or four packs of one row: the loss is normalised over the whole step."""
    losses = []
    for name, pack_tokens in (("a", 1024), ("b", 1)):
        reports: list[StepReport] = []
        train_stage(
            changed(named(recipe, name), "train", pack_tokens=pack_tokens), show=Show(step=reports.append)
        )
        losses.append([report.loss for report in reports])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def stopping_after(step: int, number: int) -> Iterator[int | None]:
    yield from [None] * (step - 1)
    while True:
        yield number


def test_stopped_and_resumed_is_not_stopped(recipe: Recipe) -> None:
    recipe = changed(recipe, "train", epochs=2)
    straight = train_stage(named(recipe, "straight"))
    run = run_of(named(recipe, "stopped"))
    for stop in (5, 11):  # in the first epoch and in the second; checkpoints by steps are at 3, 6, 9, …
        asked = stopping_after(stop - _last_step(run), signal.SIGTERM)
        with pytest.raises(Interrupted) as caught:
            list(train(prepare(named(recipe, "stopped"), run, print), print, lambda asked=asked: next(asked)))
        assert caught.value.signal_number == signal.SIGTERM
        assert _last_step(run) == stop
    assert train_stage(named(recipe, "stopped"), resume=True).path == run.path
    assert adapter_bytes(run) == adapter_bytes(straight)
    assert _losses(run) == _losses(straight)


def _last_step(run: Run) -> int:
    names = sorted(path.name for path in run.checkpoints_dir.glob("step-*"))
    return int(names[-1].split("-")[1]) if names else 0


def _losses(run: Run) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in run.metrics_path.read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


STOPS = [
    (signal.SIGTERM, 143),
    (signal.SIGKILL, -9),
    pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
    pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow),
]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), STOPS)
def test_a_process_that_is_stopped_goes_on(recipe: Recipe, tmp_path: Path, number: int, code: int) -> None:
    arguments = ["train", "recipe.yaml", "--set", "train.epochs=4", "--set", "train.save_every_steps=2"]
    command = [sys.executable, "-m", "myna.cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "runs/orders/checkpoints/step-000004").is_dir():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait(timeout=30) == code
    longer = changed(recipe, "train", epochs=4, save_every_steps=2)
    run = train_stage(longer, resume=True)
    straight = train_stage(named(longer, "straight"))
    assert adapter_bytes(run) == adapter_bytes(straight)


def test_no_step_is_missing_from_the_metrics_after_a_kill_in_a_save(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies right after the checkpoint has its name, before anything else is done."""
    import myna.saver

    honest = myna.saver.save_checkpoint

    def dies(*arguments: object) -> None:
        honest(*arguments)  # type: ignore[arg-type]
        raise SystemExit

    run = run_of(recipe)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(myna.saver, "save_checkpoint", dies)
        list(train(prepare(recipe, run, print), print))
    train_stage(recipe, resume=True)
    assert [step for step, _ in _losses(run)] == list(range(1, 10))


def test_a_run_that_exists_is_not_overwritten(recipe: Recipe, tmp_path: Path) -> None:
    run = train_stage(recipe)
    before = adapter_bytes(run)
    with pytest.raises(UsageError) as caught:
        train_stage(recipe)
    assert "--resume" in (caught.value.help or "") and "run.name" in (caught.value.help or "")
    said: list[str] = []
    train_stage(recipe, resume=True, show=Show(say=said.append))
    assert "trained already" in said[-1]
    assert adapter_bytes(run) == before
    (tmp_path / "runs/mine").mkdir()
    (tmp_path / "runs/mine/thesis.tex").write_text("x")
    with pytest.raises(UsageError, match="is no run and is not empty"):
        train_stage(named(recipe, "mine"))


def test_a_changed_run_is_not_resumed(recipe: Recipe, tmp_path: Path) -> None:
    train_stage(recipe)
    with pytest.raises(RecipeError) as caught:
        train_stage(changed(recipe, "adapter", r=8), resume=True)
    assert "adapter.r: 4 → 8" in str(caught.value) and caught.value.exit_code == 2
    train_stage(changed(recipe, "evaluate", max_rows=3), resume=True)
    tiny.write_rows(tmp_path / "orders.jsonl", tiny.rows(40, start=1))
    with pytest.raises(RecipeError, match=r"data\.train changed"):
        train_stage(recipe, resume=True)


def test_rows_too_long_are_refused_unless_asked_for(recipe: Recipe) -> None:
    with pytest.raises(DataError, match=r"36 of 36 rows are longer than 40 tokens") as caught:
        train_stage(changed(recipe, "data", max_length=40))
    assert "data.cut_long=true" in (caught.value.help or "")
    assert not Path("runs/orders").exists()
    said: list[str] = []
    train_stage(changed(recipe, "data", max_length=40, cut_long=True), show=Show(say=said.append))
    assert any("36 cut" in sentence for sentence in said)
    with pytest.raises(DataError, match="wholly masked"):
        train_stage(named(changed(recipe, "data", max_length=9, cut_long=True), "masked"))


def test_rows_that_stand_in_the_test_file_are_left_out(recipe: Recipe, tmp_path: Path) -> None:
    test = tiny.write_rows(tmp_path / "test.jsonl", tiny.rows(10, start=35))
    said: list[str] = []
    run = train_stage(changed(recipe, "data", test=str(test)), show=Show(say=said.append))
    assert any(sentence.startswith("5 training rows were left out") for sentence in said)
    assert json.loads(run.plan_path.read_text())["num_rows"] == 35


def test_target_modules_that_are_not_there_are_named(recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match="fits no layer") as caught:
        train_stage(changed(recipe, "adapter", target_modules=["query"]))
    assert "q_proj" in (caught.value.help or "")


def test_a_refused_new_run_leaves_nothing_and_can_be_started_again(recipe: Recipe) -> None:
    for wrong in (["q_proj", "lm_head"], ["nope"]):
        with pytest.raises(RecipeError, match="target_modules"):
            train_stage(changed(recipe, "adapter", target_modules=wrong))
        assert not Path("runs/orders").exists()
    train_stage(recipe)


@pytest.mark.parametrize("name", ["..", "../x", "x/../.."])
def test_a_run_stays_where_its_name_says(recipe: Recipe, name: str) -> None:
    with pytest.raises(UsageError, match=r"a run\.name has no \.\."):
        train_stage(named(recipe, name))


def test_a_folder_that_cannot_be_made_is_told(recipe: Recipe) -> None:
    Path("runs").write_text("a file")
    with pytest.raises(UsageError, match="is a file"):
        train_stage(recipe)


def test_a_base_that_changed_after_training_is_not_merged(recipe: Recipe, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from myna.export.stage import merge_stage

    base = tiny.write_base(tmp_path / "own")
    run = train_stage(changed(recipe, "model", base=str(base)))
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] *= 3
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match="not those the run was made with"):
        merge_stage(run)


def test_a_base_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from myna.errors import ModelError
    from myna.model.load import load_base

    base = tiny.write_base(tmp_path / "own")
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.0.mlp.down_proj.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="1 of its weights are not in the files"):
        load_base(base, "fp32")


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    from myna.signals import catch_signals

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with catch_signals() as stop_asked:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop_asked() is None
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop_asked() == signal.SIGTERM
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_refused_second_process_takes_no_lock_away(recipe: Recipe) -> None:
    from myna.lock import lock_run

    run = run_of(recipe)
    with lock_run(run):
        with pytest.raises(UsageError, match="another process"):
            train_stage(recipe)
        assert (run.path / ".lock").is_file()


def test_files_of_somebody_else_are_not_taken_for_a_run(recipe: Recipe) -> None:
    Path("mine").mkdir()
    Path("mine/recipe.yaml").write_text("precious")
    for resume in (False, True):
        with pytest.raises(UsageError, match="is no run and is not empty"):
            train_stage(named(recipe, "./mine"), resume=resume)
    assert Path("mine/recipe.yaml").read_text() == "precious"
