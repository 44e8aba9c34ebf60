"""The recipe: unknown keys, lines, nearest names, overrides, and defaults that are written out."""

from __future__ import annotations

from pathlib import Path

import pytest

from myna.errors import RecipeError, UsageError
from myna.recipe import Recipe, build_recipe, load_recipe, recipe_yaml, setting_lines


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_misspelt_setting_names_its_line_and_the_nearest(tmp_path: Path) -> None:
    path = write(tmp_path, "data: {train: a.jsonl}\ntrain:\n  epochs: 1\n  learning_rat: 2e-4\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value) == (
        "recipe.yaml:4: train.learning_rat is not a setting. Did you mean train.learning_rate?"
    )
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("train.dropuot", "adapter.dropout"),
        ("data.epoch", "train.epochs"),
        ("train.batchsize", "train.batch_size"),
    ],
)
def test_a_setting_in_the_wrong_block_is_found(tmp_path: Path, given: str, meant: str) -> None:
    path = write(tmp_path, "data: {train: a.jsonl}\n")
    with pytest.raises(RecipeError, match=f"{given} is not a setting. Did you mean {meant}"):
        load_recipe(path, [f"{given}=1"])


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path, "data: {}\ntrain:\n  epochs: 0\n  seed: x\nadapter: {rank: 4}\ntrian: {epochs: 1}\n"
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    text = str(caught.value)
    assert "recipe.yaml:1: data.train is missing" in text
    assert "recipe.yaml:3: train.epochs: input should be greater than or equal to 1 (it is 0)" in text
    assert "recipe.yaml:4: train.seed" in text
    assert "recipe.yaml:5: adapter.rank is not a setting." in text
    assert "recipe.yaml:6: trian is not a setting. Did you mean train?" in text


def test_yaml_is_version_1_2(tmp_path: Path) -> None:
    path = write(tmp_path, "data: {train: a.jsonl, system: no}\ntrain: {learning_rate: 2e-4}\n")
    recipe = load_recipe(path)
    assert recipe.train.learning_rate == 2e-4
    assert recipe.data.system == "no"


@pytest.mark.parametrize(
    ("text", "line"),
    [("data: {train: a\n", "recipe.yaml:2"), ("- a\n", "recipe.yaml:1"), ("a: 1\na: 2\n", "recipe.yaml:2")],
)
def test_what_is_no_recipe_names_its_line(tmp_path: Path, text: str, line: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, text))
    assert caught.value.where == line


def test_a_missing_recipe_names_the_nearest_file(tmp_path: Path) -> None:
    write(tmp_path, "data: {train: a.jsonl}")
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "recip.yaml")
    assert "recipe.yaml" in (caught.value.help or "")


def test_paths_count_from_the_recipe_and_overrides_from_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "deep"
    folder.mkdir()
    path = write(folder, "data: {train: a.jsonl}\nmodel: {base: ./base}\n")
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(path)
    assert recipe.data.train == str(folder / "a.jsonl")
    assert recipe.model.base == str(folder / "base")
    assert load_recipe(path, ["data.train=b.jsonl"]).data.train == str(tmp_path / "b.jsonl")


def test_overrides_are_typed_and_checked_like_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "data: {train: a.jsonl}\n")
    recipe = load_recipe(path, ["train.learning_rate=1e-4", "export.quantize=[Q8_0]", "adapter.r=8"])
    assert (recipe.train.learning_rate, recipe.export.quantize, recipe.adapter.r) == (1e-4, ["Q8_0"], 8)
    with pytest.raises(RecipeError, match=r"--set.*train.epoch is not a setting.*train.epochs"):
        load_recipe(path, ["train.epoch=2"])
    for wrong in ("train.epochs", "=3", "train..epochs=1"):
        with pytest.raises(UsageError):
            load_recipe(path, [wrong])


def test_the_resolved_recipe_reads_back_equal(tmp_path: Path) -> None:
    tree = {"data": {"train": "/x/a.jsonl", "system": "no: 'q'\n»", "columns": {"prompt": "frage"}}}
    recipe = build_recipe(tree, ["train.learning_rate=3e-4"])
    assert load_recipe(write(tmp_path, recipe_yaml(recipe))) == recipe


def test_settings_of_training_are_typed() -> None:
    recipe = build_recipe({"data": {"train": "a.jsonl"}})
    assert (recipe.train.gradient_checkpointing, recipe.train.packed, recipe.model.quantize) == (
        "auto",
        True,
        "none",
    )
    assert recipe.train.betas == [0.9, 0.999]
    overrides = ["train.gradient_checkpointing=4", "train.betas=[0.5, 0.9]", "model.quantize=int8"]
    recipe = build_recipe(
        {"data": {"train": "a.jsonl"}}, [*overrides, "train.schedule=wsd", "train.packed=false"]
    )
    assert (recipe.train.gradient_checkpointing, recipe.train.betas) == (4, [0.5, 0.9])
    for wrong in ("betas=[0.9]", "betas=[0.9, 1.0]", "schedule=wave", "gradient_checkpointing=every"):
        with pytest.raises(RecipeError, match=rf"train\.{wrong.partition('=')[0]}"):
            build_recipe({"data": {"train": "a.jsonl"}}, [f"train.{wrong}"])


@pytest.mark.parametrize("value", ["auto", "none", "all", 2])
def test_gradient_checkpointing_reads_back_equal(tmp_path: Path, value: object) -> None:
    recipe = build_recipe({"data": {"train": "/x/a.jsonl"}, "train": {"gradient_checkpointing": value}})
    assert load_recipe(write(tmp_path, recipe_yaml(recipe))) == recipe


def test_every_setting_has_a_description() -> None:
    lines = list(setting_lines())
    assert len(lines) == len({key for key, _, _ in lines})
    assert all(description for _, _, description in lines)
    assert {key.split(".")[0] for key, _, _ in lines} == set(Recipe.model_fields)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("train.learn_rate", "train.learning_rate"),
        ("train.eopchs", "train.epochs"),
        ("train.beta", "train.betas"),
        ("train.batch", "train.batch_size"),
        ("train.warmup", "train.warmup_steps"),
        ("train.shedule", "train.schedule"),
        ("train.max_length", "data.max_length"),
        ("adapter.alfa", "adapter.alpha"),
        ("adapter.droput", "adapter.dropout"),
        ("data.sistem", "data.system"),
        ("model.dtpye", "model.dtype"),
        ("checkpoint.miror", "checkpoint.mirror"),
        ("evaluate.max_row", "evaluate.max_rows"),
        ("train.tools", None),
        ("train.gpu", None),
        ("train.device", None),
        ("train.optimizer", None),
        ("data.shuffle", None),
        ("data.split", None),
        ("adapter.rank", None),
        ("adapter.bias", None),
        ("evaluate.temperature", None),
        ("export.gguf", None),
    ],
)
def test_a_name_is_mended_only_where_it_is_near(tmp_path: Path, given: str, meant: str | None) -> None:
    path = write(tmp_path, "data: {train: a.jsonl}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, [f"{given}=1"])
    block = given.partition(".")[0]
    told = f"Did you mean {meant}?" if meant else f"Settings there: {block}."
    assert f"{given} is not a setting. {told}" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "model: name",
            "model is a block of settings, not a text ('name'); write `model: {base: \"name\"}`.",
        ),
        (
            "train: []",
            "train is a block of settings, not a list; leave it out, or give settings of it: train.epochs,",
        ),
        ("data: {train: a.jsonl, mix: {}}", "data.mix is a list, not a block; write `mix: []`."),
        ("data: {train: a.jsonl, mix: {train: b}}", 'write `mix: [{train: "b"}]`.'),
        (
            "data: {train: a.jsonl, mix: [b]}",
            "each entry of data.mix is a block of settings, not a text ('b')",
        ),
        (
            "export: {quantize: Q8_0}",
            "export.quantize is a list, not a text ('Q8_0'); write `quantize: [\"Q8_0\"]`.",
        ),
    ],
)
def test_a_value_of_another_kind_is_told_with_the_line_to_write(tmp_path: Path, text: str, told: str) -> None:
    path = write(tmp_path, text + ("" if text.startswith("data") else "\ndata: {train: a.jsonl}") + "\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert told in str(caught.value) and str(caught.value).startswith("recipe.yaml:1: ")
    assert "valid" not in str(caught.value) and "instance" not in str(caught.value)
    pasted = str(caught.value).partition("write `")[2].partition("`")[0]
    if pasted.startswith(("model", "quantize")):  # the cure is a line that loads
        block = pasted if pasted.startswith("model") else f"export: {{{pasted}}}"
        assert load_recipe(write(tmp_path, f"data: {{train: a.jsonl}}\n{block}\n"))
