"""What is promised of checkpoints, each shown by doing it to runs. A proof returns what it did and what it saw break."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from myna.checkpoint import MANIFEST, leftovers, list_checkpoints, verify_checkpoint
from myna.run import Run
from survival.nursery import Job, Life, Nursery
from survival.runs import Kind, doubled_steps, outcome, write_run

TORCH = {"MYNA_KERNELS": "torch"}  # the C kernels are tried before their first use: a second of each life
PHASES = ("loading", "saving", "saving", "pruning", "pruning", "finishing")  # that are aimed at
LONGEST_LIFE = 1.5  # seconds, at most, until a kill
MOST_LIVES = 30  # without a step more: then the run is stuck
STOPS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}


@dataclass
class Shown:
    """How often something was tried, how often it held, and what was seen."""

    tried: int = 0
    held: int = 0
    broken: list[str] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)

    def note(self, name: str, broken: Iterable[str]) -> None:
        faults = list(broken)
        self.tried += 1
        self.held += not faults
        self.broken += [f"{name}: {fault}" for fault in faults]

    def as_json(self) -> dict[str, Any]:
        return {
            "tried": self.tried,
            "held": self.held,
            "broken": self.broken,
            "seen": dict(sorted(self.seen.items())),
        }


def straight(nursery: Nursery, recipe: Path, environment: dict[str, str]) -> dict[str, Any]:
    """What a run comes to that nothing happens to."""
    life = nursery.run(Job(["train", str(recipe)], str(recipe.parent), environment=environment))
    assert life.code == 0, life.said
    return outcome(Run(recipe.with_suffix("")))


def differences(run: Run, expected: dict[str, Any]) -> list[str]:
    """In what a finished run is not what it should be."""
    found = outcome(run)
    faults = [f"{key} differs" for key in expected if found[key] != expected[key]]
    faults += [f"step {step} is doubled" for step in doubled_steps(run)]
    faults += [
        f"{path.name}: {fault}"
        for path in list_checkpoints(run.checkpoints_dir)
        if (fault := verify_checkpoint(path))
    ]
    return faults


def go_on(nursery: Nursery, recipe: Path, environment: dict[str, str], **how: Any) -> Life:
    """One life of a run that is resumed; how it is ended by `how`."""
    return nursery.run(
        Job(["train", str(recipe), "--resume"], str(recipe.parent), environment=environment, **how)
    )


# 1


def exactness(
    nursery: Nursery,
    folder: Path,
    base: Path,
    kinds: Iterable[Kind],
    *,
    cuts: int,
    seed: int,
    environment: dict[str, str],
) -> Shown:
    """Runs that are cut at random steps, by a kill or a signal in turns, against ones that are not."""
    shown, draw = Shown(), random.Random(seed)
    for number, kind in enumerate(kinds):
        place = folder / f"exact-{number}"
        saving = {"train": {"save_every_steps": 3}}
        expected = straight(nursery, write_run(place, base, kind, name="straight", **saving), environment)
        for cut in range(cuts):
            recipe = write_run(place, base, kind, name=f"cut-{cut}", **saving)
            steps = [draw.randint(1, 5), draw.randint(1, 5)]
            faults = []
            for step in steps:  # of each process
                if draw.random() < 0.5:
                    life = go_on(nursery, recipe, environment, fail_call=1, dies=True, after_step=step)
                    wanted = -signal.SIGKILL
                else:
                    life = go_on(nursery, recipe, environment, number=signal.SIGTERM, stop_step=step)
                    wanted = 143
                if life.code != wanted:
                    faults.append(f"ended with {life.code} and not {wanted}: {life.said[-300:]}")
                shown.seen["killed" if wanted < 0 else "stopped"] += 1
            life = go_on(nursery, recipe, environment)
            faults += [life.said[-500:]] if life.code else differences(Run(recipe.with_suffix("")), expected)
            shown.note(f"{kind.name}, cut after {steps}", faults)
    return shown


# 2


def kills(
    nursery: Nursery, folder: Path, base: Path, *, times: int, seed: int, phases: Sequence[str] = PHASES
) -> Shown:
    """SIGKILL at random moments, and as soon as a phase is entered, over runs that save at every step, until `times`."""
    shown, draw = Shown(), random.Random(seed)
    kind = Kind(
        "killed", {"train": {"epochs": 2, "save_every_steps": 1}, "data": {"validation_fraction": 0.1}}
    )
    expected = straight(nursery, write_run(folder / "killed", base, kind, name="straight"), TORCH)
    number = 0
    while shown.seen["kills"] < times:
        number += 1
        recipe = write_run(folder / "killed", base, kind, name=f"run-{number}")
        shown.note(recipe.stem, _killed_until_done(nursery, recipe, expected, shown, draw, times, phases))
    return shown


def _killed_until_done(
    nursery: Nursery,
    recipe: Path,
    expected: dict[str, Any],
    shown: Shown,
    draw: random.Random,
    times: int,
    phases: Sequence[str],
) -> list[str]:
    run, at_step, lives = Run(recipe.with_suffix("")), 0, 0
    while True:
        how = _moment(draw, phases) if shown.seen["kills"] < times else {}
        life = go_on(nursery, recipe, TORCH, **how)
        if life.code == 0:
            return differences(run, expected)
        if life.code != -signal.SIGKILL:
            return [f"needs a hand (exit {life.code}): {life.said[-500:]}"]
        shown.seen["kills"] += 1
        shown.seen[f"in {life.phase}"] += 1
        step = max((int(path.name[5:]) for path in list_checkpoints(run.checkpoints_dir)), default=0)
        at_step, lives = (step, 0) if step > at_step else (at_step, lives + 1)
        if lives > MOST_LIVES:
            return [f"is stuck after step {at_step}"]


def _moment(draw: random.Random, phases: Sequence[str]) -> dict[str, Any]:
    """Half of the kills at any moment of a life, half soon after a phase is entered."""
    if draw.random() < 0.5:
        return {"kill_after": draw.uniform(0.0, LONGEST_LIFE)}
    return {"in_phase": draw.choice(phases), "kill_after": draw.choice((0.0, draw.uniform(0.0, 0.02)))}


# 3

REMOVALS = ("shutil.rmtree", "os.rmdir", "os.unlink")


def failpoints(nursery: Nursery, folder: Path, base: Path, *, every: int = 1) -> Shown:
    """Each call that changes the disk in one save, made to fail and made the last: the next process has what it needs.

    `every` takes one of so many.
    """
    shown = Shown()
    kind = Kind("failing", {"train": {"epochs": 1, "save_every_steps": 1, "keep_checkpoints": 2}})
    expected = straight(nursery, write_run(folder / "failing", base, kind, name="straight"), TORCH)
    recipe, calls = write_run(folder / "failing", base, kind, name="counted"), folder / "calls"
    go_on(nursery, recipe, TORCH, calls_to=str(calls), after_step=4)
    names = [line.split()[1] for line in calls.read_text().splitlines()]
    for number in range(1, len(names) + 1, every):
        for dies in (False, True):
            recipe = write_run(folder / "failing", base, kind, name=f"{'dies' if dies else 'fails'}-{number}")
            call = names[number - 1]
            name = f"{call} (call {number} of {len(names)}) {'is the last' if dies else 'fails'}"
            shown.note(name, _failing(nursery, recipe, expected, number, call, dies=dies))
            shown.seen[f"{call} {'kills' if dies else 'failures'}"] += 1
    return shown


def _failing(
    nursery: Nursery, recipe: Path, expected: dict[str, Any], number: int, call: str, *, dies: bool
) -> list[str]:
    """A disk that is full and one that is broken, by turns."""
    calls, fault = recipe.with_suffix(".calls"), (errno.ENOSPC, errno.EIO)[number % 2]
    how: dict[str, Any] = {"fail_call": number, "errno": fault, "dies": dies, "after_step": 4}
    life = go_on(nursery, recipe, TORCH, calls_to=str(calls), **how)
    run, faults = Run(recipe.with_suffix("")), list[str]()
    came = calls.read_text().splitlines()[number - 1 : number]
    if not came or came[0].split()[1] != call:
        return [f"another call came: {came}"]
    # what is removed comes after the commit: it is left for the next process, and need not be told
    removes = call in REMOVALS or ".tmp-pruned-" in came[0]
    if not dies and not removes and os.strerror(fault) not in life.said:
        faults.append(f"not said: {life.said[-500:]}")
    if dies:
        if life.code != -signal.SIGKILL:
            return [f"the kill did not come (exit {life.code})"]
        steps = [
            path.name for path in list_checkpoints(run.checkpoints_dir) if verify_checkpoint(path) is None
        ]
        if not steps or steps[-1] not in ("step-000003", "step-000004"):
            faults.append(f"left {steps}")
        life = go_on(nursery, recipe, TORCH)
        if "is damaged" in life.said:
            faults.append("a kill left a checkpoint that looked whole by its name")
    if life.code:
        return [*faults, f"exit {life.code}: {life.said[-500:]}"]
    faults += [f"left {path.name}" for path in leftovers(run.checkpoints_dir)] if dies else []
    return faults + differences(run, expected)


# 4


def _flipped(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    place = draw.randrange(len(data) * 8)
    data[place // 8] ^= 1 << place % 8
    path.write_bytes(data)


def _zeroed(path: Path, _: random.Random) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def _truncated(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def _swapped(path: Path, _: random.Random) -> None:
    shutil.copyfile(path.parent.with_name("step-000006") / path.name, path)


def _all_swapped(path: Path, _: random.Random) -> None:
    """Every file beside it is another checkpoint's, and what that one's manifest says."""
    shutil.rmtree(path.parent)
    shutil.copytree(path.parent.with_name("step-000003"), path.parent)


def _made_folder(path: Path, _: random.Random) -> None:
    path.unlink()
    path.mkdir()


Harms = dict[str, Callable[[Path, random.Random], None]]
DAMAGES: Harms = {
    "truncated": _truncated,
    "zeroed": _zeroed,
    "missing": lambda path, _: path.unlink(),
    "one bit flipped": _flipped,
    "swapped with another checkpoint's": _swapped,
}
# benchmarks/resume_peer.py has the ways above only
MORE_DAMAGES: Harms = {"emptied": lambda path, _: os.truncate(path, 0), "a folder": _made_folder}
OF_MANIFEST: Harms = {"and all others swapped": _all_swapped}
FILES = ("adapter.safetensors", "optimizer.safetensors", "state.json", MANIFEST)


def damage(
    nursery: Nursery, folder: Path, base: Path, *, seed: int, files: Iterable[str] = FILES, more: bool = True
) -> Shown:
    """Each file of the newest checkpoint in each way: set aside by name, and the run goes on from the one before."""
    shown, draw = Shown(), random.Random(seed)
    kind = Kind("damaged", {"train": {"save_every_steps": 3}})
    expected = straight(nursery, write_run(folder / "damaged", base, kind, name="straight"), TORCH)
    stopped = write_run(folder / "damaged", base, kind, name="stopped")
    life = go_on(nursery, stopped, TORCH, number=signal.SIGTERM, stop_step=8)
    assert life.code == 143, life.said
    for name in files:
        others = MORE_DAMAGES | (OF_MANIFEST if name == MANIFEST else {})
        for harm, do in (DAMAGES | (others if more else {})).items():
            recipe = write_run(folder / "damaged", base, kind, name="stopped")
            run, copy = Run(recipe.with_suffix("")), Run(folder / "damaged/kept")
            if not copy.path.exists():
                shutil.copytree(run.path, copy.path)
            shutil.rmtree(run.path)
            shutil.copytree(copy.path, run.path)
            do(run.checkpoints_dir / "step-000008" / name, draw)
            life = go_on(nursery, recipe, TORCH)
            said = next((line for line in life.said.splitlines() if "is damaged" in line), "")
            faults = (
                [] if "step-000008" in said and name in said else [f"not said: {said or life.said[-300:]}"]
            )
            faults += [] if "going on after step 6" in life.said else ["did not fall back to step 6"]
            faults += [life.said[-300:]] if life.code else differences(run, expected)
            shown.note(f"{name} {harm}", faults)
    return shown


# 6


def second_signal(nursery: Nursery, folder: Path, base: Path) -> list[str]:
    """One of each, twice in one step: it leaves at once with the first one's code, and what was saved before is used."""
    kind, faults = Kind("hurried", {"train": {"save_every_steps": 3}}), list[str]()
    expected = straight(nursery, write_run(folder / "hurried", base, kind, name="straight"), TORCH)
    for sent, code in STOPS.items():
        recipe = write_run(folder / "hurried", base, kind, name=f"run-{code}")
        run = Run(recipe.with_suffix(""))
        life = go_on(nursery, recipe, TORCH, number=sent, stop_step=5, times=2)
        saved = [path.name for path in list_checkpoints(run.checkpoints_dir)]
        if life.code != code or saved != ["step-000003"]:
            faults.append(f"{signal.Signals(sent).name}: exit {life.code} with {saved}")
        life = go_on(nursery, recipe, TORCH)
        faults += [f"exit {life.code}: {life.said[-300:]}"] if life.code else differences(run, expected)
    return faults


def signals(
    nursery: Nursery, folder: Path, base: Path, *, times: int, seed: int, longest: float = 1.5
) -> Shown:
    """Stopped by each signal at random moments: the code is right, it is quick, and the run goes on to the same end."""
    shown, draw = Shown(), random.Random(seed)
    kind = Kind(
        "signalled", {"train": {"epochs": 2, "save_every_steps": 5}, "data": {"validation_fraction": 0.1}}
    )
    expected = straight(nursery, write_run(folder / "signalled", base, kind, name="straight"), TORCH)
    for number in range(3 * times):
        if shown.tried == times:
            break
        recipe = write_run(folder / "signalled", base, kind, name=f"run-{number}")
        sent, faults = list(STOPS)[number % 3], list[str]()
        how: dict[str, Any] = {"kill_after": draw.uniform(0.05, longest)}
        if number % 2:
            how = {
                "in_phase": draw.choice(("preparing", "loading", "stepping", "saving")),
                "kill_after": draw.uniform(0, 0.05),
            }
        life = go_on(nursery, recipe, TORCH, number=sent, **how)
        if not life.stopped_in:
            shown.seen["too late to be sent"] += 1
            continue
        shown.seen[f"in {life.stopped_in}"] += 1
        # one that comes when all is done may find nobody who listens
        if life.code != STOPS[sent] and (life.code or life.stopped_in not in ("starting", "finishing")):
            faults.append(f"exit {life.code} after {signal.Signals(sent).name}: {life.said[-300:]}")
        if life.steps_after > 1:  # one may begin between the look at the signal and its coming
            faults.append(f"took {life.steps_after} steps more in {life.stopped_in}")
        if life.stopping_seconds > 2.0:  # a second, and a step of a tiny run on a busy machine
            faults.append(f"took {life.stopping_seconds} s in {life.stopped_in}")
        life = go_on(nursery, recipe, TORCH)
        faults += (
            [f"exit {life.code}: {life.said[-300:]}"]
            if life.code
            else differences(Run(recipe.with_suffix("")), expected)
        )
        shown.note(f"{signal.Signals(sent).name} {how}", faults)
    return shown
