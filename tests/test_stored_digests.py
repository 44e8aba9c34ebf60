"""What run.json recorded is compared before it is used: folders of a run, the base's config, a resumed recipe."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import Command

from myna.backends.open import open_text_model
from myna.errors import RecipeError, UsageError
from myna.pipeline import train_stage
from myna.recipe import Recipe, load_recipe
from myna.run import Run, file_sha256, read_json, write_json
from myna.stored import require_unchanged, run_base, stored_recipe


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A folder with base/, orders.jsonl, recipe.yaml and the run that was trained of them."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(tiny_base, folder / "base")
    rows = tiny.write_rows(folder / "orders.jsonl", tiny.rows(20))
    recipe = folder / "recipe.yaml"
    settings: dict[str, Any] = {"train": {"max_steps": 2}, "run": {"name": str(folder / "run")}}
    recipe.write_text(tiny.recipe_text(folder / "base", rows, **settings), encoding="utf-8")
    train_stage(load_recipe(recipe))
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Run:
    shutil.copytree(trained / "run", tmp_path / "run")
    return Run(tmp_path / "run")


def change(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


SPOILED: dict[str, Callable[[Run], None]] = {
    "a changed weight": lambda run: change(run.adapter_dir / "adapter_model.safetensors"),
    "a changed config": lambda run: change(run.adapter_dir / "adapter_config.json"),
    "a lost file": lambda run: (run.adapter_dir / "adapter_config.json").unlink(),
    "a new file": lambda run: change_new(run.adapter_dir / "tokenizer.json"),
}


def change_new(path: Path) -> None:
    path.write_text("{}")


@pytest.mark.parametrize("spoil", SPOILED)
def test_a_folder_that_changed_is_refused_before_it_is_used(spoil: str, run: Run) -> None:
    require_unchanged(run, run.adapter_dir)
    SPOILED[spoil](run)
    with pytest.raises(RecipeError) as caught:
        require_unchanged(run, run.adapter_dir)
    assert caught.value.code == "changed" and caught.value.exit_code == 2
    assert "adapter/" in caught.value.message and str(run.path) in (caught.value.where or "")
    assert "train" in (caught.value.help or "")
    require_unchanged(run, run.tokenizer_dir)
    with (
        pytest.raises(RecipeError, match="adapter/"),
        open_text_model(str(run.path), lambda _: None),
    ):
        pass


def test_a_changed_template_is_not_chatted_with(run: Run) -> None:
    change(run.tokenizer_dir / "chat_template.jinja")
    with pytest.raises(RecipeError, match="tokenizer/"), open_text_model(str(run.path), lambda _: None):
        pass


def test_the_cure_for_merged_is_to_merge(run: Run) -> None:
    run.merged_dir.mkdir()
    (run.merged_dir / "model.safetensors").write_bytes(b"weights")
    run.record([run.merged_dir])
    require_unchanged(run, run.merged_dir)
    change(run.merged_dir / "model.safetensors")
    with pytest.raises(RecipeError) as caught:
        require_unchanged(run, run.merged_dir)
    assert f"myna merge {run.path}" in (caught.value.help or "")


def test_what_desktops_leave_is_no_file_of_a_run(run: Run) -> None:
    for name in (".DS_Store", "Thumbs.db", "._model.safetensors"):
        (run.adapter_dir / name).write_bytes(b"x")
    require_unchanged(run, run.adapter_dir)
    run.record([run.adapter_dir])
    assert not [name for name in run.info()["digests"] if "DS_Store" in name or "Thumbs" in name]


def test_a_folder_recorded_again_is_recorded_as_it_is(run: Run) -> None:
    """A shard of the merge before is not missed."""
    run.merged_dir.mkdir()
    (run.merged_dir / "a.safetensors").write_bytes(b"1")
    run.record([run.merged_dir])
    (run.merged_dir / "a.safetensors").rename(run.merged_dir / "b.safetensors")
    run.record([run.merged_dir])
    require_unchanged(run, run.merged_dir)
    assert "merged/a.safetensors" not in run.info()["digests"]


def without_digests(run: Run) -> None:
    info = run.info()
    del info["digests"]
    write_json(run.path / "run.json", info)


def test_an_older_run_is_compared_with_the_digest_it_has(run: Run) -> None:
    without_digests(run)
    require_unchanged(run, run.adapter_dir)
    require_unchanged(run, run.tokenizer_dir)
    change(run.adapter_dir / "adapter_model.safetensors")
    with pytest.raises(RecipeError, match=r"adapter/adapter_model\.safetensors"):
        require_unchanged(run, run.adapter_dir)


def test_the_training_is_recorded_with_its_metrics(run: Run) -> None:
    assert run.info()["digests"]["metrics.jsonl"] == file_sha256(run.metrics_path)


# The base's config


@pytest.fixture
def other_epsilon(trained: Path) -> Any:
    path = trained / "base" / "config.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | {"rms_norm_eps": 0.1}))
    yield
    path.write_text(before)


def test_another_config_of_the_base_is_another_base(run: Run, trained: Path, other_epsilon: None) -> None:
    with pytest.raises(RecipeError, match=r"config\.json") as caught:
        run_base(run)
    assert caught.value.code == "changed"
    with pytest.raises(RecipeError, match=r"config\.json"):
        train_stage(load_recipe(trained / "recipe.yaml"), resume=True)
    info = run.info()  # a run made before it was kept
    del info["base"]["config_sha256"]
    write_json(run.path / "run.json", info)
    run_base(run)


# A resumed recipe


@pytest.fixture
def no_rows(trained: Path) -> Any:
    (trained / "orders.jsonl").rename(trained / "away.jsonl")
    yield
    (trained / "away.jsonl").rename(trained / "orders.jsonl")


def resumed(trained: Path, run: Run, **blocks: dict[str, Any]) -> Recipe:
    tree = json.loads((trained / "recipe.yaml").read_text())
    for block, settings in {"run": {"name": str(run.path)}, **blocks}.items():
        tree[block] = {**tree.get(block, {}), **settings}
    path = run.path.parent / "resumed.yaml"
    path.write_text(json.dumps(tree))
    return load_recipe(path)


@pytest.mark.parametrize(
    ("blocks", "named"),
    [
        ({"adapter": {"r": 8}}, "adapter.r: 4 → 8"),
        ({"train": {"learning_rate": 0.5}}, "train.learning_rate"),
        ({"model": {"base": "smollm2-135m"}}, "model.base"),
        ({"data": {"train": "elsewhere.jsonl"}}, "data.train"),
    ],
)
def test_without_its_rows_a_trained_run_still_refuses_other_settings(
    trained: Path, run: Run, no_rows: None, blocks: dict[str, Any], named: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        train_stage(resumed(trained, run, **blocks), resume=True)
    assert named in caught.value.message and caught.value.code == "changed"


def test_without_its_rows_a_trained_run_goes_on(trained: Path, run: Run, no_rows: None) -> None:
    train_stage(resumed(trained, run), resume=True)
    train_stage(resumed(trained, run, export={"quantize": ["F16"]}), resume=True)
    assert stored_recipe(run).export.quantize == ["F16"]
    assert run.info()["digests"]["recipe.yaml"] == file_sha256(run.recipe_path)


def test_a_run_of_what_was_given_is_not_trained(trained: Path, run: Run, no_rows: None) -> None:
    info = run.info()
    info["source"] = {"kind": "adapter", "path": "/theirs", "sha256": "0" * 64}
    write_json(run.path / "run.json", info)
    for resume in (True, False):
        with pytest.raises(UsageError, match="not trained here") as caught:
            train_stage(resumed(trained, run), resume=resume)
        assert "--resume" not in (caught.value.help or "")


def test_a_refused_recipe_leaves_the_folder_that_was_there(trained: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    for name, kept in ((mine, True), (tmp_path / "new", False)):
        recipe = resumed(trained, Run(name), data={"train": str(trained / "none.jsonl")})
        with pytest.raises(Exception, match="no such file"):
            train_stage(recipe)
        assert name.is_dir() == kept
    assert list(mine.iterdir()) == []


def test_an_evaluation_is_recorded_as_far_as_it_came(run: Run, myna: Command) -> None:
    """What a stopped evaluation left is no change of a file."""
    from myna.data.rows import load_conversations
    from myna.evaluate.stage import _write_evaluation

    rows = load_conversations(run.test_path, format_name="messages").conversations
    _write_evaluation(run, rows, 8, {})
    assert run.info()["digests"]["evaluation.json"] == file_sha256(run.evaluation_path)
    assert read_json(run.evaluation_path)["rows"] == len(rows)
