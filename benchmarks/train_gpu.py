"""Myna's training step raced on a GPU: Llama shapes of random weights, LoRA r 16 on all linear layers, by tokens a step.

    python benchmarks/train_gpu.py [--shapes 1b 8b] [--tokens 2048 8192] [--peer-python PYTHON]
    python benchmarks/train_gpu.py --tiny --device cpu      the whole flow on a tiny shape: no figure of it means anything

Against transformers + peft, padded and row by row; in an environment of their own TRL with Liger, and Unsloth, where they
are installed in it. Every lap is a process of its own; the sides take turns. The page goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from _children import run_child  # noqa: E402
from _machine import RESULTS_DIR, commit, machine, say, shown_command, today, versions  # noqa: E402
from _race import spread  # noqa: E402
from _race_page import table  # noqa: E402

from myna.errors import MachineError, MynaError  # noqa: E402

LAP = ROOT / "benchmarks" / "_gpu_lap.py"
NAMES = {
    "myna": "Myna, packed",
    "padded": "transformers + peft, padded",
    "unpacked": "transformers + peft, row by row",
    "trl-liger": "TRL + Liger, padded",
    "unsloth": "Unsloth, padded",
}
NEEDED = {"trl-liger": ("trl", "liger_kernel"), "unsloth": ("unsloth", "trl")}
LOOK = """
import json, torch
if torch.cuda.is_available():
    facts = torch.cuda.get_device_properties(0)
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    print(json.dumps({"name": facts.name, "memory": facts.total_memory, "dtype": "bf16" if bf16 else "fp16"}))
else:
    print("null")
"""


@dataclass(frozen=True)
class Course:
    """What every lap of one table has in common."""

    shape: str
    tokens: int
    dtype: str
    device: str
    steps: int
    warm: int
    checkpointing: bool


@dataclass(frozen=True)
class Lap:
    """What one lap gave; None where the device's memory did not suffice."""

    tokens_per_s: float | None
    peak_mb: float | None
    losses: tuple[float, ...] = ()
    detail: str = ""


Laps = dict[str, list[Lap]]  # by variant


def main() -> None:
    arguments = _arguments()
    try:
        device = look_at_device(arguments.device)
        missing = missing_peers(arguments.peer_python)
        races = run_races(arguments, device["dtype"], [v for v in NAMES if v not in missing])
    except MynaError as error:
        print(json.dumps({"error": error.as_json()}) if arguments.json else f"error: {error}")
        sys.exit(error.exit_code)
    facts = circumstances(arguments, device)
    result = facts | {"left_out": missing, "races": [_as_json(*race) for race in races]}
    arguments.results.mkdir(parents=True, exist_ok=True)
    place = arguments.results / f"{facts['date']}-train-gpu{'-tiny' if arguments.tiny else ''}"
    text = page(facts, missing, races)
    place.with_suffix(".md").write_text(text, encoding="utf-8")
    place.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result) if arguments.json else text)
    say(f"written: {place.with_suffix('.md')}")


def look_at_device(device: str) -> dict[str, Any]:
    """Name, memory and number format of what is raced on. MachineError where there is no such device."""
    if device == "cpu":
        return {"name": "a CPU: the flow alone is tried", "memory": 0, "dtype": "fp32"}
    found = json.loads(run_child([sys.executable, "-c", LOOK], cwd=ROOT).stdout)
    if found is None:
        raise MachineError(
            "torch sees no CUDA device here",
            where="benchmarks/train_gpu.py",
            help="run it on a machine with one; --tiny --device cpu tries the flow",
        )
    assert isinstance(found, dict)
    return found


def missing_peers(python: Path | None) -> dict[str, str]:
    """By peer that cannot be raced: why."""
    if python is None:
        return dict.fromkeys(NEEDED, "no --peer-python was given")
    missing = {}
    for peer, modules in NEEDED.items():
        find = f"import importlib.util as u; print([m for m in {modules!r} if u.find_spec(m) is None])"
        absent = run_child([python, "-c", find], cwd=ROOT).stdout.strip()
        if absent != "[]":
            missing[peer] = f"not installed there: {absent}"
    return missing


def run_races(
    arguments: argparse.Namespace, dtype: str, variants: Sequence[str]
) -> list[tuple[Course, Laps]]:
    """Every lap, in turn. MachineError with a lap's last words where one fails for another reason than memory."""
    races = []
    for shape in ["tiny"] if arguments.tiny else arguments.shapes:
        for tokens in arguments.tokens:
            settings = (arguments.device, arguments.steps, arguments.warm, arguments.checkpointing)
            course, laps = Course(shape, tokens, dtype, *settings), {name: [] for name in variants}
            for _ in range(arguments.repeats):
                for name in variants:
                    laps[name].append(run_lap(course, name, arguments.peer_python))
                    say(
                        f"{shape}, {tokens:,} tokens, {NAMES[name]}: {_shown(laps[name][-1].tokens_per_s)} tokens/s"
                    )
            races.append((course, laps))
    return races


def run_lap(course: Course, variant: str, peer_python: Path | None) -> Lap:
    python = peer_python if variant in NEEDED else Path(sys.executable)
    assert python is not None
    given = asdict(course) | {"variant": variant, "micro": 1 if variant == "unpacked" else 8}
    variables = {"PYTHONPATH": str(ROOT)} if variant == "myna" else {}
    child = run_child(
        [python, LAP, json.dumps(given)], cwd=ROOT, variables=variables | {"HF_HUB_OFFLINE": "1"}
    )
    said = json.loads(child.stdout.strip().splitlines()[-1])
    if said.get("out_of_memory"):
        return Lap(None, None, detail="out of memory")
    peak = said.get("peak_mb", child.peak_mb)
    return Lap(said["tokens_per_s"], peak, tuple(said["losses"]), said["detail"])


def page(facts: Mapping[str, Any], missing: Mapping[str, str], races: Sequence[tuple[Course, Laps]]) -> str:
    """The result as Markdown: medians, with the lowest and the highest rate."""
    lines = [
        f"# Training on a GPU, {facts['date']}",
        f"{facts['device']} · {facts['machine']} · {'; '.join(facts['versions'])} · commit {facts['commit']}",
        f"`{facts['command']}`",
        "LoRA r 16 on all linear layers of random weights; eight rows of random tokens a step, half of each in the loss. "
        "tokens/s are the rows' own. Each lap is a process of its own, the sides take turns.",
    ]
    for course, laps in races:
        again = ", layers run again in the backward" if course.checkpointing else ""
        lines.append(f"## {course.shape}, {course.tokens:,} tokens a step, {course.dtype}{again}")
        lines.append(_table(laps, course.device))
    lines += [f"{NAMES[peer]} was not raced: {why}." for peer, why in missing.items()]
    return "\n\n".join(lines) + "\n"


def _table(laps: Laps, device: str) -> str:
    base = _middle([lap.tokens_per_s for lap in laps["myna"]])
    rows = []
    for name, done in laps.items():
        rates = [lap.tokens_per_s for lap in done if lap.tokens_per_s is not None]
        rate, peak = _middle([lap.tokens_per_s for lap in done]), _middle([lap.peak_mb for lap in done])
        between = f"{min(rates):,.0f} to {max(rates):,.0f}" if rates else ""
        ratio = f"{base / rate:.2f}" if base and rate else ""
        rows.append([NAMES[name], _shown(rate), between, ratio, _shown(peak), done[0].detail])
    kind = "peak RSS, MB" if device == "cpu" else "peak allocated, MB"
    return table(f"side | tokens/s | lowest to highest | Myna ÷ it | {kind} | ", rows)


def _middle(values: Sequence[float | None]) -> float | None:
    """The median; None where one lap ran out of memory."""
    known = [value for value in values if value is not None]
    return spread(known).middle if len(known) == len(values) else None


def _shown(value: float | None) -> str:
    return "out of memory" if value is None else f"{value:,.0f}"


def circumstances(arguments: argparse.Namespace, device: Mapping[str, Any]) -> dict[str, Any]:
    """Where, when and with what."""
    pythons = {"Myna": Path(sys.executable)} | (
        {"peers": arguments.peer_python} if arguments.peer_python else {}
    )
    memory = f", {device['memory'] / 1e9:.0f} GB" if device["memory"] else ""
    return {
        "date": today(),
        "device": f"{device['name']}{memory}",
        "machine": machine(),
        "versions": [
            f"{side}: {', '.join(f'{n} {v}' for n, v in versions(python).items())}"
            for side, python in pythons.items()
        ],
        "commit": commit(),
        "command": shown_command(sys.argv),
    }


def _as_json(course: Course, laps: Laps) -> dict[str, Any]:
    return asdict(course) | {"laps": {name: [asdict(lap) for lap in done] for name, done in laps.items()}}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shapes", nargs="+", choices=("1b", "8b"), default=["1b", "8b"])
    add("--tokens", nargs="+", type=int, default=[2048, 8192], help="of a step, in one pack")
    add("--steps", type=int, default=8, help="of each lap that are counted")
    add("--warm", type=int, default=3, help="steps before them")
    add("--repeats", type=int, default=3, help="laps of each side")
    add("--checkpointing", action="store_true", help="every side runs its layers again in the backward")
    add("--peer-python", type=Path, help="the interpreter of an environment with TRL and Liger, or Unsloth")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--tiny", action="store_true", help="a tiny shape, to try the flow")
    add("--results", type=Path, default=RESULTS_DIR, help="the folder that the page goes to")
    add("--json", action="store_true", help="one JSON object on stdout in place of the page")
    arguments = parser.parse_args()
    if arguments.device == "cpu" and not arguments.tiny:
        parser.error("--device cpu goes with --tiny")
    if arguments.repeats < 1 or arguments.steps < 1 or min(arguments.tokens) < 128:
        parser.error("--repeats and --steps are at least 1, --tokens at least 128")
    return arguments


if __name__ == "__main__":
    main()
