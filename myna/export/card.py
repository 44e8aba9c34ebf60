"""README.md of a run: the model card that goes wherever the model goes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from myna.recipe import Recipe
from myna.run import Run, read_json


def model_card(run: Run, recipe: Recipe) -> str:
    """The card as Markdown, from the run's own files; what was not measured is not claimed."""
    info = run.info()
    lines = [f"# {run.name}", "", _given(info) if "source" in info else _trained(info, recipe), ""]
    if run.evaluation_path.is_file():
        lines += _evaluation(read_json(run.evaluation_path))
    if run.parity_path.is_file():
        lines += _parity(read_json(run.parity_path))
    if recipe.data.system:
        lines += ["## System text", "", f"It was trained with this system text: `{recipe.data.system}`", ""]
    digests = [f"- base model: `{info['base']['sha256']}`"]
    digests += [
        f"- data.{name}: `{file['sha256']}` ({file['rows']} rows)" for name, file in info["data"].items()
    ]
    return "\n".join([*lines, "## Inputs (SHA-256)", "", *digests, ""])


def _trained(info: Mapping[str, Any], recipe: Recipe) -> str:
    adapter, train = recipe.adapter, recipe.train
    steps = info["stages"].get("train", {}).get("steps", 0)
    learnt = sum(file["rows"] for name, file in info["data"].items() if name not in ("test", "validation"))
    of = {"test": "held_out_rows", "validation": "validation_rows"}
    within = sum(
        info.get(key, 0) for name, key in of.items() if name not in info["data"]
    )  # of the training file
    return (
        f"A {adapter.method} adapter (r {adapter.r}, alpha {adapter.alpha:g}) on `{info['base']['name']}`, "
        f"trained with Myna {info['versions']['myna']} for {steps} steps of {train.batch_size} rows "
        f"out of {learnt - within}, learning rate {train.learning_rate:g}."
    )


def _given(info: Mapping[str, Any]) -> str:
    """Of what somebody else trained: nothing is said of how."""
    source, myna = info["source"], f"Myna {info['versions']['myna']}"
    if source["kind"] != "adapter":
        return f"`{Path(source['path']).name}`, exported with {myna}; it was not trained with it."
    kind = source["adapter"]["peft_type"]
    return (
        f"A {kind} adapter (`{Path(source['path']).name}`) on `{info['base']['name']}`, merged and exported with "
        f"{myna}; it was not trained with it."
    )


def _evaluation(evaluation: Mapping[str, Any]) -> list[str]:
    lines = [f"## On {evaluation['rows']} held-out rows", "", "| model | exact match | 95 % interval | MB |"]
    lines.append("| --- | ---: | ---: | ---: |")
    for name, result in evaluation["results"].items():
        low, high = result["interval"]
        lines.append(
            f"| {name} | {result['exact_match']:.1%} | {low:.1%} to {high:.1%} | {result['mb']:.0f} |"
        )
    return [*lines, ""]


def _parity(parity: Mapping[str, Any]) -> list[str]:
    lines = [
        "## Is the file the model?",
        "",
        "| file | mean KL | same top token |",
        "| --- | ---: | ---: |",
    ]
    for name, file in parity.get("files", {}).items():
        lines.append(f"| {name} | {file['mean_kl']:.4f} | {file['same_top']:.1%} |")
    return [*lines, ""]
