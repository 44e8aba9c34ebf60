"""Small runs of several kinds, and all of what they come to that is no clock."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny

from myna.checkpoint import list_checkpoints, read_snapshot
from myna.evaluate.run_files import read_metrics
from myna.run import Run

# what a run's bytes depend on; seconds and memory are of the process
METRICS = (
    *("step", "loss", "learning_rate", "target_tokens", "tokens", "grad_norm", "num_packs", "loss_scale"),
    *("skipped", "validation_loss"),
)
CLOCKS = (
    "seconds",
    "metrics_bytes",
)  # of a checkpoint's progress: lines of metrics hold seconds, of more or fewer digits


@dataclass(frozen=True)
class Kind:
    """A recipe's settings by block, as they differ from the tiny one's."""

    name: str
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    num_rows: int = 40


def kinds() -> list[Kind]:
    """{packed, unpacked} × {one pack a step, several} × {dropout 0, 0.1} × {fp32, bf16, int8}, as far as they go."""
    found = []
    for packed in (True, False):
        for packs, tokens in (("one pack", 1024), ("four packs", 64)):
            for dropout in (0.0, 0.1):
                for base in ("fp32", "bf16", "int8"):
                    if base == "int8" and not packed:
                        continue  # refused: int8 is for the fast path
                    model = {
                        "dtype": "fp32" if base == "int8" else base,
                        "quantize": "int8" if base == "int8" else "none",
                    }
                    found.append(
                        Kind(
                            f"{'packed' if packed else 'unpacked'}, {packs}, dropout {dropout}, {base}",
                            {
                                "model": model,
                                "adapter": {"dropout": dropout},
                                "train": {
                                    "packed": packed,
                                    "pack_tokens": tokens,
                                    "batch_size": 4,
                                    "epochs": 2,
                                },
                                "data": {"validation_fraction": 0.1},
                            },
                        )
                    )
    found[0].settings["train"]["order"] = "length"
    found[-1].settings["train"]["schedule"] = "wsd"
    return found


def write_run(folder: Path, base: Path, kind: Kind, *, name: str = "run", **blocks: dict[str, Any]) -> Path:
    """A folder with rows and the recipe of a run; returns the recipe's path."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / "rows.jsonl"
    if not rows.exists():
        tiny.write_rows(rows, tiny.rows(kind.num_rows))
    settings = {
        block: {**kind.settings.get(block, {})} for block in kind.settings.keys() | blocks.keys() | {"run"}
    }
    for block, values in blocks.items():
        settings[block].update(values)
    settings["run"]["name"] = str(folder / name)
    path = folder / f"{name}.yaml"
    path.write_text(tiny.recipe_text(base, rows, **settings))
    return path


def outcome(run: Run) -> dict[str, Any]:
    """The adapter, the last checkpoint's state, and every metric, but for clocks: equal for runs that are the same."""
    newest = list_checkpoints(run.checkpoints_dir)[-1]
    snapshot = read_snapshot(newest)
    states = {
        f"{owner}/{name}": hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        for owner, state in snapshot.states.items()
        for name, tensor in state.tensors.items()
    }
    facts = {
        owner: {key: value for key, value in state.facts.items() if key not in CLOCKS}
        for owner, state in snapshot.states.items()
    }
    lines = [{key: line.get(key) for key in METRICS} for line in read_metrics(run.metrics_path)]
    adapter = (run.adapter_dir / "adapter_model.safetensors").read_bytes()
    return {
        "adapter": hashlib.sha256(adapter).hexdigest(),
        "step": snapshot.step,
        "states": states,
        "facts": json.loads(json.dumps(facts)),
        "metrics": lines,
    }


def doubled_steps(run: Run) -> list[int]:
    """Steps that stand in metrics.jsonl more than once."""
    steps = [
        json.loads(line)["step"] for line in run.metrics_path.read_text().splitlines() if '"loss"' in line
    ]
    return sorted({step for step in steps if steps.count(step) > 1})
