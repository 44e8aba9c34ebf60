"""Several files in one run: how often each is seen, what is left out, what is said, checked and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import Command

from myna.data.conversation import Conversation
from myna.data.packing import collate, plan_packs
from myna.data.render import Example
from myna.data.sides import read_sides
from myna.errors import DataError, RecipeError
from myna.pack_facts import pack_facts
from myna.pipeline import train_stage
from myna.prepare import prepare
from myna.recipe import Recipe, build_recipe, load_recipe, recipe_yaml
from myna.show import Show
from myna.steps import planned_steps
from myna.stored import held_out, run_of, stored_recipe
from myna.verify import verify_run


@pytest.fixture
def folder(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """orders.jsonl, chat.csv of other keys that asks three of its questions too, and their recipe."""
    monkeypatch.chdir(tmp_path)
    orders = tiny.rows(24)
    rows = tiny.write_rows(tmp_path / "orders.jsonl", orders)
    lines = ["question,says"] + [f"hello {n},hi {n}" for n in range(9)]
    lines += [f"{row['prompt']},hi" for row in orders[:3]]
    (tmp_path / "chat.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    mix = [{"train": "chat.csv", "weight": 0.5, "columns": {"completion": "says"}, "system": "Be kind."}]
    text = tiny.recipe_text(tiny_base, rows, data={"mix": mix, "test_fraction": 0.2, "system": "As JSON."})
    (tmp_path / "recipe.yaml").write_text(text)
    return tmp_path


@pytest.fixture
def recipe(folder: Path) -> Recipe:
    return load_recipe(folder / "recipe.yaml")


def trained_prompts(rows: tuple[Conversation, ...]) -> set[str]:
    return {row.messages[-2].content for row in rows}


def test_files_are_read_each_in_its_way_and_only_the_first_is_held_out_from(recipe: Recipe) -> None:
    said: list[str] = []
    sides = read_sides(recipe, None, said.append)
    orders, chat = sides.train
    assert [len(orders.rows), len(sides.test), chat.weight] == [19, 5, 0.5]
    assert {row.messages[0].content for row in chat.rows} == {"Be kind."}
    assert {row.messages[0].content for row in (*orders.rows, *sides.test)} == {"As JSON."}
    without = recipe.model_copy(update={"data": recipe.data.model_copy(update={"mix": []})})
    assert read_sides(without, None, said.append).test == sides.test
    assert not trained_prompts(chat.rows) & trained_prompts(sides.test)


def test_a_held_out_prompt_of_the_mix_is_left_out(folder: Path) -> None:
    test = tiny.write_rows(folder / "test.jsonl", tiny.rows(2))
    said: list[str] = []
    recipe = load_recipe(folder / "recipe.yaml", [f"data.test={test}"])
    sides = read_sides(recipe, None, said.append)
    assert len(sides.train[1].rows) == 10
    assert "2 rows of chat.csv were left out: their prompts are held out" in said
    only = tiny.write_rows(folder / "only.jsonl", tiny.rows(2))
    with pytest.raises(DataError, match="all are held out"):
        read_sides(
            load_recipe(folder / "recipe.yaml", [f"data.test={test}", f"data.mix=[{{train: {only}}}]"]),
            None,
            print,
        )


def test_a_file_of_the_mix_has_a_group_of_its_own_key(folder: Path) -> None:
    rows = tiny.write_rows(
        folder / "c.jsonl", [{**row, "customer": n % 6} for n, row in enumerate(tiny.rows(24))]
    )
    more = [{**row, "id": n % 6} for n, row in enumerate(tiny.rows(24, start=50))]
    other = tiny.write_rows(folder / "d.jsonl", more)
    for own, num_left_out in (({}, 0), ({"group_by": "id"}, 4)):
        mix = [{"train": str(other), **own}]
        tree = {"data": {"train": str(rows), "group_by": "customer", "mix": mix}}
        sides = read_sides(build_recipe(tree), None, lambda _: None)
        assert len({row.group for row in sides.test}) == 1
        assert len(sides.train[1].rows) == 24 - num_left_out


def test_a_run_of_several_files(recipe: Recipe, folder: Path) -> None:
    said: list[str] = []
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"epochs": 2})})
    run = train_stage(recipe, show=Show(say=said.append))
    shares = [sentence for sentence in said if sentence.startswith("an epoch has")]
    assert shares[0].startswith("an epoch has 19 rows of the 19 of orders.jsonl: 7")
    assert (
        shares[1].startswith("an epoch has 6 rows of the 1") and "of chat.csv: 24% of its rows" in shares[1]
    )
    info = run.info()
    assert info["data"]["mix.1"]["rows"] == 12 and info["data"]["mix.1"]["path"] == str(folder / "chat.csv")
    assert info["packs"]["all_steps"] == 7  # 25 rows an epoch, 4 a step
    assert len(run.metrics_path.read_text().splitlines()) == 14
    assert stored_recipe(run) == load_recipe(run.recipe_path)
    assert [f.verdict for f in verify_run(run) if f.name.startswith("data.mix.1")] == ["pass"]
    with (folder / "chat.csv").open("a") as file:
        file.write("one more,row\n")
    with pytest.raises(RecipeError, match=r"data\.mix\.1 changed"):
        train_stage(recipe, resume=True)
    assert [f.verdict for f in verify_run(run) if f.name.startswith("data.mix.1")] == ["fail"]
    assert len(held_out(run)) == 5


@pytest.mark.parametrize("order", ["shuffled", "length", "file"])
def test_the_steps_from_one_on_are_those_of_the_whole_run(recipe: Recipe, order: str) -> None:
    settings = recipe.train.model_copy(update={"order": order, "epochs": 3})
    recipe = recipe.model_copy(update={"train": settings})
    prepared = prepare(recipe, run_of(recipe), lambda _: None)
    whole = [numbers_of(step) for step in planned_steps(prepared, 1)]
    assert [step[0] for step in whole] == list(range(1, 22)) and {step[1] for step in whole} == {0, 1, 2}
    again = prepare(recipe, run_of(recipe), lambda _: None)
    for first in (2, 7, 8, 21):
        assert [numbers_of(step) for step in planned_steps(again, first)] == whole[first - 1 :]


def test_to_begin_anywhere_plans_one_epoch_alone(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """However far in: the epochs before are not gone through."""
    import myna.steps

    settings = recipe.train.model_copy(update={"epochs": 1000})
    recipe = recipe.model_copy(update={"train": settings})
    prepared = prepare(recipe, run_of(recipe), lambda _: None)
    planned: list[int] = []
    honest = myna.steps.epoch_packs

    def watched(*arguments: Any, epoch: int) -> Any:
        planned.append(epoch)
        return honest(*arguments, epoch=epoch)

    monkeypatch.setattr(myna.steps, "epoch_packs", watched)
    step, epoch, _ = next(planned_steps(prepared, 6994))
    assert (step, epoch, planned) == (6994, 999, [999])


def numbers_of(step: tuple[int, int, list[list[Example]]]) -> tuple[int, int, list[list[str]]]:
    number, epoch, packs = step
    return number, epoch, [[str(example.place) for example in pack] for pack in packs]


def test_paths_count_from_the_recipe_and_faults_name_the_line(folder: Path) -> None:
    text = "data:\n  train: orders.jsonl\n  mix:\n    - train: chat.csv\n      wieght: 2\n    - {weight: 0}\n"
    (folder / "other.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(folder / "other.yaml")
    message = str(caught.value)
    assert "other.yaml:5" in message and "Did you mean data.mix.weight?" in message
    assert "other.yaml:6" in message and "data.mix.train is missing" in message
    good = load_recipe(folder / "recipe.yaml")
    assert good.data.mix[0].train == str(folder / "chat.csv")
    here = load_recipe(folder / "recipe.yaml", ["data.mix=[{train: chat.csv}]"])
    assert here.data.mix[0].train == str(folder / "chat.csv")
    (folder / "again.yaml").write_text(recipe_yaml(good))
    assert load_recipe(folder / "again.yaml") == good


def test_the_check_reads_every_file(folder: Path, myna: Command) -> None:
    told = json.loads(myna("data", "check", "recipe.yaml", "--json").stdout)
    assert told["num_rows"] == 24 and told["others"]["mix.1"]["num_rows"] == 12
    (folder / "chat.csv").write_text("question,says\nhello,\n", encoding="utf-8")
    done = myna("data", "check", "recipe.yaml")
    assert done.returncode == 3
    assert f"data.mix.1 {folder / 'chat.csv'}" in done.stdout and "chat.csv:2: `says` is empty" in done.stdout


def test_what_packing_makes_of_the_rows_is_counted_from_its_packs(recipe: Recipe, myna: Command) -> None:
    prepared = prepare(recipe, run_of(recipe), lambda _: None)
    examples, settings = prepared.examples, prepared.recipe.train
    lengths = [len(example.input_ids_T) for example in examples]
    planned = plan_packs(
        lengths, seed=settings.seed, epoch=0, batch_size=4, pack_tokens=1024, parts=prepared.parts
    )
    facts = pack_facts(examples, planned, 1024, share=True)
    rows = [row for step in planned for pack in step for row in pack]
    assert facts.tokens == sum(lengths[row] for row in rows) and facts.num_packs == len(planned) == 7
    assert facts.padded == sum(
        sum(map(len, step)) * max(lengths[row] for pack in step for row in pack) for step in planned
    )
    laid = [collate([examples[row] for row in pack], share=True) for step in planned for pack in step]
    assert facts.computed == sum(len(batch.input_ids_T) for batch in laid) < facts.tokens < facts.padded
    assert facts.fill == facts.tokens / (7 * 1024)
    assert pack_facts(examples, planned, 1024, share=False).shared == 0
    assert prepared.run.info()["packs"] == facts.as_json()
    told = json.loads(myna("data", "show", str(Path.cwd() / "recipe.yaml"), "--packs", "--json").stdout)
    assert told["packs"] == facts.as_json()
    plain = myna("data", "show", "recipe.yaml", "--packs").stdout
    assert "packs: 1.0 a step" in plain and "shared beginnings" in plain and "padded batches" in plain
    assert myna("data", "show", "recipe.yaml", "--packs", "--ids").returncode == 2


def test_only_so_many_steps_are_laid_out(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("myna.pack_facts.MOST_STEPS", 2)
    said: list[str] = []
    prepare(recipe, run_of(recipe), said.append)
    assert any("of the first 2 of 7 steps" in sentence for sentence in said)


def test_a_mix_that_is_no_list_is_told_with_its_line(folder: Path) -> None:
    (folder / "other.yaml").write_text("data:\n  train: orders.jsonl\n  mix: 3\n")
    with pytest.raises(RecipeError, match=r"other\.yaml:3: data\.mix is a list, not a number"):
        load_recipe(folder / "other.yaml")


def test_a_weight_is_positive_and_a_mix_of_nothing_is_none() -> None:
    assert build_recipe({"data": {"train": "a", "mix": []}}).data.mix == []
    for weight in (0, -1, 101):
        with pytest.raises(RecipeError):
            build_recipe({"data": {"train": "a", "mix": [{"train": "b", "weight": weight}]}})
