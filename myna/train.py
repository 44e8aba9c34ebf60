"""The training loop: a generator of StepReports. A terminal draws them, a test asserts them, to stop is not to ask."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from myna.adapters.files import save_adapter
from myna.adapters.methods import add_adapter, trainable_parameters
from myna.checkpoint import collect_state, load_newest, restore_state, save_checkpoint
from myna.data.packing import collate, num_steps_an_epoch, plan_packs
from myna.engine.memory import give_back_memory, peak_memory_mb
from myna.engine.optim import lr_at, make_optimizer
from myna.engine.step import make_stepper
from myna.errors import CheckFailed, Interrupted, MachineError
from myna.model.load import load_base
from myna.model.sources import Say
from myna.prepare import Prepared
from myna.run import require_room

StopAsked = Callable[[], int | None]


@dataclass(frozen=True)
class StepReport:
    """One optimizer step. `tokens` are the rows' own, `loss` is the mean over `target_tokens`, `seconds` of this step."""

    step: int
    num_steps: int
    loss: float
    learning_rate: float
    target_tokens: int
    tokens: int
    tokens_per_s: float
    grad_norm: float
    seconds: float
    peak_mb: float
    checkpoint: str | None = None

    def metrics(self) -> dict[str, Any]:
        """The line of metrics.jsonl."""
        keys = ("step", "loss", "learning_rate", "target_tokens", "tokens_per_s", "grad_norm", "peak_mb")
        return {key: getattr(self, key) for key in keys}


def train(prepared: Prepared, say: Say, stop_asked: StopAsked = lambda: None) -> Iterator[StepReport]:
    """Trains the adapter of a prepared run, from its newest good checkpoint where it has one.

    `stop_asked` is looked at after each step: a signal number ends training with a checkpoint behind and raises
    Interrupted. At the end the adapter is written. Raises CheckFailed where the loss is not finite, CheckpointError
    where every checkpoint is damaged.
    """
    recipe, plan, run = prepared.recipe, prepared.plan, prepared.run
    settings = recipe.train
    torch.set_num_threads(plan.threads)
    for half in run.checkpoints_dir.glob(".tmp-*"):  # of a process that was killed while it saved
        shutil.rmtree(half, ignore_errors=True)
    found = load_newest(run.checkpoints_dir)
    for sentence in found.said:
        say(sentence)
    model = load_base(prepared.base.folder, plan.dtype, device=plan.device)
    model = add_adapter(model, recipe.adapter, seed=settings.seed, base_name=str(prepared.base.folder))
    parameters = trainable_parameters(model)
    stepper = make_stepper(model, plan.path)
    optimizer = make_optimizer(parameters.values(), settings)
    # adapter, its gradient's two moments, for every checkpoint kept and the one being written
    num_bytes = sum(p.numel() * 4 for p in parameters.values())
    require_room(run.path, 3 * num_bytes * (settings.keep_checkpoints + 1), "the checkpoints")
    first = 1
    if found.state is not None:
        restore_state(found.state, parameters, optimizer)
        first = found.state.step + 1
        stepper.refresh()
        say(f"going on after step {found.state.step}")
    cut_metrics(run.metrics_path, first - 1)
    lengths = [len(example.input_ids_T) for example in prepared.examples]
    steps_an_epoch = num_steps_an_epoch(len(lengths), settings.batch_size)
    epoch, packs = -1, plan_packs([], seed=0, epoch=0, batch_size=1, pack_tokens=1)
    for step in range(first, plan.num_steps + 1):
        if (step - 1) // steps_an_epoch != epoch:
            epoch = (step - 1) // steps_an_epoch
            packs = plan_packs(
                lengths,
                seed=settings.seed,
                epoch=epoch,
                batch_size=settings.batch_size,
                pack_tokens=plan.pack_tokens,
            )
        started = time.perf_counter()
        batches = [
            collate([prepared.examples[r] for r in pack], share=plan.path == "fast") for pack in packs[(step - 1) % steps_an_epoch]
        ]
        num_targets = sum(len(batch.targets_N) for batch in batches)
        rate = lr_at(step, plan.num_steps, settings)
        loss_sum = 0.0
        for batch in batches:
            loss = stepper.loss(batch) / num_targets
            loss.backward()
            loss_sum += loss.detach().item()
        limit = settings.max_grad_norm or math.inf
        grad_norm = float(torch.nn.utils.clip_grad_norm_(list(parameters.values()), limit))
        if not (math.isfinite(loss_sum) and math.isfinite(grad_norm)):
            raise CheckFailed(
                f"the loss of step {step} is {loss_sum}, the norm of its gradient {grad_norm}",
                where=str(run.path),
                help="a smaller train.learning_rate in a new run; the last good checkpoint is in checkpoints/",
                code="loss",
            )
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        stepper.refresh()
        signal_number = stop_asked()
        seconds = time.perf_counter() - started
        give_back_memory()
        tokens = sum(sum(batch.lengths) for batch in batches)
        report = StepReport(
            step=step,
            num_steps=plan.num_steps,
            loss=loss_sum,
            learning_rate=rate,
            target_tokens=num_targets,
            tokens=tokens,
            tokens_per_s=round(tokens / seconds, 1),
            grad_norm=grad_norm,
            seconds=seconds,
            peak_mb=peak_memory_mb(),
        )
        # before the checkpoint: a line too many is cut on resume, a line that was never written stays missing
        append_metrics(run.metrics_path, report)
        if step % settings.save_every_steps == 0 or step == plan.num_steps or signal_number is not None:
            state = collect_state(step, parameters, optimizer, {"epoch": epoch})
            saved = save_checkpoint(run.checkpoints_dir, state, settings.keep_checkpoints)
            report = replace(report, checkpoint=saved.name)
        yield report
        if signal_number is not None and step < plan.num_steps:
            raise Interrupted(
                f"stopped after step {step} of {plan.num_steps}; {report.checkpoint} is saved",
                signal_number=signal_number,
                where=str(run.path),
                help="the same command with --resume goes on",
            )
    save_adapter(model, run.adapter_dir, base_sha256=prepared.base.sha256)


def append_metrics(path: Path, report: StepReport) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(report.metrics()) + "\n")
    except OSError as error:
        raise MachineError(
            f"could not be written: {error.strerror}",
            where=str(path),
            help="make room, then the same with --resume",
        ) from error


def cut_metrics(path: Path, last_step: int) -> None:
    """Drops the lines of steps after `last_step` (and a half-written one): a resumed run has each step once."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            step = json.loads(line)["step"]
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
        if step <= last_step:
            kept.append(line + "\n")
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


@contextlib.contextmanager
def catch_signals() -> Iterator[StopAsked]:
    """Inside, HUP, INT and TERM are noted for `train` to see at the end of a step; a second one leaves at once."""
    noted: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        if noted:
            os._exit(128 + noted[0])
        noted.append(number)

    names = ("SIGINT", "SIGTERM", "SIGHUP")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    # one that is ignored (nohup, a background job) stays ignored
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in heard}
    try:
        yield lambda: noted[0] if noted else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
