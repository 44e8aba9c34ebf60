"""A copy of each checkpoint elsewhere, on drives that can do little, and the way back from it, on another machine too."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny

from myna.checkpoint import MANIFEST, list_checkpoints, verify_checkpoint
from myna.errors import CheckpointError, Interrupted, MachineError, MynaError, RecipeError, UsageError
from myna.metrics import read_lines
from myna.mirror import copy_checkpoint, find_taken
from myna.pipeline import train_stage
from myna.prepare import prepare
from myna.recipe import Recipe, load_recipe
from myna.run import Run, write_json
from myna.show import Show
from myna.stored import run_of
from myna.train import train


@pytest.fixture
def recipe(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Nine steps, a checkpoint every third, copied to ./drive."""
    monkeypatch.chdir(tmp_path)
    rows = tiny.write_rows(tmp_path / "orders.jsonl", tiny.rows(40))
    path = tmp_path / "recipe.yaml"
    path.write_text(tiny.recipe_text(tiny_base, rows, checkpoint={"mirror": "drive"}))
    return load_recipe(path)


def changed(recipe: Recipe, block: str, **settings: object) -> Recipe:
    return recipe.model_copy(update={block: getattr(recipe, block).model_copy(update=settings)})


def named(recipe: Recipe, name: str) -> Recipe:
    return changed(recipe, "run", name=name)


def adapter_bytes(run: Run) -> bytes:
    return (run.adapter_dir / "adapter_model.safetensors").read_bytes()


def names_in(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder)]


def stopped_after(recipe: Recipe, step: int) -> Run:
    """A run that a signal ended after so many steps."""

    def asked() -> Iterator[int | None]:
        yield from [None] * (step - 1)
        while True:
            yield signal.SIGTERM

    answers, run = asked(), run_of(recipe)
    with pytest.raises(Interrupted):
        list(train(prepare(recipe, run, print), print, lambda: next(answers)))
    return run


def trained(recipe: Recipe, **settings: Any) -> tuple[Run, list[str]]:
    said: list[str] = []
    return train_stage(recipe, show=Show(say=said.append), **settings), said


def test_a_mirror_has_what_the_run_has(recipe: Recipe, tmp_path: Path) -> None:
    run, said = trained(changed(recipe, "train", keep_checkpoints=2))
    mirror = tmp_path / "drive/orders"
    assert names_in(mirror / "checkpoints") == names_in(run.checkpoints_dir) == ["step-000006", "step-000009"]
    assert all(verify_checkpoint(path) is None for path in list_checkpoints(mirror / "checkpoints"))
    assert (mirror / "metrics.jsonl").read_bytes() == run.metrics_path.read_bytes()
    assert (mirror / "recipe.yaml").read_bytes() == run.recipe_path.read_bytes()
    assert not any("could not be copied" in sentence for sentence in said)


def test_a_run_goes_on_elsewhere_from_the_mirror_alone(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first machine is gone with all but the mirror and the rows, which lie elsewhere now; the adapter is the same."""
    straight, _ = trained(changed(named(recipe, "straight"), "checkpoint", mirror=None))
    stopped_after(recipe, 5)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.move(tmp_path / "orders.jsonl", elsewhere / "rows.jsonl")
    shutil.rmtree(tmp_path / "runs/orders")
    monkeypatch.chdir(elsewhere)
    moved = changed(named(recipe, "orders"), "data", train=str(elsewhere / "rows.jsonl"))
    run, said = trained(moved, resume_from=tmp_path / "drive")
    assert "going on after step 5" in said
    assert adapter_bytes(run) == (tmp_path / straight.path / "adapter/adapter_model.safetensors").read_bytes()
    assert [line["step"] for line in read_lines(run.metrics_path)] == list(range(1, 10))
    # the mirror is that of this run now, as its identity went with the checkpoint
    assert names_in(tmp_path / "drive/orders/checkpoints")[-1] == "step-000009"


def test_the_best_comes_along(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is older than all that the run keeps otherwise, and becomes the adapter at the end."""
    losses = iter([0.1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5])
    monkeypatch.setattr("myna.train.validation_loss", lambda *_: next(losses))
    recipe = changed(changed(recipe, "data", validation_fraction=0.2), "checkpoint", adapter="best")
    recipe = changed(recipe, "train", save_every_steps=1, keep_checkpoints=1)
    stopped_after(recipe, 5)
    assert names_in(tmp_path / "drive/orders/checkpoints") == ["step-000001", "step-000005"]
    shutil.rmtree("runs/orders")
    run, said = trained(recipe, resume_from=tmp_path / "drive")
    assert any("and step-000001, the best" in sentence for sentence in said)
    assert names_in(run.checkpoints_dir) == ["step-000001", "step-000007"]
    assert names_in(tmp_path / "drive/orders/checkpoints") == ["step-000001", "step-000007"]
    assert "the adapter is that of step 1" in said[-1]


def test_what_resume_from_may_name(recipe: Recipe, tmp_path: Path) -> None:
    stopped_after(recipe, 5)
    one = "drive/orders/checkpoints/step-000005"
    for place in ("drive", "drive/orders", "drive/orders/checkpoints", "runs/orders", one):
        taken = find_taken(tmp_path / place, "other")
        assert taken.step == 5 and taken.metrics_path is not None
    run, _ = trained(named(recipe, "other"), resume_from=tmp_path / one)
    assert run.stage("train") is not None and run.info()["id"] == Run(Path("runs/orders")).info()["id"]


def test_a_damaged_one_in_a_mirror_is_passed_over_and_not_touched(recipe: Recipe, tmp_path: Path) -> None:
    trained(recipe)
    folder = tmp_path / "drive/orders/checkpoints"
    (folder / "step-000009/adapter.safetensors").write_bytes(b"")
    taken = find_taken(tmp_path / "drive", "orders")
    assert taken.step == 6 and "step-000009 is damaged" in taken.said[0]
    assert "step-000009" in names_in(folder)
    with pytest.raises(CheckpointError, match=r"adapter\.safetensors has 0 bytes") as caught:
        find_taken(folder / "step-000009", "orders")
    assert caught.value.exit_code == 4


def refused(recipe: Recipe, place: Path, **settings: Any) -> MynaError:
    with pytest.raises(MynaError) as caught:
        trained(recipe, resume_from=place, **settings)
    return caught.value


def test_what_resume_from_refuses(recipe: Recipe, tmp_path: Path) -> None:
    stopped_after(recipe, 5)
    (tmp_path / "empty").mkdir()
    for place, words in {"nowhere": "no such folder", "empty": "holds no checkpoint"}.items():
        error = refused(named(recipe, "other"), tmp_path / place)
        assert words in error.message and error.exit_code == 2
    stopped_after(named(recipe, "second"), 4)
    error = refused(named(recipe, "other"), tmp_path / "drive")
    assert "2 runs: orders, second" in error.message and "--resume-from" in (error.help or "")
    assert not Path("runs/other").exists()


def test_a_newer_checkpoint_of_the_runs_own_is_not_passed_over(recipe: Recipe, tmp_path: Path) -> None:
    run = stopped_after(recipe, 7)
    error = refused(recipe, tmp_path / "drive/orders/checkpoints/step-000003")
    assert isinstance(error, UsageError) and "newer checkpoint, step-000007" in error.message
    assert names_in(run.checkpoints_dir)[-1] == "step-000007"
    run, _ = trained(recipe, resume_from=run.checkpoints_dir / "step-000007")
    assert run.stage("train") is not None


def test_where_all_checkpoints_are_damaged_a_copy_helps(recipe: Recipe, tmp_path: Path) -> None:
    straight, _ = trained(changed(named(recipe, "straight"), "checkpoint", mirror=None))
    run = stopped_after(recipe, 5)
    for path in list_checkpoints(run.checkpoints_dir):
        (path / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="every checkpoint is damaged") as caught:
        trained(recipe, resume=True)
    assert "--resume-from" in (caught.value.help or "")
    run, _ = trained(recipe, resume_from=tmp_path / "drive")
    assert adapter_bytes(run) == adapter_bytes(straight)


def test_a_checkpoint_of_something_else_is_refused_setting_by_setting(recipe: Recipe, tmp_path: Path) -> None:
    stopped_after(recipe, 5)
    other = changed(changed(named(recipe, "other"), "adapter", alpha=16), "train", batch_size=5)
    tiny.write_rows(tmp_path / "orders.jsonl", tiny.rows(40, start=1))
    error = refused(other, tmp_path / "drive/orders")
    assert isinstance(error, RecipeError) and error.exit_code == 2 and error.code == "changed"
    for words in ("adapter.alpha: 8.0 → 16", "train.batch_size: 4 → 5", "the file data.train changed"):
        assert words in error.message
    assert not Path("runs/other").exists()
    run, said = trained(other, resume_from=tmp_path / "drive/orders", force=True)
    assert run.stage("train") is not None and any(s.startswith("forced: adapter.alpha") for s in said)


def test_a_mirror_in_the_run_itself_or_of_another_run_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    for folder in ("runs", "runs/orders"):
        with pytest.raises(RecipeError, match="lies in the run itself"):
            trained(changed(recipe, "checkpoint", mirror=folder))
        assert not Path("runs/orders").exists()
    trained(recipe)
    shutil.rmtree("runs/orders")
    with pytest.raises(RecipeError, match="another run that is called orders") as caught:
        trained(recipe)
    assert "--resume-from" in (caught.value.help or "")
    assert names_in(tmp_path / "drive/orders/checkpoints")[-1] == "step-000009"


def test_a_mirror_that_cannot_be_made_is_told_before_training(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match=r"checkpoint\.mirror cannot be written"):
        trained(changed(recipe, "checkpoint", mirror=str(tmp_path / "file")))


def test_a_drive_that_goes_away_is_said_and_training_goes_on(recipe: Recipe, tmp_path: Path) -> None:
    def unmount(report: Any) -> None:
        if report.step == 4:
            shutil.rmtree(tmp_path / "drive")
            (tmp_path / "drive").write_text("")

    said: list[str] = []
    run = train_stage(recipe, show=Show(say=said.append, step=unmount))
    assert run.stage("train") is not None
    assert [s.split(" could")[0] for s in said if "could not be copied" in s] == [
        "step-000006",
        "step-000009",
    ]


def test_a_drive_without_rename_or_sync(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As network drives are: the manifest comes last, so that what a kill leaves is no checkpoint."""
    run = stopped_after(recipe, 5)
    honest = os.replace, os.fsync, shutil.copyfile
    drive, copied = tmp_path / "cloud", list[str]()

    def replace(source: Any, target: Any) -> None:
        if str(target).startswith(str(drive)) and Path(source).is_dir():
            raise OSError("Function not implemented")
        honest[0](source, target)

    def fsync(descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").startswith(str(drive)):
            raise OSError("Invalid argument")
        honest[1](descriptor)

    def copyfile(source: Any, target: Any) -> Any:
        copied.append(str(Path(target).relative_to(drive)))
        return honest[2](source, target)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(shutil, "copyfile", copyfile)
    copy_checkpoint(run.checkpoints_dir / "step-000005", drive)
    assert verify_checkpoint(drive / "step-000005") is None
    assert [path.name for path in drive.iterdir()] == ["step-000005"]
    assert copied[-1] == f"step-000005/{MANIFEST}"


def test_a_copy_that_is_not_what_was_saved_is_told(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stopped_after(recipe, 5)
    honest = shutil.copyfile

    def lossy(source: Any, target: Any) -> Any:
        honest(source, target)
        if Path(target).name == "adapter.safetensors":
            data = bytearray(Path(target).read_bytes())
            data[-1] ^= 1
            Path(target).write_bytes(data)

    monkeypatch.setattr(shutil, "copyfile", lossy)
    with pytest.raises(CheckpointError, match=r"the copy is not what was saved \(adapter\.safetensors"):
        copy_checkpoint(run.checkpoints_dir / "step-000005", tmp_path / "drive")


def test_the_command_takes_it(recipe: Recipe, tmp_path: Path, myna: Any) -> None:
    stopped_after(recipe, 5)
    shutil.rmtree(tmp_path / "runs")
    done = myna("train", "recipe.yaml", "--resume-from", "drive", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["steps"] == 9
    assert "took step-000005 from" in done.stderr
    done = myna("train", "recipe.yaml", "--set", "run.name=new", "--resume-from", "nowhere", "--json")
    assert done.returncode == 2 and json.loads(done.stdout)["error"]["where"] == "nowhere"


def test_a_checkpoint_that_does_not_say_what_it_is_of_is_not_taken(recipe: Recipe, tmp_path: Path) -> None:
    run = stopped_after(recipe, 5)
    path = run.checkpoints_dir / "step-000005"
    manifest = json.loads((path / MANIFEST).read_text())
    write_json(path / MANIFEST, {key: manifest[key] for key in ("made", "files")})
    error = refused(named(recipe, "other"), path)
    assert "before checkpoints said what they are of" in error.message
