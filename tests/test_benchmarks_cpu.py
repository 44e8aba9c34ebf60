"""The pure parts of the race on a CPU: what is counted, what is divided by what, and what the pages say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from _children import ENDLESS_LOOP, Child, as_shipped, neighbour, run_child
from _laps import Course, Lap, lap_of_metrics, lap_of_peer
from _machine import machine, shown_command, workload_of
from _race import Bar, MynaVariant, PeerVariant, Race, best_peer, figures, ratio
from _race_page import Circumstances, curve_table, race_page, table
from train_cpu import PEER_VARIANTS, in_turn, peer_variant, result_of

from myna.errors import CheckFailed, MachineError

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
ENDED = Child(seconds=20.0, peak_mb=1500.0, stdout="", stderr="")
WHERE = Circumstances(
    "2026-01-02", "a CPU", {"Myna": "torch 2"}, "abc", "python benchmarks/train_cpu.py", "0.1"
)
COURSE = Course(Path("rows.jsonl"), num_steps=8, num_warm=2)


def lap(tokens_per_s: float, peak_mb: float = 1000.0, flops_per_s: float | None = None) -> Lap:
    return Lap(tokens_per_s, 600.0, (2.0, 1.5), peak_mb, 30.0, flops_per_s)


def race(**changes: object) -> Race:
    """Three rounds of two Myna variants and two of the peer; 4×2 has the best median, 2×4 the best lap."""
    quiet = {
        "Myna bf16": [lap(300, 900, 1e11), lap(330, 950, 2e11), lap(200, 900, 1.5e11)],
        "Myna int8": [lap(400, 800), lap(440, 800), lap(390, 800)],
        "TRL bf16 2×4": [lap(90, 2000), lap(150, 2000), lap(80, 2000)],
        "TRL bf16 4×2": [lap(100, 2100), lap(110, 2000), lap(95, 2000)],
    }
    made = Race(
        workload="chat",
        myna=(MynaVariant(), MynaVariant("int8")),
        peers=(PeerVariant(2, 4), PeerVariant(4, 2)),
        quiet=quiet,
        fresh_mb={"myna": 200.0, "peer": 300.0},
        product_peak=3e11,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def figure(made: Race, what: str) -> tuple[float, str]:
    (found,) = (f for f in figures(made) if f.what == what)
    return round(found.value, 6), found.verdict


def test_a_rate_is_all_tokens_over_all_seconds_after_the_warm_steps() -> None:
    lines = [(50, 1.0), (100, 10.0), (900, 2.0), (100, 2.0)]
    metrics = [{"tokens": t, "seconds": s, "loss": 1 / t, "product_flops": 1e9 * t} for t, s in lines]
    found = lap_of_metrics(metrics, 2, ENDED, "native")
    assert found.tokens_per_s == 250
    assert found.flops_per_s == 250e9
    assert found.tokens_a_step == 287.5
    assert len(found.losses) == 4 and found.losses[0] == 1 / 50
    assert (found.peak_mb, found.process_seconds, found.kernels) == (1500.0, 20.0, "native")


def test_steps_of_unlike_length_weigh_by_their_seconds() -> None:
    metrics = [{"tokens": 100, "seconds": 1.0, "loss": 1.0}, {"tokens": 100, "seconds": 4.0, "loss": 1.0}]
    assert lap_of_metrics(metrics, 0, ENDED).tokens_per_s == 40


def test_products_count_only_where_every_step_has_them() -> None:
    metrics = [{"tokens": 8, "seconds": 1.0, "loss": 1.0, "product_flops": f} for f in (None, 1e9, None)]
    assert lap_of_metrics(metrics, 1, ENDED).flops_per_s is None
    assert lap_of_metrics(metrics[:2], 1, ENDED).flops_per_s == 1e9


def test_a_lap_of_warm_steps_alone_is_refused() -> None:
    with pytest.raises(CheckFailed, match="2 steps were run, 2 of them warm"):
        lap_of_metrics([{"tokens": 1, "seconds": 1.0, "loss": 1.0}] * 2, 2, ENDED)


def test_the_peers_line_is_found_among_what_else_it_prints() -> None:
    said = {"tokens_per_s": 131.5, "tokens": 4800, "steps": 8, "loss": [2.5, 2.25], "peak_rss_mb": 7}
    stdout = f"{{'loss': 2.5}}\n{json.dumps(said)}\n100%|done\n"
    found = lap_of_peer(replace(ENDED, stdout=stdout))
    assert (found.tokens_per_s, found.tokens_a_step, found.losses) == (131.5, 600.0, (2.5, 2.25))
    assert found.peak_mb == 1500.0, "the peer's peak is measured as Myna's is, not taken from its word"


def test_a_peer_without_its_line_is_an_error_with_its_last_words() -> None:
    with pytest.raises(MachineError, match="no room left"):
        lap_of_peer(replace(ENDED, stdout="{'loss': 1}\n", stderr="no room left\n"))


def test_the_best_peer_has_the_fastest_median() -> None:
    assert best_peer(race()) == "TRL bf16 4×2"
    assert best_peer(race(peers=())) is None


def test_a_peer_in_fp32_stands_beside_the_bars_and_is_not_held_against_them() -> None:
    peers = (PeerVariant(2, 4), PeerVariant(2, 4, "fp32"))
    quiet = dict(race().quiet) | {"TRL fp32 2×4": [lap(200), lap(200), lap(200)]}
    made = race(peers=peers, quiet=quiet)
    assert best_peer(made) == "TRL bf16 2×4"
    assert figure(made, "Myna bf16: tokens/s ÷ TRL bf16 2×4")[1] == "must"
    assert figure(made, "Myna bf16: tokens/s ÷ TRL fp32 2×4") == (1.5, "")


def test_speeds_are_ratios_of_medians_with_the_spread_of_the_rounds() -> None:
    value, rounds = ratio([300, 330, 200], [100, 110, 95])
    assert value == 3.0
    assert (round(rounds.low, 3), rounds.middle, rounds.high) == (2.105, 3.0, 3.0)
    assert figure(race(), "Myna bf16: tokens/s ÷ TRL bf16 4×2") == (3.0, "must")
    assert figure(race(), "Myna int8: tokens/s ÷ TRL bf16 4×2") == (4.0, "must")
    assert figure(race(workload="snips_json"), "Myna bf16: tokens/s ÷ TRL bf16 4×2") == (3.0, "missed")
    assert figure(race(workload="other"), "Myna bf16: tokens/s ÷ TRL bf16 4×2") == (3.0, "")


def test_memory_is_compared_less_what_torch_takes_in_each_interpreter() -> None:
    what = "Myna bf16: peak memory ÷ TRL bf16 4×2, less `import torch`"
    assert figure(race(), what) == (round(700 / 1700, 6), "must")
    assert figure(race(fresh_mb={"myna": 300.0, "peer": 300.0}), what) == (round(600 / 1700, 6), "goal")


def test_the_share_of_the_peak_is_of_products_alone() -> None:
    assert figure(race(), "Myna bf16: products ÷ the float peak") == (0.5, "must")
    assert not any("Myna int8: products" in f.what for f in figures(race())), "its products were not counted"


def test_more_than_the_peak_is_void() -> None:
    what = "Myna bf16: products ÷ the float peak"
    assert figure(race(product_peak=1.4e11), what)[1] == "void"
    assert figure(race(product_peak=1.5e11), what)[1] == "goal"


def test_the_peak_that_a_training_found_is_read_back() -> None:
    line = {"tokens": 8, "seconds": 2.0, "loss": 1.0, "product_flops": 1e11, "share_of_peak": 0.25}
    assert lap_of_metrics([line], 0, ENDED).product_peak == 2e11
    assert lap_of_metrics([line | {"share_of_peak": None}], 0, ENDED).product_peak is None


def test_a_slowdown_is_quiet_over_beside() -> None:
    beside = {"Myna bf16": [lap(150), lap(100), lap(160)], "TRL bf16 4×2": [lap(20), lap(25), lap(10)]}
    made = race(beside=beside)
    assert figure(made, "Myna bf16: times slower beside one endless loop") == (2.0, "goal")
    assert figure(made, "TRL bf16 4×2: times slower beside one endless loop") == (5.0, "")
    assert figure(made, "Myna bf16: tokens/s ÷ TRL bf16 4×2, both beside one endless loop") == (7.5, "")


@pytest.mark.parametrize(
    ("value", "at_most", "verdict"),
    [
        (3.0, False, "must"),
        (2.99, False, "missed"),
        (5.0, False, "goal"),
        (3.0, True, "goal"),
        (5.0, True, "must"),
        (5.01, True, "missed"),
    ],
)
def test_bars(value: float, at_most: bool, verdict: str) -> None:
    bar = Bar(5.0, 3.0, at_most=True) if at_most else Bar(3.0, 5.0)
    assert bar.verdict(value) == verdict


def test_both_sides_take_turns() -> None:
    myna = [MynaVariant(), MynaVariant("int8"), MynaVariant(kernels="torch")]
    names = [variant.name for variant in in_turn(myna, [PeerVariant(8, 1)])]
    assert names == ["Myna bf16", "TRL bf16 8×1", "Myna int8", "Myna bf16, plain torch"]


def test_the_peers_variants_are_as_they_are_raced() -> None:
    assert [(v.micro, v.accumulate) for v in map(peer_variant, PEER_VARIANTS)] == [(2, 4), (4, 2), (8, 1)]
    assert peer_variant("2x4-fp32") == PeerVariant(2, 4, "fp32")
    for text in ("2", "2x4-fp64", "axb"):
        with pytest.raises(ValueError):
            peer_variant(text)


def test_the_page_shows_every_variant_bar_and_loss() -> None:
    fp32 = replace(lap(100), losses=(2.0001, 1.4999, 1.25))
    page = race_page(race(curves={"Myna fp32": [fp32]}), COURSE, WHERE)
    lines = page.splitlines()
    assert "| Myna bf16: tokens/s ÷ TRL bf16 4×2 | 3.00 | 2.11 to 3.00 | ≥ 3 | ≥ 5 | must |" in lines
    assert "| TRL bf16 2×4 | 90.0 | 80.0 | 150.0 | 600 | 2000 | 1700 | 30.0 | 0% |  |" in lines, (
        "the median first"
    )
    assert "| 1 | 2.0000 | 2.0000 | 2.0000 | 2.0001 |" in lines
    assert "| 3 |  |  |  | 1.2500 |" in lines
    assert "Beside one" not in page and "float product peak in this run: 300 GFLOP/s" in page
    assert "3 of each" in page and "The first 72 rows, 8 steps" in page
    assert json.loads(json.dumps(result_of(race(), COURSE, WHERE)))["figures"][0]["verdict"] == "must"


def test_a_disturbed_race_says_so() -> None:
    quiet = dict(race().quiet)
    assert "not quiet" not in race_page(race(), COURSE, WHERE)
    quiet["Myna int8"] = [lap(400), replace(lap(400), others=0.35), lap(400)]
    assert "**The machine was not quiet**: in one of the laps other processes took 35%" in race_page(
        race(quiet=quiet), COURSE, WHERE
    )


def test_tables() -> None:
    assert table("a | b", [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    assert table("a", []) == ""
    assert curve_table({"one": [1.0, 2.0], "two": [3.0]}).endswith("| 2 | 2.0000 |  |")


def test_the_command_names_no_place_of_this_machine(tmp_path: Path) -> None:
    given = (
        f"--peer-python {tmp_path}/bin/python --peer ../beside/peer.py --data {tmp_path}/chat.jsonl --json"
    )
    words = ["benchmarks/train_cpu.py", *given.split()]
    expected = "python benchmarks/train_cpu.py --peer-python PYTHON --peer peer.py --data chat.jsonl --json"
    assert shown_command(words) == expected


def test_a_workload_is_named_by_its_file_or_its_folder() -> None:
    assert workload_of(Path("rows/chat.jsonl")) == "chat"
    assert workload_of(Path("rows/snips_json/train.jsonl")) == "snips_json"


def test_the_machine_is_named() -> None:
    assert " cores (" in machine() and " GB · " in machine()


def test_what_is_measured_runs_without_settings_of_threads() -> None:
    given = {
        "OMP_NUM_THREADS": "1",
        "GOMP_SPINCOUNT": "5",
        "MYNA_KERNELS": "torch",
        "MYNA_CACHE": "c",
        "HOME": "h",
    }
    assert as_shipped(given) == {"MYNA_CACHE": "c", "HOME": "h"}


def in_a_small_process(program: str) -> str:
    """What a fresh interpreter that knows the benchmarks prints: a child is charged with its parent's peak."""
    path = f"{BENCHMARKS.parent}{os.pathsep}{BENCHMARKS}"
    variables = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=True).stdout.strip()


def test_a_childs_peak_is_its_own() -> None:
    program = (
        "import sys; from pathlib import Path; from _children import run_child\n"
        "for n in (1, 300_000_000, 1):\n"
        "    print(run_child([sys.executable, '-c', f\"b'x' * {n}\"], cwd=Path.cwd()).peak_mb)"
    )
    small, large, again = map(float, in_a_small_process(program).split())
    assert small < 100 and again < 100, "the parent and the one before do not count"
    assert 300 < large < 400


def test_a_child_runs_where_it_is_told_and_is_timed(tmp_path: Path) -> None:
    program = "import os, time; time.sleep(0.05); print(os.getcwd(), os.environ['A'])"
    done = run_child([sys.executable, "-c", program], cwd=tmp_path, variables={"A": "b"})
    assert done.stdout.split() == [str(tmp_path), "b"] and done.seconds >= 0.05


def test_a_child_that_fails_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"ended with 3:\ngone"):
        run_child(
            [sys.executable, "-c", "import sys; print('gone', file=sys.stderr); sys.exit(3)"], cwd=tmp_path
        )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_neighbour_is_busy_and_ends() -> None:
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    before = set(children.read_text().split())
    with neighbour():
        (number,) = set(children.read_text().split()) - before
        cut = run_child([sys.executable, "-c", "import time; time.sleep(0.5)"], cwd=Path.cwd())
        assert cut.others > 0.5 / (os.cpu_count() or 1), "its time is seen as that of others"
        assert ENDLESS_LOOP in Path(f"/proc/{number}/cmdline").read_text()
    assert not Path(f"/proc/{number}").exists()


def test_the_neighbour_ends_where_its_parent_was_killed() -> None:
    stranger = subprocess.run([sys.executable, "-S", "-c", ENDLESS_LOOP, "-1"], timeout=30, check=False)
    assert stranger.returncode == 0


@pytest.mark.parametrize("script", ["train_cpu.py", "scaling.py"])
def test_the_parent_stays_small(script: str) -> None:
    """A child is charged with its parent's peak, so the parent must never load torch."""
    assert in_a_small_process(f"import sys, {script[:-3]}; print('torch' in sys.modules)") == "False"
