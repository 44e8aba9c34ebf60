"""Myna's training step raced against TRL + PEFT on this CPU, in one run; the page goes to benchmarks/results/.

    python benchmarks/train_cpu.py --peer-python PYTHON --peer SCRIPT --data ROWS.jsonl

PYTHON is an interpreter of an environment of the peer's own, SCRIPT trains there and prints one JSON line with its figures.
Without a peer Myna is reported alone. Every lap is a process of its own, as it is shipped; both sides take turns.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from _children import float_peak, fresh_torch_mb, neighbour, packaged_folder  # noqa: E402
from _laps import BASE, BATCH_SIZE, Course, Lap, Peer, myna_lap, peer_lap  # noqa: E402
from _machine import (  # noqa: E402
    RESULTS_DIR,
    commit,
    load_average,
    machine,
    say,
    shown_command,
    today,
    versions,
    workload_of,
)
from _race import MynaVariant, PeerVariant, Race, best_peer, figures  # noqa: E402
from _race_page import Circumstances, race_page  # noqa: E402

from myna.errors import MynaError  # noqa: E402

Variant = MynaVariant | PeerVariant
RunLap = Callable[[Variant], Lap]

PEER_VARIANTS = ("2x4", "4x2", "8x1")
CURVES_NAME = "Myna fp32"


def main() -> None:
    arguments = _arguments()
    where = _circumstances(arguments)
    try:
        with tempfile.TemporaryDirectory(prefix="myna-race-") as scratch:
            race = run_race(arguments, Path(scratch))
    except MynaError as error:
        print(
            json.dumps({"error": error.as_json()}) if arguments.json else f"error: {error}", file=sys.stdout
        )
        sys.exit(error.exit_code)
    course = course_of(arguments)
    page, result = race_page(race, course, where), result_of(race, course, where)
    place = arguments.results / f"{where.date}-train-cpu-{race.workload}"
    arguments.results.mkdir(parents=True, exist_ok=True)
    place.with_suffix(".md").write_text(page, encoding="utf-8")
    place.with_suffix(".json").write_text(
        json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    print(json.dumps(result, ensure_ascii=False) if arguments.json else page)
    say(f"written: {place.with_suffix('.md')}")


def run_race(arguments: argparse.Namespace, scratch: Path) -> Race:
    """Every lap, in turn. Raises MachineError or CheckFailed where one fails."""
    myna = tuple(_myna_variants(arguments))
    peers = tuple(map(peer_variant, arguments.peer_variants)) if arguments.peer else ()
    fresh_mb = {"myna": fresh_torch_mb(sys.executable)}
    if peers:
        fresh_mb["peer"] = fresh_torch_mb(arguments.peer_python)
    run_lap = lap_runner(arguments, scratch)
    peaks = [float_peak()]
    quiet: dict[str, list[Lap]] = {variant.name: [] for variant in in_turn(myna, peers)}
    for _ in range(arguments.repeats):
        for variant in in_turn(myna, peers):
            quiet[variant.name].append(told(variant.name, run_lap(variant)))
        peaks.append(float_peak())
    # Myna's laps measure it themselves as well (int8's is another): the highest is the nearest to what the CPU can do
    in_float = chain.from_iterable(quiet[variant.name] for variant in myna if variant.quantize == "none")
    peaks += [lap.product_peak for lap in in_float if lap.product_peak]
    race = Race(workload_name(arguments), myna, peers, quiet, fresh_mb, max(peaks))
    beside = beside_rounds(race, arguments.repeats, run_lap) if arguments.neighbour else {}
    curves: dict[str, list[Lap]] = {}
    if arguments.curves:
        lap = myna_lap(course_of(arguments), scratch, dtype="fp32", quantize="none", kernels=None)
        curves[CURVES_NAME] = [told(CURVES_NAME, lap)]
    return replace(race, beside=beside, curves=curves)


def peer_variant(text: str) -> PeerVariant:
    """`2x4`: rows of a micro-batch, micro-batches of a step; `2x4-fp32`. ValueError where it is no such text."""
    sizes, _, precision = text.partition("-")
    micro, accumulate = sizes.split("x")
    if precision not in ("", "fp32"):
        raise ValueError(text)
    return PeerVariant(int(micro), int(accumulate), precision or "bf16")


def lap_runner(arguments: argparse.Namespace, scratch: Path) -> RunLap:
    """How a lap of either side is run."""
    course = course_of(arguments)
    peer = None
    if arguments.peer:
        paths = (arguments.peer_python.absolute(), arguments.peer.absolute())
        peer = Peer(*paths, packaged_folder(BASE, scratch))

    def run(variant: Variant) -> Lap:
        if isinstance(variant, MynaVariant):
            quantize, kernels = variant.quantize, variant.kernels
            return myna_lap(course, scratch, dtype="bf16", quantize=quantize, kernels=kernels)
        assert peer is not None
        sizes = {"micro": variant.micro, "accumulate": variant.accumulate}
        return peer_lap(course, scratch, peer, precision=variant.precision, **sizes)

    return run


def beside_rounds(race: Race, repeats: int, run_lap: RunLap) -> dict[str, list[Lap]]:
    """Myna's first variant and the peer's best, with one single-threaded endless loop beside them."""
    wanted = (race.myna[0].name, best_peer(race))
    variants = [variant for variant in in_turn(race.myna, race.peers) if variant.name in wanted]
    beside: dict[str, list[Lap]] = {variant.name: [] for variant in variants}
    for _ in range(repeats):
        for variant in variants:
            with neighbour():
                lap = run_lap(variant)
            beside[variant.name].append(told(f"{variant.name}, beside an endless loop", lap))
    return beside


def in_turn(myna: Sequence[Variant], peers: Sequence[Variant]) -> list[Variant]:
    """One of each side after the other, so that what the machine does besides meets both."""
    pairs = zip_longest(myna, peers)
    return [variant for variant in chain.from_iterable(pairs) if variant is not None]


def told(name: str, lap: Lap) -> Lap:
    """Says what a lap gave, and hands it on."""
    say(
        f"{name}: {lap.tokens_per_s:.1f} tokens/s, {lap.peak_mb:.0f} MB, process {lap.process_seconds:.1f} s, "
        f"others took {lap.others:.0%} of the cores"
    )
    return lap


def result_of(race: Race, course: Course, where: Circumstances) -> dict[str, Any]:
    """What --json prints and the .json beside the page holds."""
    found = [{**asdict(figure), "verdict": figure.verdict} for figure in figures(race)]
    steps = {
        "num_steps": course.num_steps,
        "num_warm": course.num_warm,
        "num_rows": course.num_rows,
        "batch_size": BATCH_SIZE,
    }
    laps = {"quiet": race.quiet, "beside": race.beside, "curves": race.curves}
    return {
        **asdict(where),
        "workload": race.workload,
        **steps,
        "best_peer": best_peer(race),
        "figures": found,
        "fresh_torch_mb": dict(race.fresh_mb),
        "float_product_peak_flops_per_s": race.product_peak,
        "laps": {
            kind: {name: [asdict(lap) for lap in done] for name, done in these.items()}
            for kind, these in laps.items()
        },
    }


def _myna_variants(arguments: argparse.Namespace) -> list[MynaVariant]:
    kernels = [None, "torch"] if arguments.without_compiler else [None]
    return [MynaVariant(quantize, kind) for kind in kernels for quantize in arguments.quantize]


def course_of(arguments: argparse.Namespace) -> Course:
    return Course(arguments.data.resolve(), arguments.steps, arguments.warm)


def workload_name(arguments: argparse.Namespace) -> str:
    return arguments.name or workload_of(arguments.data)


def _circumstances(arguments: argparse.Namespace) -> Circumstances:
    pythons: Mapping[str, str | Path] = {"Myna": sys.executable} | (
        {"peer": arguments.peer_python} if arguments.peer else {}
    )
    shown = {
        side: ", ".join(f"{n} {v}" for n, v in versions(python).items()) for side, python in pythons.items()
    }
    return Circumstances(today(), machine(), shown, commit(), shown_command(sys.argv), load_average())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="rows: prompt and answer, or messages")
    add("--peer", type=Path, help="the peer's script")
    add("--peer-python", type=Path, help="the interpreter of the peer's environment")
    add("--peer-variants", nargs="+", default=PEER_VARIANTS, metavar="MICROxACCUMULATE[-fp32]")
    add(
        "--quantize", nargs="+", choices=("none", "int8"), default=["none", "int8"], help="Myna's frozen base"
    )
    add("--without-compiler", action="store_true", help="Myna with plain torch besides")
    add("--neighbour", action="store_true", help="bf16 and the peer's best besides one endless loop, too")
    add("--curves", action="store_true", help="a lap in fp32 at the end, for its losses")
    add("--steps", type=int, default=8, help="of each lap")
    add("--warm", type=int, default=2, help="first steps that are not counted, on both sides")
    add("--repeats", type=int, default=3, help="laps of each variant")
    add(
        "--name",
        help="of the workload, in the page's name; default: the file's, or its folder's where it is train",
    )
    add("--results", type=Path, default=RESULTS_DIR, help="the folder that the page goes to")
    add("--json", action="store_true", help="one JSON object on stdout in place of the page")
    arguments = parser.parse_args()
    if bool(arguments.peer) != bool(arguments.peer_python):
        parser.error("--peer and --peer-python belong together")
    if any(v.micro * v.accumulate != BATCH_SIZE for v in map(peer_variant, arguments.peer_variants)):
        parser.error(f"every step has {BATCH_SIZE} rows: 2x4, 4x2, 8x1, 1x8")
    if not 0 <= arguments.warm < arguments.steps or arguments.repeats < 1:
        parser.error("--warm must be below --steps, --repeats at least 1")
    return arguments


if __name__ == "__main__":
    main()
