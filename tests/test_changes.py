"""What a resumed run may change, what it may not, and that it may become longer: without a training where none is needed."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import tiny

from myna.changes import Made, differences, made_from_json, refuse
from myna.checkpoint import list_checkpoints, read_manifest
from myna.errors import RecipeError
from myna.metrics import read_lines
from myna.pipeline import run_recipe, train_stage
from myna.plan import FrozenPlan
from myna.recipe import Recipe, build_recipe, load_recipe
from myna.run import Run, read_json, write_json
from myna.show import Show
from myna.verify import verify_run

SETTINGS = build_recipe({"data": {"train": "a.jsonl"}}).model_dump(mode="json")
BASE = {"name": "smollm2-135m", "sha256": "b", "config_sha256": "c"}
DATA = {"train": {"sha256": "d", "rows": 40, "path": "/here/a.jsonl"}}
PLAN = asdict(
    FrozenPlan("cpu", "fp32", 2, "fast", "", 1024, num_rows=40, num_steps=10, kernels_reason="none is here")
)
MADE = Made(SETTINGS, BASE, DATA, PLAN)


def made(*, settings: Any = None, base: Any = None, data: Any = DATA, plan: Any = None) -> Made:
    tree = {block: {**SETTINGS[block], **(settings or {}).get(block, {})} for block in SETTINGS}
    return Made(tree, BASE | (base or {}), data, PLAN | (plan or {}))


def file(**changes: Any) -> dict[str, Any]:
    return {"train": DATA["train"] | changes}


@pytest.mark.parametrize(
    "now",
    [
        made(),
        made(settings={"train": {"save_every_steps": 7, "keep_checkpoints": 9, "epochs": 4, "max_steps": 9}}),
        made(settings={"checkpoint": {"mirror": "x", "every_minutes": None, "adapter": "best"}}),
        made(settings={"evaluate": {"max_rows": 3}, "export": {"quantize": ["Q8_0"], "importance": True}}),
        made(
            settings={"run": {"name": "other"}, "data": {"train": "/there/b.jsonl"}},
            data=file(path="/there/b.jsonl"),
        ),
        made(settings={"model": {"base": "./the/same/weights"}}),
        made(plan={"num_steps": 20, "kernels_reason": "said otherwise"}),
    ],
    ids=[
        "nothing",
        "length and saving",
        "checkpoints",
        "later stages",
        "places of rows",
        "place of base",
        "plan's words",
    ],
)
def test_what_may_change(now: Made) -> None:
    assert differences(MADE, now) == []


CHANGES = {
    "adapter.r: 16 → 8": made(settings={"adapter": {"r": 8}}),
    "train.seed: 42 → 1": made(settings={"train": {"seed": 1}}),
    "data.system: None → Be brief.": made(settings={"data": {"system": "Be brief."}}),
    "export.dtype: fp32 → bf16": made(settings={"export": {"dtype": "bf16"}}),
    "the file data.train changed (/here/a.jsonl)": made(data=file(sha256="other")),
    "data.train is read as 41 rows now, and was 40": made(data=file(rows=41)),
    "data.test was not given": made(data=DATA | {"test": DATA["train"]}),
    "the weights of the base model changed (smollm2-135m → other)": made(
        base={"sha256": "x", "name": "other"}
    ),
    "config.json of the base model changed": made(base={"config_sha256": "x"}),
    "plan.json: threads: 2 → 8": made(plan={"threads": 8}),
}


@pytest.mark.parametrize("told", CHANGES)
def test_what_may_not(told: str) -> None:
    assert differences(MADE, CHANGES[told]) == [told]


def test_a_file_that_is_no_longer_given_and_one_of_a_mix() -> None:
    assert differences(made(data=DATA | {"test": DATA["train"]}), MADE) == ["data.test was given"]
    mixes = [
        made(settings={"data": {"mix": [{"train": path, "weight": w}]}})
        for path, w in (("a", 1), ("b", 1), ("b", 2))
    ]
    assert differences(mixes[0], mixes[1]) == []
    (told,) = differences(mixes[1], mixes[2])
    assert told.startswith("data.mix: ")


def test_without_rows_their_places_are_compared() -> None:
    there = made(settings={"data": {"train": "b.jsonl"}}, data=None)
    assert differences(MADE, there) == ["data.train: a.jsonl → b.jsonl"]


def test_it_goes_through_json(tmp_path: Path) -> None:
    kept = json.loads(json.dumps(MADE.as_json()))
    assert differences(made_from_json(kept), MADE) == [] and set(kept) == {"recipe", "plan", "base", "data"}
    assert all(len(kept[part]["sha256"]) == 64 for part in ("recipe", "plan"))


def test_what_an_older_version_did_not_know_has_its_default() -> None:
    """A setting and an entry of a plan that came later are no change."""
    kept = json.loads(json.dumps(MADE.as_json()))
    del kept["recipe"]["settings"]["train"]["betas"], kept["recipe"]["settings"]["checkpoint"]
    del kept["plan"]["entries"]["widen"], kept["plan"]["entries"]["products"]
    assert differences(made_from_json(kept), MADE) == []


def test_every_change_is_told_at_once(tmp_path: Path) -> None:
    refuse(Run(tmp_path), [])
    with pytest.raises(RecipeError) as caught:
        refuse(Run(tmp_path), ["one", "two"])
    assert caught.value.message.endswith("\n  one\n  two") and "--force" in (caught.value.help or "")


# With a training


@pytest.fixture
def recipe(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.chdir(tmp_path)
    rows = tiny.write_rows(tmp_path / "orders.jsonl", tiny.rows(40))
    path = tmp_path / "recipe.yaml"
    path.write_text(tiny.recipe_text(tiny_base, rows))
    return load_recipe(path)


def changed(recipe: Recipe, block: str, **settings: object) -> Recipe:
    return recipe.model_copy(update={block: getattr(recipe, block).model_copy(update=settings)})


def trained(recipe: Recipe, **settings: Any) -> tuple[Run, list[str]]:
    said: list[str] = []
    return train_stage(recipe, show=Show(say=said.append), **settings), said


def steps_of(run: Run) -> list[int]:
    return [line["step"] for line in read_lines(run.metrics_path)]


def test_a_trained_run_may_become_longer(recipe: Recipe) -> None:
    """With a schedule that does not look ahead it is the run that was longer from the beginning."""
    recipe = changed(recipe, "train", schedule="constant")
    longer = changed(recipe, "train", epochs=2)
    straight, _ = trained(changed(longer, "run", name="straight"))
    run, _ = trained(recipe)
    before = (run.adapter_dir / "adapter_model.safetensors").read_bytes()
    run, said = trained(longer, resume=True)
    assert any(sentence.startswith("9 steps → 18") for sentence in said)
    assert steps_of(run) == list(range(1, 19))
    paths = [one.adapter_dir / "adapter_model.safetensors" for one in (run, straight)]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert (run.path / "before-longer/adapter/adapter_model.safetensors").read_bytes() == before
    assert {finding.verdict for finding in verify_run(run)} == {"pass"}
    assert trained(longer, resume=True)[1][-1] == "the adapter is trained already"
    with pytest.raises(RecipeError, match="18 steps → 9: a run that has begun may only become longer"):
        trained(recipe, resume=True)


@pytest.mark.slow
def test_what_was_made_of_a_shorter_run_is_set_aside_whole(recipe: Recipe) -> None:
    run = Run(Path(run_recipe(recipe)["run"]))
    longer = changed(recipe, "train", epochs=2)
    outcome = run_recipe(longer, resume=True)
    aside = run.path / "before-longer"
    names = {path.name for path in aside.iterdir()}
    assert names == {"adapter", "merged", "gguf", "parity.json", "evaluation.json", "report.html"}
    assert set(outcome["evaluation"]) >= {"base", "tuned"}
    assert {finding.verdict for finding in verify_run(run)} <= {"pass", "refused"}


def test_force_takes_the_responsibility_and_it_is_written_down(recipe: Recipe, tmp_path: Path) -> None:
    run, _ = trained(changed(recipe, "train", max_steps=4))
    tiny.write_rows(tmp_path / "orders.jsonl", tiny.rows(40, start=1))
    other = changed(changed(recipe, "train", weight_decay=0.5), "adapter", alpha=4)
    with pytest.raises(RecipeError) as caught:
        trained(other, resume=True)
    for told in ("train.weight_decay: 0.01 → 0.5", "adapter.alpha: 8.0 → 4", "the file data.train changed"):
        assert told in caught.value.message
    run, said = trained(other, resume=True, force=True)
    assert "forced: train.weight_decay: 0.01 → 0.5" in said and "going on after step 4" in said
    (entry,) = run.info()["forced"]
    assert len(entry["changes"]) == 3 and entry["when"]
    assert {finding.verdict for finding in verify_run(run)} == {"pass"}
    assert trained(other, resume=True)[1][-1] == "the adapter is trained already"


def test_what_was_forced_stays_so_after_a_kill(recipe: Recipe) -> None:
    """The checkpoint that it went on from is still of the old recipe when the next process looks at it."""
    trained(changed(recipe, "train", max_steps=4))
    other = changed(recipe, "train", weight_decay=0.5)

    def dies(report: Any) -> None:
        if report.step == 5:
            raise SystemExit

    with pytest.raises(SystemExit):
        train_stage(other, resume=True, force=True, show=Show(step=dies))
    run, said = trained(other, resume=True)
    assert "going on after step 4" in said and steps_of(run) == list(range(1, 10))


def test_force_cannot_make_another_adapter_fit(recipe: Recipe) -> None:
    trained(changed(recipe, "train", max_steps=4))
    with pytest.raises(Exception, match=r"another adapter .* there and .* here") as caught:
        trained(changed(recipe, "adapter", r=8), resume=True, force=True)
    assert getattr(caught.value, "exit_code", None) == 4


def test_a_checkpoint_of_another_run_is_not_taken_for_ones_own(recipe: Recipe) -> None:
    run, _ = trained(changed(recipe, "train", max_steps=4))
    other, _ = trained(
        changed(changed(changed(recipe, "train", max_steps=8), "adapter", alpha=16), "run", name="other")
    )
    shutil.copytree(other.checkpoints_dir / "step-000008", run.checkpoints_dir / "step-000008")
    with pytest.raises(RecipeError, match=r"step-000008 of the run was made from something else") as caught:
        trained(recipe, resume=True)
    assert "adapter.alpha: 16.0 → 8.0" in caught.value.message


def test_other_versions_are_said(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    import myna.ready

    run, _ = trained(changed(recipe, "train", max_steps=4))
    there = read_manifest(list_checkpoints(run.checkpoints_dir)[-1])["versions"]
    assert {"myna", "torch", "transformers", "peft"} <= there.keys()
    monkeypatch.setattr(myna.ready, "versions_here", lambda: there | {"torch": "9.9"})
    _, said = trained(recipe, resume=True)
    assert any(f"torch {there['torch']}, here 9.9" in sentence for sentence in said)


def test_a_kill_between_a_file_and_its_digest_is_made_good(recipe: Recipe) -> None:
    """run.json still has the digest of the plan before it became longer."""
    run, _ = trained(changed(recipe, "train", max_steps=4))
    info = read_json(run.path / "run.json")
    info["digests"]["plan.json"] = "0" * 64
    write_json(run.path / "run.json", info)
    assert any(finding.verdict == "fail" for finding in verify_run(run))
    run, _ = trained(recipe, resume=True)
    assert {finding.verdict for finding in verify_run(run)} == {"pass"}
