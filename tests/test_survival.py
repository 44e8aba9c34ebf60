"""Runs that are cut, killed, damaged and stopped: a bounded form of what scripts/reliability.py shows in full."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from survival import full_disk, proofs
from survival.nursery import Nursery, nursery
from survival.proofs import TORCH, Shown
from survival.runs import Kind, kinds, outcome, write_run

from myna.run import Run

pytestmark = pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="children are forked")


@pytest.fixture(scope="module")
def forks() -> Iterator[Nursery]:
    with nursery() as found:
        yield found


def holds(shown: Shown) -> Shown:
    assert shown.tried and shown.held == shown.tried, "\n".join(shown.broken)
    return shown


def test_a_run_that_is_cut_is_the_run_that_was_not(forks: Nursery, tmp_path: Path, tiny_base: Path) -> None:
    """With the kernels that this machine has, several packs a step, dropout, an int8 base; stopped and killed."""
    (kind,) = [kind for kind in kinds() if kind.name == "packed, four packs, dropout 0.1, int8"]
    shown = proofs.exactness(forks, tmp_path, tiny_base, [kind], cuts=1, seed=2, environment={})
    assert holds(shown).seen.keys() == {"killed", "stopped"}


@pytest.mark.slow
def test_runs_of_every_kind_are_not_cut(forks: Nursery, tmp_path: Path, tiny_base: Path) -> None:
    holds(proofs.exactness(forks, tmp_path, tiny_base, kinds(), cuts=1, seed=3, environment=TORCH))


def test_kills_need_no_hand(forks: Nursery, tmp_path: Path, tiny_base: Path) -> None:
    assert holds(proofs.kills(forks, tmp_path, tiny_base, times=6, seed=4)).seen["kills"] == 6


@pytest.mark.slow
def test_many_kills_need_no_hand_and_land_everywhere(forks: Nursery, tmp_path: Path, tiny_base: Path) -> None:
    seen = holds(proofs.kills(forks, tmp_path, tiny_base, times=40, seed=5)).seen
    assert {"in loading", "in saving", "in stepping"} <= seen.keys(), (
        "kills that miss what matters prove nothing"
    )


def test_calls_of_a_save_that_fail_or_are_the_last(forks: Nursery, tmp_path: Path, tiny_base: Path) -> None:
    holds(proofs.failpoints(forks, tmp_path, tiny_base, every=16))


@pytest.mark.slow
def test_every_call_of_a_save_fails_and_is_the_last_once(
    forks: Nursery, tmp_path: Path, tiny_base: Path
) -> None:
    shown = holds(proofs.failpoints(forks, tmp_path, tiny_base))
    assert shown.tried >= 60, "a save is some thirty-five calls"
    names = {name.removesuffix(" kills").removesuffix(" failures") for name in shown.seen}
    assert names >= {
        "open",
        "write",
        "os.fsync",
        "os.replace",
        "os.mkdir",
        "safetensors",
        "safetensors_half",
        "shutil.rmtree",
    }


def test_a_damaged_file_is_named_and_the_run_falls_back(
    forks: Nursery, tmp_path: Path, tiny_base: Path
) -> None:
    assert holds(proofs.damage(forks, tmp_path, tiny_base, seed=6, files=["state.json"])).tried == 7


@pytest.mark.slow
def test_every_file_damaged_in_every_way(forks: Nursery, tmp_path: Path, tiny_base: Path) -> None:
    assert holds(proofs.damage(forks, tmp_path, tiny_base, seed=7)).tried == 29


def test_signals_at_any_moment(forks: Nursery, tmp_path: Path, tiny_base: Path) -> None:
    holds(proofs.signals(forks, tmp_path, tiny_base, times=3, seed=8))


@pytest.mark.slow
def test_a_second_signal_leaves_at_once(forks: Nursery, tmp_path: Path, tiny_base: Path) -> None:
    assert proofs.second_signal(forks, tmp_path, tiny_base) == []


def test_a_signal_in_the_last_step_loses_nothing(forks: Nursery, tmp_path: Path, tiny_base: Path) -> None:
    """Its validation loss is taken by the next process, and the last checkpoint knows of it as the undisturbed one does."""
    kind = Kind("last", {"train": {"save_every_steps": 5}, "data": {"validation_fraction": 0.1}})
    expected = proofs.straight(forks, write_run(tmp_path, tiny_base, kind, name="straight"), TORCH)
    recipe = write_run(tmp_path, tiny_base, kind, name="stopped")
    life = proofs.go_on(forks, recipe, TORCH, number=signal.SIGINT, stop_step=expected["step"])
    assert life.code == 130, life.said
    life = proofs.go_on(forks, recipe, TORCH)
    assert life.code == 0, life.said
    run = Run(recipe.with_suffix(""))
    assert outcome(run)["facts"]["progress"] == expected["facts"]["progress"]
    assert not proofs.differences(run, expected)


@pytest.mark.slow
def test_a_small_disk_that_is_full(forks: Nursery, tmp_path: Path, tiny_base: Path) -> None:
    try:
        holds(full_disk.full_disk(forks, tmp_path, tiny_base))
    except full_disk.NoMount as error:
        pytest.skip(f"no disk can be mounted here: {error}")
