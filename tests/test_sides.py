"""Which rows of which file come to which side, what is said of it, and what a run keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from myna.data.sides import Sides, read_sides
from myna.errors import DataError, RecipeError
from myna.evaluate.run_files import read_metrics
from myna.metrics import read_lines
from myna.pipeline import train_stage
from myna.prepare import prepare
from myna.recipe import Recipe, build_recipe
from myna.run import Run
from myna.show import Show
from myna.stored import run_of, training_rows, validation_rows
from myna.verify import verify_run

Rows = list[dict[str, Any]]


def sides(folder: Path, train: Rows, said: list[str] | None = None, **data: Any) -> Sides:
    path = tiny.write_rows(folder / "rows.jsonl", train)
    recipe = build_recipe({"data": {"train": str(path), **data}})
    return read_sides(recipe, None, (said if said is not None else []).append)


def orders(num_rows: int, start: int = 0, **more: Any) -> Rows:
    return [{**row, **more} for row in tiny.rows(num_rows, start)]


def sizes(found: Sides) -> list[int]:
    return [len(found.train[0].rows), len(found.validation), len(found.test)]


def prompts(rows: Any) -> set[str]:
    return {row.messages[-2].content for row in rows}


def test_given_files_share_no_prompt_and_the_one_that_learns_gives_way(tmp_path: Path) -> None:
    test = tiny.write_rows(tmp_path / "test.jsonl", orders(10))
    validation = tiny.write_rows(tmp_path / "validation.jsonl", orders(10, start=5))
    said: list[str] = []
    found = sides(tmp_path, orders(40), said, test=str(test), validation=str(validation))
    assert sizes(found) == [25, 5, 10]
    assert not prompts(found.train[0].rows) & (prompts(found.validation) | prompts(found.test))
    assert said[-3:] == [
        "5 validation rows were left out: their prompts stand in test.jsonl too",
        "10 training rows were left out: their prompts stand in test.jsonl too",
        "5 training rows were left out: their prompts stand in validation.jsonl too",
    ]


def test_a_part_is_held_out_for_what_is_not_given(tmp_path: Path) -> None:
    validation = tiny.write_rows(tmp_path / "validation.jsonl", orders(10))
    found = sides(tmp_path, orders(60), validation=str(validation))
    assert sizes(found) == [45, 10, 5]
    test = tiny.write_rows(tmp_path / "test.jsonl", orders(10))
    found = sides(tmp_path, orders(60), test=str(test), validation_fraction=0.2)
    assert sizes(found) == [40, 10, 10]


def test_groups_come_from_a_key_of_the_rows(tmp_path: Path) -> None:
    rows = [{**row, "customer": n % 9} for n, row in enumerate(orders(90))]
    said: list[str] = []
    found = sides(tmp_path, rows, said, group_by="customer", test_fraction=0.2, system="Be brief.")
    assert not {row.group for row in found.train[0].rows} & {row.group for row in found.test}
    assert {row.group for row in (*found.train[0].rows, *found.test)} == {str(n) for n in range(9)}
    assert "ignored" not in said[0] and said[1].endswith("(data.test_fraction, by customer)")
    last = sides(tmp_path, rows, group_by="customer", test_fraction=0.2, train_on="last")
    assert prompts(last.test) == prompts(found.test)


def test_a_row_without_its_group_is_a_fault_with_the_nearest_key(tmp_path: Path) -> None:
    rows = [*orders(9, customer="a"), *orders(1, start=9, costumer="b"), *orders(1, start=20, customer="")]
    with pytest.raises(DataError) as caught:
        sides(tmp_path, rows, group_by="customer")
    message = str(caught.value)
    assert "D012] " in message and "rows.jsonl:10: `customer` (data.group_by) is missing" in message
    assert "--set data.group_by=costumer" in message
    assert "rows.jsonl:11: `customer` (data.group_by) is empty" in message
    assert (
        len(sides(tmp_path, rows, group_by="customer", on_bad_row="skip", test_fraction=0).train[0].rows) == 9
    )


def test_questions_about_one_text_stay_together(tmp_path: Path) -> None:
    rows = [{"context": f"text {n // 5}", "question": f"q{n}", "answer": f"a{n}"} for n in range(50)]
    found = sides(tmp_path, rows, group_by="context", test_fraction=0.2)
    assert {row.group for row in found.test}.isdisjoint({row.group for row in found.train[0].rows})
    assert len(found.test) == 10


def test_labels_too_rare_to_be_held_out_are_counted(tmp_path: Path) -> None:
    rows = [{"text": f"text {n}", "label": "ab"[n % 2]} for n in range(60)] + [
        {"text": f"rare {n}", "label": f"r{n}"} for n in range(3)
    ]
    said: list[str] = []
    found = sides(tmp_path, rows, said, stratify=True, test_fraction=0.2)
    assert len(found.test) == 13 and {row.answer() for row in found.test} == {"a", "b"}
    assert said[-1] == "3 of 5 labels have no row among those held out: too few rows have them"


@pytest.fixture
def recipe(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.chdir(tmp_path)
    rows = tiny.write_rows(tmp_path / "orders.jsonl", tiny.rows(40))
    tree = json.loads(tiny.recipe_text(tiny_base, rows, data={"validation_fraction": 0.2}))
    return build_recipe(tree)


def changed(recipe: Recipe, block: str, **settings: object) -> Recipe:
    return recipe.model_copy(update={block: getattr(recipe, block).model_copy(update=settings)})


def validated(run: Run) -> dict[int, float]:
    lines = read_lines(run.metrics_path)
    return {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}


def test_the_validation_loss_is_of_its_rows_at_every_checkpoint(recipe: Recipe) -> None:
    said: list[str] = []
    run = train_stage(recipe, show=Show(say=said.append))
    assert "8 of 40 rows are for the validation loss (data.validation_fraction)" in said
    assert len(run.validation_path.read_text().splitlines()) == run.info()["validation_rows"] == 8
    losses = validated(run)
    assert list(losses) == [3, 6, 7]  # 28 rows, 4 a step, saved every third and at the end
    assert losses[7] < losses[3]
    assert losses[7] == pytest.approx(plain_loss(run), rel=1e-4)
    lines = read_metrics(run.metrics_path)
    assert [line["step"] for line in lines] == list(range(1, 8)) and lines[2]["validation_loss"] == losses[3]
    prepared = prompts(validation_rows(run))
    assert len(prepared) == 8 and not prepared & prompts(training_rows(run, 100))
    assert {finding.verdict for finding in verify_run(run) if "validation" in finding.name} == {"pass"}


def plain_loss(run: Run) -> float:
    """The mean over target tokens by transformers and peft alone."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from myna.data.render import load_chat_tokenizer, render_example
    from myna.stored import stored_recipe

    model = AutoModelForCausalLM.from_pretrained(stored_recipe(run).model.base)
    model = PeftModel.from_pretrained(model, str(run.adapter_dir)).eval()
    tokenizer, total, num_targets = load_chat_tokenizer(run.tokenizer_dir), 0.0, 0
    for row in validation_rows(run):
        example = render_example(row, tokenizer, 256)
        labels = torch.from_numpy(example.labels_T)[None]
        with torch.no_grad():
            loss = model(input_ids=torch.from_numpy(example.input_ids_T)[None], labels=labels).loss
        total, num_targets = total + float(loss) * example.num_targets, num_targets + example.num_targets
    return total / num_targets


@pytest.mark.parametrize("packed", [True, False])
def test_validation_leaves_no_trace_in_what_is_trained(recipe: Recipe, tmp_path: Path, packed: bool) -> None:
    """The same rows are trained on with the validation rows in a file of nothing that they meet."""
    recipe = changed(changed(recipe, "adapter", dropout=0.1), "train", packed=packed)
    given = tiny.write_rows(tmp_path / "v.jsonl", tiny.rows(6, start=100))
    without = changed(changed(recipe, "data", validation_fraction=0.0), "run", name="without")
    with_it = changed(changed(without, "data", validation=str(given)), "run", name="with")
    first, second = train_stage(without), train_stage(with_it)
    weights = [(run.adapter_dir / "adapter_model.safetensors").read_bytes() for run in (first, second)]
    assert weights[0] == weights[1]
    assert not first.validation_path.exists() and len(validated(second)) == 3


def test_a_stopped_run_has_every_validation_loss_once_it_goes_on(recipe: Recipe) -> None:
    whole = train_stage(changed(recipe, "run", name="whole"))
    run = run_of(recipe)
    seen: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        train_stage(recipe, show=Show(step=lambda report: stop_after(report.step, seen)))
    lines = [line for line in read_lines(run.metrics_path) if "validation_loss" not in line]
    run.metrics_path.write_text("".join(json.dumps(line) + "\n" for line in lines))  # killed before its line
    train_stage(recipe, resume=True)
    assert validated(run) == validated(whole)


def stop_after(step: int, seen: list[int]) -> None:
    seen.append(step)
    if step == 3:
        raise KeyboardInterrupt


def test_another_validation_file_is_another_run(recipe: Recipe, tmp_path: Path) -> None:
    given = tiny.write_rows(tmp_path / "v.jsonl", tiny.rows(6, start=100))
    recipe = changed(recipe, "data", validation=str(given))
    run = run_of(recipe)
    prepare(recipe, run, print)
    tiny.write_rows(given, tiny.rows(7, start=100))
    with pytest.raises(RecipeError, match=r"the file data\.validation changed"):
        prepare(recipe, run, print)
    verdicts = {f.name.split()[0]: f.verdict for f in verify_run(run) if f.name.startswith("data.")}
    assert verdicts == {"data.train": "pass", "data.validation": "fail"}


def test_a_run_from_before_keeps_the_sides_that_it_had(recipe: Recipe, tmp_path: Path) -> None:
    """What stands on two sides only once the system text is there was not looked for then."""
    rows = tiny.rows(30)
    tiny.write_rows(tmp_path / "orders.jsonl", rows)
    same = [{**row, "system": "Be brief."} for row in rows[:4]]
    test = tiny.write_rows(tmp_path / "test.jsonl", same)
    recipe = changed(recipe, "data", test=str(test), system="Be brief.", validation_fraction=0.0)
    run = run_of(recipe)
    prepared = prepare(recipe, run, print)
    assert len(prepared.examples) == 26
    info = run.info()
    del info["sides"], info["validation_rows"]
    (run.path / "run.json").write_text(json.dumps(info))
    assert len(prepare(recipe, run, print).examples) == 30


def test_questions_that_were_asked_earlier_in_a_longer_conversation_are_counted_and_said(
    tmp_path: Path,
) -> None:
    turns = [("user", "q"), ("assistant", "a"), ("user", "more"), ("assistant", "b")]
    longer = {"messages": [{"role": role, "content": content} for role, content in turns]}
    other = {"messages": longer["messages"][2:]}
    test = tmp_path / "test.jsonl"
    test.write_text(json.dumps({"prompt": "q", "completion": "a"}) + "\n")
    said: list[str] = []
    sides(tmp_path, [longer, other], said, test=str(test))
    assert said[-1].startswith("1 training rows have a held-out prompt before an earlier answer")
    said.clear()
    sides(tmp_path, [longer, other], said, test=str(test), train_on="last")
    assert not any("earlier answer" in sentence for sentence in said)
