"""What a frozen base in bf16 or int8 costs in quality: the demo's task learned three times, held-out loss and exact answers.

    python benchmarks/precision.py

Each training is a process of its own; what it learned is merged and measured in float32 by the plain forward of
transformers, whatever it was trained with. Page and figures go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from _children import run_child  # noqa: E402
from _machine import RESULTS_DIR, commit, machine, say, shown_command, today, versions  # noqa: E402
from _race_page import curve_table, table  # noqa: E402

from myna.errors import MynaError  # noqa: E402

FIRST = "fp32"  # what the others are held against
# by name: how the frozen base is kept
STORED: dict[str, dict[str, str]] = {
    FIRST: {"dtype": "fp32", "quantize": "none"},
    "bf16": {"dtype": "bf16", "quantize": "none"},
    "int8": {"dtype": "bf16", "quantize": "int8"},
}
MOST_LOSS = 0.01  # by which the held-out loss may differ from the first one's, relative
ANSWER_TOKENS = 80


@dataclass(frozen=True)
class Learned:
    """What one training came to. `interval` is the 95 % Wilson interval of `exact_match` over `num_rows`."""

    name: str
    held_out_loss: float
    exact_match: float
    interval: tuple[float, float]
    num_rows: int
    losses: tuple[float, ...]

    def is_near(self, first: Learned) -> bool:
        """Held-out loss within 1 % of the first one's, exact match inside its interval."""
        off = abs(self.held_out_loss / first.held_out_loss - 1)
        return off <= MOST_LOSS and first.interval[0] <= self.exact_match <= first.interval[1]


def main() -> None:
    arguments = _arguments()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return
    try:
        with tempfile.TemporaryDirectory(prefix="myna-precision-") as scratch:
            found = [learn(name, Path(scratch), arguments.set) for name in STORED]
    except MynaError as error:
        print(json.dumps({"error": error.as_json()}) if arguments.json else f"error: {error}")
        sys.exit(error.exit_code)
    facts = {
        "date": today(),
        "machine": machine(),
        "versions": ", ".join(f"{name} {version}" for name, version in versions(sys.executable).items()),
        "commit": commit(),
        "command": shown_command(sys.argv),
    }
    page = precision_page(found, facts)
    result = {**facts, "learned": [{**asdict(one), "is_near": one.is_near(found[0])} for one in found]}
    place = arguments.results / f"{facts['date']}-precision"
    arguments.results.mkdir(parents=True, exist_ok=True)
    place.with_suffix(".md").write_text(page, encoding="utf-8")
    place.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result) if arguments.json else page)
    say(f"written: {place.with_suffix('.md')}")


def learn(name: str, scratch: Path, settings: Sequence[str]) -> Learned:
    """The demo's task learned with the base stored so, merged, measured. MachineError where a process fails."""
    from myna.demo import demo_recipe
    from myna.recipe import recipe_yaml

    folder = scratch / name
    folder.mkdir()
    stored = [f"model.{key}={value}" for key, value in STORED[name].items()]
    recipe = demo_recipe(folder, "learned", [*stored, *settings])
    (folder / "recipe.yaml").write_text(recipe_yaml(recipe), encoding="utf-8")
    myna = [sys.executable, "-m", "myna.cli"]
    here = {"PYTHONPATH": str(ROOT)}
    run_child([*myna, "train", "recipe.yaml", "--json"], cwd=folder, variables=here)
    run_child([*myna, "merge", "runs/learned", "--json"], cwd=folder, variables=here)
    run_dir = folder / "runs" / "learned"
    done = run_child([sys.executable, Path(__file__), "--measure", run_dir], cwd=folder)
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    said = json.loads(done.stdout.splitlines()[-1])
    found = Learned(
        name=name,
        held_out_loss=said["held_out_loss"],
        exact_match=said["exact_match"],
        interval=(said["low"], said["high"]),
        num_rows=said["num_rows"],
        losses=tuple(json.loads(line)["loss"] for line in lines),
    )
    say(f"{name}: held-out loss {found.held_out_loss:.4f}, exact {found.exact_match:.0%}")
    return found


def measure(run_dir: Path) -> dict[str, Any]:
    """Held-out loss (mean over target tokens) and exact answers of a run's merged model, in float32."""
    import torch

    from myna.backends.torch_backend import TorchBackend
    from myna.data.packing import collate
    from myna.data.render import load_chat_tokenizer, render_example
    from myna.engine.step import ReferenceStepper
    from myna.engine.threads import usable_cores
    from myna.evaluate.answers import answer_rows, result_of
    from myna.model.load import load_base
    from myna.run import Run
    from myna.stored import held_out

    torch.set_num_threads(usable_cores())
    run = Run(run_dir)
    rows, tokenizer = held_out(run), load_chat_tokenizer(run.tokenizer_dir)
    model = load_base(run.merged_dir, "fp32")
    stepper, total, num_targets = ReferenceStepper(model), 0.0, 0
    for row in rows:
        batch = collate([render_example(row, tokenizer, 10_000)])
        with torch.no_grad():
            total += float(stepper.loss(batch))
        num_targets += len(batch.targets_N)
    scores = result_of(
        answer_rows(TorchBackend(model, "merged"), rows, tokenizer, ANSWER_TOKENS), rows, num_bytes=0
    )
    low, high = scores["interval"]
    return {
        "held_out_loss": total / num_targets,
        "exact_match": scores["exact_match"],
        "low": low,
        "high": high,
        "num_rows": len(rows),
    }


def precision_page(found: Sequence[Learned], facts: Mapping[str, str]) -> str:
    """The page in Markdown."""
    first = found[0]
    rows = [
        [
            one.name,
            f"{one.held_out_loss:.4f}",
            f"{one.held_out_loss / first.held_out_loss - 1:+.2%}",
            f"{one.exact_match:.0%}",
            f"{one.interval[0]:.0%} to {one.interval[1]:.0%}",
            "" if one is first else "yes" if one.is_near(first) else "no",
        ]
        for one in found
    ]
    columns = (
        "frozen base | held-out loss | against fp32 | exactly right | 95 % interval | within 1 %, inside"
    )
    return (
        "\n\n".join(
            [
                "# What the storage of the frozen base costs in quality",
                f"{facts['date']} · {facts['machine']} · {facts['versions']} · commit {facts['commit']}",
                f"`{facts['command']}`",
                f"The demo's task (orders to JSON, {first.num_rows} held-out rows of patterns that no training row has), "
                f"{len(first.losses)} steps. Trained with the base stored as named; merged and measured in float32 alike.",
                table(columns, rows),
                "## Loss by step, in training",
                curve_table({one.name: one.losses for one in found}),
            ]
        )
        + "\n"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the demo's recipe")
    add("--measure", type=Path, help=argparse.SUPPRESS)
    add("--results", type=Path, default=RESULTS_DIR, help="the folder that the page goes to")
    add("--json", action="store_true", help="one JSON object on stdout in place of the page")
    return parser.parse_args()


if __name__ == "__main__":
    main()
