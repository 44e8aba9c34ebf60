"""The walk on a tiny model, by the command line: every file of the contract, loaded by the libraries it is for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from conftest import Command

from myna.recipe import load_recipe


def prepared(folder: Path, base: Path, **blocks: dict[str, Any]) -> None:
    train = tiny.write_rows(folder / "orders.jsonl", tiny.rows(60))
    (folder / "recipe.yaml").write_text(tiny.recipe_text(base, train, **blocks))


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> tuple[Path, dict[str, Any]]:
    """A finished run with two files, and what `--json` printed."""
    from myna.pipeline import run_recipe
    from myna.recipe import load_recipe

    folder = tmp_path_factory.mktemp("walk")
    # F32 beside Q4_K_M: random weights lose much in four bits, so its bound is not met by luck
    prepared(
        folder, tiny_base, export={"quantize": ["F32", "Q8_0"]}, run={"name": str(folder / "runs" / "orders")}
    )
    outcome = run_recipe(load_recipe(folder / "recipe.yaml"))
    return folder, outcome


def test_the_outcome_has_the_promised_shape(walked: tuple[Path, dict[str, Any]]) -> None:
    folder, outcome = walked
    assert set(outcome) == {"run", "seconds", "evaluation", "parity", "files"}
    assert {"train", "total"} <= set(outcome["seconds"])
    assert list(outcome["evaluation"]) == ["base", "tuned", "F32", "Q8_0"]
    for result in outcome["evaluation"].values():
        low, high = result["interval"]
        assert 0 <= low <= result["exact_match"] <= high <= 1
        assert result["field_f1"] is not None
    assert outcome["parity"]["verdict"] == "pass"
    assert outcome["parity"]["merged"]["relative"] <= 1e-5
    assert outcome["parity"]["F32"]["mean_kl"] < 1e-3 and outcome["parity"]["F32"]["same_top"] > 0.95
    assert 0 < outcome["parity"]["Q8_0"]["mean_kl"] <= 0.01
    assert all(Path(path).exists() for path in outcome["files"].values())
    assert json.loads(json.dumps(outcome)) == outcome
    names = {path.name for path in (folder / "runs/orders").iterdir() if not path.name.startswith(".")}
    assert names == {
        *(
            "run.json",
            "recipe.yaml",
            "plan.json",
            "rows",
            "tokenizer",
            "metrics.jsonl",
            "checkpoints",
            "adapter",
        ),
        *("merged", "gguf", "parity.json", "evaluation.json", "report.html", "README.md"),
    }
    assert not list(folder.rglob(".tmp-*")) and not list(folder.rglob(".unproven-*"))


def test_plain_peft_and_plain_transformers_load_it(
    walked: tuple[Path, dict[str, Any]], tiny_base: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = walked[0] / "runs/orders"
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), str(run / "adapter"))
    merged = AutoModelForCausalLM.from_pretrained(run / "merged")
    tokenizer = AutoTokenizer.from_pretrained(run / "merged")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "red lamp"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.no_grad():
        torch.testing.assert_close(adapted(**ids).logits, merged(**ids).logits, rtol=1e-4, atol=1e-4)
        base = AutoModelForCausalLM.from_pretrained(tiny_base)(**ids).logits
        assert (base - merged(**ids).logits).abs().max() > 0.1
    assert merged.dtype == torch.float32


def test_the_file_carries_template_tokens_and_types(walked: tuple[Path, dict[str, Any]]) -> None:
    from gguf import GGUFReader

    run = walked[0] / "runs/orders"
    reader = GGUFReader(run / "gguf/orders-Q8_0.gguf")
    assert reader.get_field("tokenizer.chat_template").contents() == tiny.CHATML
    assert reader.get_field("tokenizer.ggml.eos_token_id").contents() == 2
    held = json.loads((run / "parity.json").read_text())["files"]["Q8_0"]["types"]
    types = [tensor.tensor_type.name for tensor in reader.tensors]
    assert held == {kind: types.count(kind) for kind in set(types)}


def test_resuming_a_finished_run_does_nothing_again(
    walked: tuple[Path, dict[str, Any]], myna: Command
) -> None:
    folder, outcome = walked
    files = [
        p for p in (folder / "runs").rglob("*") if p.is_file() and p.name not in ("report.html", "run.json")
    ]
    before = {
        path: path.stat().st_mtime_ns
        for path in files
        if "evaluation" not in path.name and path.suffix != ".md"
    }
    done = myna("run", str(folder / "recipe.yaml"), "--resume", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["evaluation"] == outcome["evaluation"]
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_run_that_exists_is_refused_in_one_line_and_json(
    walked: tuple[Path, dict[str, Any]], myna: Command
) -> None:
    recipe = str(walked[0] / "recipe.yaml")
    done = myna("run", recipe)
    assert done.returncode == 2 and done.stdout == ""
    assert "--resume" in done.stderr and "Traceback" not in done.stderr
    refused = myna("train", recipe, "--json")
    assert refused.returncode == 2
    assert json.loads(refused.stdout)["error"]["code"] == "run-exists"


def test_another_type_is_exported_and_measured_later(
    walked: tuple[Path, dict[str, Any]], tmp_path: Path, myna: Command
) -> None:
    run = tmp_path / "orders"
    shutil.copytree(walked[0] / "runs/orders", run)
    done = myna("export", str(run), "--quantize", "Q6_K,F32", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result["files"]) == {"F32", "Q8_0", "Q6_K"}
    assert set(result["parity"]["files"]) == {"F32", "Q8_0", "Q6_K"}
    again = myna("evaluate", str(run), "--json")
    assert again.returncode == 0, again.stderr
    assert list(json.loads(again.stdout)["evaluation"]) == ["base", "tuned", "F32", "Q8_0", "Q6_K"]
    wrong = myna("export", str(run), "--quantize", "Q4_KM")
    assert wrong.returncode == 2 and "Q4_K_M" in wrong.stderr


def test_a_file_that_is_not_the_model_fails_and_gets_no_name(
    walked: tuple[Path, dict[str, Any]], tmp_path: Path, myna: Command
) -> None:
    """Planted: merged/ changes after the file's tensors were read for it, so the file holds other weights."""
    from safetensors.torch import load_file, save_file

    from myna.errors import CheckFailed
    from myna.export import gguf as writer
    from myna.export import stage
    from myna.run import Run

    run = Run(tmp_path / "orders")
    shutil.copytree(walked[0] / "runs/orders", run.path)
    other = tmp_path / "other"
    shutil.copytree(run.merged_dir, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"] *= 4
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    honest = writer.write_gguf
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "write_gguf", lambda _, *rest, **more: honest(other, *rest, **more))
        with pytest.raises(CheckFailed, match=r"Q6_K: mean KL .* is beyond .*; weights: ") as caught:
            stage.export_stage(run, ["Q6_K"])
    assert caught.value.exit_code == 5
    assert not run.gguf_path("Q6_K").exists()
    assert (run.gguf_dir / "orders-Q6_K.failed.gguf").is_file()
    assert json.loads(run.parity_path.read_text())["verdict"] == "fail"


def test_tokens_that_differ_in_llama_cpp_fail_the_export(
    walked: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Planted: the file is given another splitting of text before merging than the tokenizer has."""
    from myna.errors import CheckFailed
    from myna.export import stage
    from myna.run import Run

    run = Run(tmp_path / "orders")
    shutil.copytree(walked[0] / "runs/orders", run.path)
    written = tmp_path / "written"
    shutil.copytree(run.tokenizer_dir, written)
    tokenizer = json.loads((written / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:40]
    (written / "tokenizer.json").write_text(json.dumps(tokenizer))
    from myna.export import gguf as writer

    honest = writer.write_gguf
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            writer, "write_gguf", lambda model, _, *rest, **more: honest(model, written, *rest, **more)
        )
        with pytest.raises(CheckFailed, match=r"tokens: token \d+ of conversation \d+"):
            stage.export_stage(run, ["Q6_K"])


def test_merging_catches_an_adapter_that_is_not_the_merged_one(
    walked: tuple[Path, dict[str, Any]], tmp_path: Path, tiny_base: Path
) -> None:
    """Planted: the sum is made with twice the scale."""
    from myna.errors import CheckFailed
    from myna.export.lora_file import LoraFile
    from myna.export.merge import merge

    run = walked[0] / "runs/orders"
    honest = LoraFile.delta
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoraFile, "delta", lambda self, name: 2 * honest(self, name))
        with pytest.raises(CheckFailed, match="merged is not base"):
            merge(
                tiny_base,
                run / "adapter",
                run / "tokenizer",
                tmp_path / "merged",
                dtype="fp32",
                rows=[[1, 40, 50]],
            )
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_smaller_merged_says_what_rounding_cost(
    walked: tuple[Path, dict[str, Any]], tmp_path: Path, tiny_base: Path, dtype: str
) -> None:
    from myna.export.merge import merge

    run = walked[0] / "runs/orders"
    rows = [list(range(1, 60)), [1, 40, 50]]
    parity = merge(tiny_base, run / "adapter", run / "tokenizer", tmp_path / "m", dtype=dtype, rows=rows)
    assert parity.relative <= 1e-5 < parity.dtype_relative < 0.05
    assert parity.num_tokens == 62
    assert (
        json.loads((tmp_path / "m/config.json").read_text())["dtype"]
        == {"bf16": "bfloat16", "fp16": "float16"}[dtype]
    )


def test_stages_one_by_one_and_talk_before_any_export(tmp_path: Path, tiny_base: Path, myna: Command) -> None:
    prepared(tmp_path, tiny_base, train={"max_steps": 3})
    assert myna("merge", "orders").returncode == 2
    trained = myna("train", "recipe.yaml", "--json")
    assert trained.returncode == 0, trained.stderr
    assert json.loads(trained.stdout)["steps"] == 3
    said = myna("chat", "orders", "--once", "red lamp", "--json", "--max-tokens", "4", "--temperature", "0")
    assert said.returncode == 0, said.stderr
    assert "base + adapter" in said.stderr
    merged = myna("merge", "orders", "--json")
    assert json.loads(merged.stdout)["parity"]["relative"] <= 1e-5
    evaluated = myna("evaluate", "orders", "--json")
    assert list(json.loads(evaluated.stdout)["evaluation"]) == ["base", "tuned"]
    exported = myna("export", "orders", "--json")
    assert list(json.loads(exported.stdout)["files"]) == ["Q8_0"]
    through_file = myna(
        "chat", "runs/orders/gguf/orders-Q8_0.gguf", "--once", "red lamp", "--max-tokens", "4"
    )
    assert through_file.returncode == 0, through_file.stderr
    recipe = Path("runs/orders/recipe.yaml")
    shorter = myna("evaluate", "orders", "--set", "evaluate.max_tokens=2", "--json")
    assert shorter.returncode == 0, shorter.stderr
    assert load_recipe(recipe).evaluate.max_tokens == 2
    assert json.loads(Path("runs/orders/evaluation.json").read_text())["max_tokens"] == 2
    more = myna("export", "orders", "--set", "export.quantize=[F32]", "--json")
    assert "F32" in json.loads(more.stdout)["files"] and load_recipe(recipe).export.quantize == ["F32"]
    told = recipe.read_text()
    for command, setting in (
        ("evaluate", "train.epochs=9"),
        ("export", "export.dtype=f16"),
        ("export", "export=1"),
    ):
        refused = myna(command, "orders", "--set", setting)
        assert refused.returncode == 2 and "this stage has settings of" in refused.stderr
    assert myna("evaluate", "orders", "--set", "evaluate.max_tokns=2").returncode == 2
    assert recipe.read_text() == told
    verified = myna("verify", "orders", "--json")
    assert verified.returncode == 0, verified.stdout


def test_scores_of_a_known_difference() -> None:
    from myna.export.parity import divergence

    reference = np.log([[0.5, 0.5], [0.9, 0.1], [0.9, 0.1]]).astype(np.float32)
    other = np.log([[0.25, 0.75], [0.9, 0.1], [0.4, 0.6]]).astype(np.float32)
    kl, same, lost = divergence(reference, other)
    assert kl[:2] == pytest.approx([0.5 * np.log(2) + 0.5 * np.log(2 / 3), 0.0], abs=1e-6)
    assert same.tolist() == [False, True, False]
    assert lost.tolist() == [False, False, True]  # of two that are as likely, neither is lost
