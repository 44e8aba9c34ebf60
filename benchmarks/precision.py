"""What a frozen base in bf16 or int8 costs in quality: held-out loss and exact answers of the same rows learned with each.

    python benchmarks/precision.py [--seeds 42 43 44] [--data ROWS.jsonl]

The rows are the demo's, several seeds each, so that what storage changes stands beside what chance changes. Of other rows
a part is held out and its loss measured: what a right answer is is not known of them. Each training is a process of its own;
what it learned is merged and measured in float32 by the plain forward of transformers, whatever it was trained with. Page
and figures go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from _children import run_child  # noqa: E402
from _laps import RECIPE  # noqa: E402
from _machine import (  # noqa: E402
    RESULTS_DIR,
    commit,
    machine,
    say,
    shown_command,
    today,
    versions,
    workload_of,
)
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
    """What one training came to. `interval` is the 95 % Wilson interval of `exact_match`; both None where not asked for."""

    name: str
    seed: int
    held_out_loss: float
    num_rows: int
    losses: tuple[float, ...]
    exact_match: float | None = None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Stored:
    """One way to keep the base, over all seeds; every figure beside that of the first way with the same seed."""

    name: str
    held_out_loss: float
    off: float  # of the mean loss, relative to the first way's
    own_spread: float  # of the loss over the seeds: (largest - smallest) / mean
    is_right_as_often: (
        bool | None
    )  # each seed's share of right answers is inside the first way's interval of that seed

    @property
    def is_near(self) -> bool:
        return abs(self.off) <= MOST_LOSS and self.is_right_as_often is not False


def compare(found: Sequence[Learned]) -> list[Stored]:
    """The ways in the order of STORED."""
    by_name = {name: [one for one in found if one.name == name] for name in STORED}
    truth = by_name[FIRST]
    mean = statistics.mean(one.held_out_loss for one in truth)
    stored = []
    for name, ones in by_name.items():
        losses = [one.held_out_loss for one in ones]
        inside = [
            first.interval[0] <= one.exact_match <= first.interval[1]
            for first, one in zip(truth, ones, strict=True)
            if first.interval is not None and one.exact_match is not None
        ]
        own = statistics.mean(losses)
        spread = (max(losses) - min(losses)) / own
        stored.append(Stored(name, own, own / mean - 1, spread, all(inside) if inside else None))
    return stored


def main() -> None:
    arguments = _arguments()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, loss_only=arguments.loss_only)))
        return
    try:
        with tempfile.TemporaryDirectory(prefix="myna-precision-") as scratch:
            found = [
                learn(name, seed, Path(scratch), arguments) for seed in arguments.seeds for name in STORED
            ]
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
    rows = workload_of(arguments.data) if arguments.data else "demo"
    page = precision_page(found, rows, facts)
    stored = [{**asdict(one), "is_near": one.is_near} for one in compare(found)]
    result = {**facts, "rows": rows, "stored": stored, "learned": [asdict(one) for one in found]}
    place = arguments.results / f"{facts['date']}-precision-{rows}"
    arguments.results.mkdir(parents=True, exist_ok=True)
    place.with_suffix(".md").write_text(page, encoding="utf-8")
    place.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result) if arguments.json else page)
    say(f"written: {place.with_suffix('.md')}")


def learn(name: str, seed: int, scratch: Path, arguments: argparse.Namespace) -> Learned:
    """The rows learned with the base stored so, merged, measured. MachineError where a process fails."""
    from myna.demo import demo_recipe
    from myna.recipe import build_recipe, recipe_yaml

    folder = scratch / f"{name}-{seed}"
    folder.mkdir()
    settings = [f"model.{key}={value}" for key, value in STORED[name].items()]
    settings += [f"train.seed={seed}", *arguments.set]
    if arguments.data:
        tree = {**RECIPE, "run": {"name": "learned"}, "data": {"train": str(arguments.data.resolve())}}
        recipe = build_recipe(tree, settings)
    else:
        recipe = demo_recipe(folder, "learned", settings)
    (folder / "recipe.yaml").write_text(recipe_yaml(recipe), encoding="utf-8")
    myna = [sys.executable, "-m", "myna.cli"]
    here = {"PYTHONPATH": str(ROOT)}
    run_child([*myna, "train", "recipe.yaml", "--json"], cwd=folder, variables=here)
    run_child([*myna, "merge", "runs/learned", "--json"], cwd=folder, variables=here)
    run_dir = folder / "runs" / "learned"
    loss_only = ["--loss-only"] if arguments.data else []
    done = run_child([sys.executable, Path(__file__), "--measure", run_dir, *loss_only], cwd=folder)
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    said = json.loads(done.stdout.splitlines()[-1])
    found = Learned(name, seed, losses=tuple(json.loads(line)["loss"] for line in lines), **said)
    say(f"{name}, seed {seed}: held-out loss {found.held_out_loss:.5f}, exact {_percent(found.exact_match)}")
    return found


def measure(run_dir: Path, *, loss_only: bool) -> dict[str, Any]:
    """Held-out loss (mean over target tokens) and exact answers of a run's merged model, in float32: fields of Learned."""
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
    found = {"held_out_loss": total / num_targets, "num_rows": len(rows)}
    if loss_only:
        return found
    answered = answer_rows(TorchBackend(model, "merged"), rows, tokenizer, ANSWER_TOKENS)
    scores = result_of(answered, rows, num_bytes=0)
    return {**found, "exact_match": scores["exact_match"], "interval": scores["interval"]}


def precision_page(found: Sequence[Learned], rows: str, facts: Mapping[str, str]) -> str:
    """The page in Markdown; `rows` is what the rows are called."""
    first, stored = found[0], compare(found)
    summary = [
        [
            one.name,
            f"{one.held_out_loss:.5f}",
            "" if one.name == FIRST else f"{one.off:+.2%}",
            f"{one.own_spread:.0%}",
            "" if one.name == FIRST else "yes" if one.is_near else "no",
        ]
        for one in stored
    ]
    each = [
        [str(one.seed), one.name, f"{one.held_out_loss:.5f}", _percent(one.exact_match), _interval(one)]
        for one in found
    ]
    heads = (
        "frozen base | held-out loss, mean | against fp32 | spread over seeds | within 1 %, as often right"
    )
    curves = {one.name: one.losses for one in found if one.seed == first.seed}
    return (
        "\n\n".join(
            [
                f"# What the storage of the frozen base costs in quality: {rows}",
                f"{facts['date']} · {facts['machine']} · {facts['versions']} · commit {facts['commit']}",
                f"`{facts['command']}`",
                f"{len(first.losses)} steps, {first.num_rows} held-out rows. Trained with the base stored as named; merged "
                "and measured in float32 alike.",
                table(heads, summary),
                "## Seed by seed",
                table("seed | frozen base | held-out loss | exactly right | 95 % interval", each),
                f"## Loss by step, in training, seed {first.seed}",
                curve_table(curves),
            ]
        )
        + "\n"
    )


def _percent(share: float | None) -> str:
    return "not asked" if share is None else f"{share:.0%}"


def _interval(one: Learned) -> str:
    return "" if one.interval is None else f"{one.interval[0]:.0%} to {one.interval[1]:.0%}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the demo's recipe")
    add("--seeds", type=int, nargs="+", default=[42, 43, 44], help="a training of each way for each")
    add("--data", type=Path, help="rows to learn in place of the demo's")
    add("--measure", type=Path, help=argparse.SUPPRESS)
    add("--loss-only", action="store_true", help=argparse.SUPPRESS)
    add("--results", type=Path, default=RESULTS_DIR, help="the folder that the page goes to")
    add("--json", action="store_true", help="one JSON object on stdout in place of the page")
    return parser.parse_args()


if __name__ == "__main__":
    main()
