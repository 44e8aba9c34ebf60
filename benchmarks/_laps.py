"""One lap of a race: a training by Myna or by the peer, each a process of its own, with the figures it gave."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _children import ROOT, Child, run_child

from myna.errors import CheckFailed, MachineError

BASE = "smollm2-135m"
BATCH_SIZE = 8
MAX_LENGTH = 1024
# the labs' recipe; the peer's script has the same
RECIPE: dict[str, dict[str, Any]] = {
    "adapter": {"method": "lora", "r": 16, "alpha": 16, "target_modules": "all-linear"},
    "train": {
        "batch_size": BATCH_SIZE,
        "learning_rate": 2e-4,
        "warmup_steps": 5,
        "schedule": "linear",
        "weight_decay": 0.01,
        "save_every_steps": 1_000_000,
    },
}


@dataclass(frozen=True)
class Lap:
    """`tokens_per_s` counts each row's own tokens in the steps after the warm ones, `flops_per_s` matrix products alone.

    `product_peak` is what the training itself found this CPU's products to reach, `others` as `Child` has it.
    """

    tokens_per_s: float
    tokens_a_step: float
    losses: tuple[float, ...]
    peak_mb: float
    process_seconds: float
    flops_per_s: float | None = None
    kernels: str | None = None
    product_peak: float | None = None
    others: float = 0.0


@dataclass(frozen=True)
class Course:
    """What every lap of a race has in common."""

    data_path: Path
    num_steps: int
    num_warm: int

    @property
    def num_rows(self) -> int:
        """The first rows of the file that both sides are given: one step more than is run, as the peer takes them."""
        return (self.num_steps + 1) * BATCH_SIZE


@dataclass(frozen=True)
class Peer:
    """The peer's interpreter, its script, and the base as a Hugging Face folder."""

    python: Path
    script: Path
    model_dir: Path


def myna_lap(course: Course, scratch: Path, *, dtype: str, quantize: str, kernels: str | None) -> Lap:
    """`myna train` on the labs' recipe. `kernels`: "torch" for plain torch, None as it is shipped.

    CheckFailed where the run's plan has other kernels than were asked for.
    """
    blocks = RECIPE | {
        "model": {"base": BASE, "dtype": dtype, "quantize": quantize},
        "data": {
            "train": str(course.data_path),
            "test_fraction": 0.0,
            "max_length": MAX_LENGTH,
            "cut_long": True,
        },
        "train": RECIPE["train"] | {"max_steps": course.num_steps, "max_rows": course.num_rows},
    }
    variables = {"MYNA_KERNELS": kernels} if kernels else {}
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        child, metrics, plan = train_recipe(blocks, Path(folder), variables)
    if kernels and plan.get("kernels") != kernels:
        raise CheckFailed(
            f"the plan says kernels {plan.get('kernels')}, asked was {kernels}", where="plan.json"
        )
    return lap_of_metrics(metrics, course.num_warm, child, plan.get("kernels"))


def train_recipe(
    blocks: Mapping[str, Any], folder: Path, variables: Mapping[str, str]
) -> tuple[Child, list[dict[str, Any]], dict[str, Any]]:
    """`myna train` of this checkout in a folder: the process, the lines of metrics.jsonl, the plan."""
    (folder / "recipe.yaml").write_text(json.dumps({"run": {"name": "lap"}, **blocks}), encoding="utf-8")
    command = [sys.executable, "-m", "myna.cli", "train", "recipe.yaml", "--json"]
    child = run_child(command, cwd=folder, variables={"PYTHONPATH": str(ROOT), **variables})
    run_dir = folder / "runs" / "lap"
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    plan = json.loads((run_dir / "plan.json").read_text(encoding="utf-8"))
    return child, [json.loads(line) for line in lines], plan


def lap_of_metrics(
    metrics: Sequence[Mapping[str, Any]], num_warm: int, child: Child, kernels: str | None = None
) -> Lap:
    """A lap from the lines of a metrics.jsonl: rates are totals over all steps but the first `num_warm`."""
    counted = metrics[num_warm:]
    if not counted:
        raise CheckFailed(f"{len(metrics)} steps were run, {num_warm} of them warm", where="metrics.jsonl")
    seconds = sum(line["seconds"] for line in counted)
    flops = [line["product_flops"] for line in counted if line.get("product_flops") is not None]
    return Lap(
        tokens_per_s=sum(line["tokens"] for line in counted) / seconds,
        tokens_a_step=sum(line["tokens"] for line in metrics) / len(metrics),
        losses=tuple(line["loss"] for line in metrics),
        peak_mb=child.peak_mb,
        process_seconds=child.seconds,
        flops_per_s=sum(flops) / seconds if len(flops) == len(counted) else None,
        kernels=kernels,
        product_peak=max(map(_peak_of, counted), default=0.0) or None,
        others=child.others,
    )


def _peak_of(line: Mapping[str, Any]) -> float:
    """The machine's product peak that a line's `share_of_peak` was taken of, in FLOP/s; 0 where it has none."""
    share = line.get("share_of_peak")
    return float(line["product_flops"] / (line["seconds"] * share)) if share else 0.0


def peer_lap(
    course: Course, scratch: Path, peer: Peer, *, micro: int, accumulate: int, precision: str = "bf16"
) -> Lap:
    """The peer's script in its own environment, as its own users run it: unpacked."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        sizes = ("--micro-batch", str(micro), "--accumulate", str(accumulate), "--precision", precision)
        steps = ("--steps", str(course.num_steps), "--warm", str(course.num_warm))
        given: tuple[str | Path, ...] = (
            "--model",
            peer.model_dir,
            "--data",
            course.data_path,
            "--max-length",
            str(MAX_LENGTH),
        )
        command = [peer.python, peer.script, *given, *sizes, *steps]
        child = run_child(command, cwd=Path(folder), variables={"TMPDIR": folder, "HF_HUB_OFFLINE": "1"})
    return lap_of_peer(child)


def lap_of_peer(child: Child) -> Lap:
    """A lap from the one JSON line that the peer prints last; MachineError where there is none."""
    for line in reversed(child.stdout.splitlines()):
        if line.startswith("{") and '"tokens_per_s"' in line:
            said = json.loads(line)
            return Lap(
                tokens_per_s=float(said["tokens_per_s"]),
                tokens_a_step=said["tokens"] / said["steps"],
                losses=tuple(said["loss"]),
                peak_mb=child.peak_mb,
                process_seconds=child.seconds,
                others=child.others,
            )
    raise MachineError(
        f"printed no line with its figures:\n{(child.stdout + child.stderr)[-500:]}",
        where="the peer",
        help="give the script of the TRL peer to --peer",
    )
