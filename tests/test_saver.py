"""When a run saves, what stays, and that a full disk ends it only after three times, with the last good checkpoint whole."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

import myna.saver
from myna.checkpoint import list_checkpoints, read_snapshot, verify_checkpoint
from myna.errors import CheckpointError, MachineError, RecipeError
from myna.metrics import MetricsLog, StepReport, cut_metrics, last_line, read_lines
from myna.pipeline import train_stage
from myna.recipe import Recipe, load_recipe
from myna.run import Run
from myna.show import Show
from myna.stored import run_of


@pytest.fixture
def recipe(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Nine steps, a checkpoint every third."""
    monkeypatch.chdir(tmp_path)
    rows = tiny.write_rows(tmp_path / "orders.jsonl", tiny.rows(40))
    path = tmp_path / "recipe.yaml"
    path.write_text(tiny.recipe_text(tiny_base, rows))
    return load_recipe(path)


def changed(recipe: Recipe, block: str, **settings: object) -> Recipe:
    return recipe.model_copy(update={block: getattr(recipe, block).model_copy(update=settings)})


def steps_of(run: Run) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in list_checkpoints(run.checkpoints_dir)]


def adapter_bytes(run: Run) -> bytes:
    return (run.adapter_dir / "adapter_model.safetensors").read_bytes()


def trained(
    recipe: Recipe, *, resume: bool = False, step: Callable[[StepReport], Any] | None = None
) -> tuple[Run, list[str]]:
    said: list[str] = []
    run = train_stage(recipe, resume=resume, show=Show(say=said.append, step=step or (lambda _: None)))
    return run, said


def test_it_saves_by_minutes_too(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock goes two minutes a step: of five minutes the third step is the first after."""
    clock = [0.0]
    monkeypatch.setattr(myna.saver.time, "monotonic", lambda: clock[0])
    recipe = changed(changed(recipe, "train", save_every_steps=100), "checkpoint", every_minutes=5.0)
    saved: list[int] = []

    def note(report: StepReport) -> None:
        clock[0] += 120
        if report.checkpoint:
            saved.append(report.step)

    trained(recipe, step=note)
    assert saved == [4, 7, 9]


def test_it_saves_where_a_file_asks_for_it_once(recipe: Recipe) -> None:
    run, saved = run_of(recipe), list[int]()

    def ask(report: StepReport) -> None:
        if report.checkpoint:
            saved.append(report.step)
            assert not run.asked_path.exists()
        if report.step in (1, 3):
            run.asked_path.touch()

    trained(changed(recipe, "train", keep_checkpoints=9), step=ask)
    assert saved == [2, 3, 4, 6, 9] and steps_of(run) == saved


@pytest.fixture
def validated(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Fourteen steps, each saved; the validation loss falls to step 6 and rises again."""
    losses = iter([abs(step - 6) + 0.5 for step in range(1, 15)] * 2)
    monkeypatch.setattr("myna.train.validation_loss", lambda *_: next(losses))
    recipe = changed(recipe, "data", validation_fraction=0.2)
    return changed(recipe, "train", save_every_steps=1, keep_checkpoints=1, epochs=2)


def test_what_stays(validated: Recipe) -> None:
    """The newest, the best by validation loss, every fourth."""
    recipe = validated
    recipe = changed(recipe, "checkpoint", keep_every_steps=4)
    run, _ = trained(recipe)
    losses = {
        line["step"]: line["validation_loss"]
        for line in read_lines(run.metrics_path)
        if "validation_loss" in line
    }
    assert len(losses) == 14 and min(losses, key=losses.__getitem__) == 6
    assert steps_of(run) == [4, 6, 8, 12, 14]
    stage = run.stage("train")
    assert stage is not None and (stage["best_step"], stage["best_validation_loss"]) == (6, 0.5)


def test_a_best_that_could_not_be_saved_is_none(validated: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = FullDisk(monkeypatch)

    def fill(report: StepReport) -> None:
        disk.is_full = report.step == 5

    run, _ = trained(validated, step=fill)
    stage = run.stage("train")
    assert stage is not None and stage["best_step"] == 5 and steps_of(run) == [5, 14]


def test_the_adapter_is_that_of_the_best_where_the_recipe_says_so(validated: Recipe) -> None:
    recipe = validated
    last, _ = trained(changed(recipe, "run", name="last"))
    run, said = trained(changed(recipe, "checkpoint", adapter="best"))
    assert "the adapter is that of step 6" in said[-1]
    assert adapter_bytes(run) != adapter_bytes(last)
    from safetensors.torch import load_file

    best = read_snapshot(run.checkpoints_dir / "step-000006").states["adapter"].tensors
    written = load_file(run.adapter_dir / "adapter_model.safetensors")
    values = sorted(float(tensor.double().sum()) for tensor in written.values())
    assert values == sorted(float(tensor.double().sum()) for tensor in best.values())


def test_a_best_that_was_damaged_since_is_not_taken(validated: Recipe) -> None:
    recipe = changed(validated, "checkpoint", adapter="best")

    def damage(report: StepReport) -> None:
        if report.step == 13:
            for path in list_checkpoints(run_of(recipe).checkpoints_dir):
                (path / "adapter.safetensors").write_bytes(b"")

    with pytest.raises(CheckpointError, match="which has the best validation loss, is damaged"):
        trained(recipe, step=damage)
    run, _ = trained(changed(recipe, "checkpoint", adapter="last"), resume=True)
    assert run.adapter_dir.is_dir()


@pytest.mark.parametrize(
    "settings", [{}, {"data": {"validation_fraction": 0.2}, "checkpoint": {"keep_best": False}}]
)
def test_the_best_needs_what_tells_it(recipe: Recipe, settings: dict[str, dict[str, object]]) -> None:
    for block, values in settings.items():
        recipe = changed(recipe, block, **values)
    with pytest.raises(RecipeError, match=r"checkpoint\.adapter: best") as caught:
        trained(changed(recipe, "checkpoint", adapter="best"))
    assert caught.value.exit_code == 2 and not run_of(recipe).path.exists()


class FullDisk:
    """Files written while `is_full` find no room; what is written through safetensors too."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_full = False
        honest = os.fsync

        def fsync(descriptor: int) -> None:
            if self.is_full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            honest(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)


def test_a_full_disk_is_said_and_training_goes_on(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two saves in a row fail, the third finds room: the run is that of a disk that was never full."""
    recipe = changed(recipe, "train", epochs=2, keep_checkpoints=9)
    straight, _ = trained(changed(recipe, "run", name="straight"))
    disk = FullDisk(monkeypatch)

    def fill(report: StepReport) -> None:
        disk.is_full = 4 <= report.step < 11

    run, said = trained(recipe, step=fill)
    assert steps_of(run) == [3, 12, 15, 18]
    warned = [sentence for sentence in said if "could not be saved" in sentence]
    assert [sentence.split(" could")[0] for sentence in warned] == [
        "the checkpoint of step 6",
        "the checkpoint of step 9",
    ]
    assert "the last good checkpoint is checkpoints/step-000003" in warned[0]
    assert adapter_bytes(run) == adapter_bytes(straight)


def test_three_times_in_a_row_ends_the_run_and_it_goes_on_when_there_is_room(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = changed(recipe, "train", epochs=2)
    straight, _ = trained(changed(recipe, "run", name="straight"))
    disk = FullDisk(monkeypatch)

    def fill(report: StepReport) -> None:
        disk.is_full = report.step >= 4

    with pytest.raises(MachineError, match="after step 12 for the 3rd time in a row") as caught:
        trained(recipe, step=fill)
    run = run_of(recipe)
    assert caught.value.exit_code == 4 and "checkpoints/step-000003" in caught.value.message
    assert steps_of(run) == [3] and verify_checkpoint(run.checkpoints_dir / "step-000003") is None
    assert list(run.checkpoints_dir.glob(".*")) == []
    disk.is_full = False
    run, _ = trained(recipe, resume=True)
    assert adapter_bytes(run) == adapter_bytes(straight)
    assert [line["step"] for line in read_lines(run.metrics_path)] == list(range(1, 19))


def test_metrics_are_on_the_disk_before_the_checkpoint_that_counts_them(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        calls.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def renamed(source: Any, target: Any) -> None:
        calls.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    trained(recipe)
    named = [calls.index(f"step-{step:06d}") for step in (3, 6, 9)]
    for before, after in itertools.pairwise([0, *named]):
        assert "metrics.jsonl" in calls[before:after]


def test_the_last_chance_is_told_at_once(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = FullDisk(monkeypatch)

    def fill(report: StepReport) -> None:
        disk.is_full = report.step >= 7

    with pytest.raises(MachineError, match="no checkpoint could be saved after step 9: ") as caught:
        trained(recipe, step=fill)
    assert caught.value.code == "checkpoint" and steps_of(run_of(recipe)) == [3, 6]


def test_room_is_looked_at_before_anything_is_written(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = shutil.disk_usage
    full = [False]

    def usage(path: Any) -> Any:
        found = honest(path)
        return found._replace(free=1000) if full[0] else found

    monkeypatch.setattr(shutil, "disk_usage", usage)
    written: list[Path] = []
    save = myna.saver.save_checkpoint
    monkeypatch.setattr(
        myna.saver, "save_checkpoint", lambda folder, *rest: written.append(folder) or save(folder, *rest)
    )

    def fill(report: StepReport) -> None:
        full[0] = 3 <= report.step < 6

    _, said = trained(recipe, step=fill)
    assert len(written) == 2 and any("no room for a checkpoint" in sentence for sentence in said)


def test_a_run_with_all_its_checkpoints_needs_room_for_one_more_alone(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = changed(recipe, "train", keep_checkpoints=3, max_steps=10, epochs=2)
    run, _ = trained(changed(recipe, "train", max_steps=9))
    one = sum(file.stat().st_size for file in (run.checkpoints_dir / "step-000009").iterdir())
    honest = shutil.disk_usage
    free = 2 * one + myna.checkpoint.SMALL_FILES_BYTES
    monkeypatch.setattr(shutil, "disk_usage", lambda path: honest(path)._replace(free=free))
    trained(recipe, resume=True)


def test_lines_of_metrics_wait_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, path = MetricsLog(tmp_path / "metrics.jsonl"), tmp_path / "metrics.jsonl"
    assert log.add({"step": 1}) is None
    honest = Path.open

    def half_written(self: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        """Some bytes of a line reach the disk before it is full."""
        if mode == "ab":
            with honest(self, mode) as file:
                file.write(b'{"st')
            raise OSError(errno.ENOSPC, "No space left on device")
        return honest(self, mode, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", half_written)
        assert log.add({"step": 2}) == log.add({"step": 3}) == "No space left on device"
        with pytest.raises(MachineError):
            log.sync()
    assert log.num_bytes == len(path.read_bytes()) - 3 * len(b'{"st')
    assert log.add({"step": 4}) is None
    log.sync()
    assert path.read_text() == "".join(f'{{"step": {step}}}\n' for step in (1, 2, 3, 4))
    assert log.num_bytes == path.stat().st_size


def test_a_file_of_metrics_that_somebody_removed_is_begun_again(tmp_path: Path) -> None:
    log, path = MetricsLog(tmp_path / "metrics.jsonl"), tmp_path / "metrics.jsonl"
    log.add({"step": 1})
    path.unlink()
    log.add({"step": 2})
    assert path.read_text() == '{"step": 2}\n' and log.num_bytes == path.stat().st_size


def written(path: Path, *lines: dict[str, Any]) -> int:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path.stat().st_size


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    steps = [{"step": step, "loss": 0.1} for step in (1, 2)]
    end = written(path, *steps)
    written(path, *steps, {"step": 2, "validation_loss": 0.3}, {"step": 3, "loss": 0.1})
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # a kill
    assert cut_metrics(path, 2, end) is None
    assert read_lines(path) == steps and last_line(path) == steps[-1]
    assert cut_metrics(path, 0) is None and path.read_bytes() == b""


@pytest.mark.parametrize(
    ("lines", "end", "left"),
    [
        ([{"step": 1}], 500, [{"step": 1}]),  # shorter than it was
        ([{"step": 1}, {"step": 3}, {"step": 2}], 26, [{"step": 1}, {"step": 2}]),  # other lines
        ([{"step": 1}, {"step": 22}], 20, [{"step": 1}]),  # in the middle of one
    ],
)
def test_metrics_that_are_not_what_they_were_are_cut_by_their_steps(
    tmp_path: Path, lines: list[dict[str, Any]], end: int, left: list[dict[str, Any]]
) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, *lines)
    assert "lines may be missing" in (cut_metrics(path, 2, end) or "")
    assert read_lines(path) == left


def test_metrics_that_are_gone_are_told(tmp_path: Path) -> None:
    assert "is gone" in (cut_metrics(tmp_path / "metrics.jsonl", 5, 100) or "")
    assert cut_metrics(tmp_path / "metrics.jsonl", 0) is None
