"""The training loop: a generator of StepReports. A terminal draws them, a test asserts them, to stop is not to ask."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from myna.adapters.files import save_adapter
from myna.checkpoint import list_checkpoints, read_snapshot, step_of, verify_checkpoint
from myna.engine.memory import collector_at_rest, memory_mb, peak_memory_mb
from myna.engine.optim import lr_at
from myna.errors import CheckpointError, Interrupted
from myna.metrics import StepReport, last_line
from myna.model.sources import Say
from myna.prepare import Prepared
from myna.ready import Ready, make_ready
from myna.signals import StopAsked
from myna.steps import Packs, collate_step, planned_steps
from myna.take_step import take_step
from myna.trial import room_required
from myna.validation import validation_loss

TIDY_EVERY = 50  # steps between two runs of the garbage collector


def train(prepared: Prepared, say: Say, stop_asked: StopAsked = lambda: None) -> Iterator[StepReport]:
    """Trains the adapter of a prepared run, from its newest good checkpoint where it has one."""
    yield from train_on(make_ready(prepared, say), stop_asked)


def train_on(ready: Ready, stop_asked: StopAsked) -> Iterator[StepReport]:
    """Takes the steps that are left, and writes the adapter at the end.

    `stop_asked` is looked at after each step, and while the validation loss is taken: a signal number ends training with a
    checkpoint behind and raises Interrupted. Raises CheckFailed where the loss or its gradient is not finite, MachineError
    where no checkpoint can be saved.
    """
    prepared, plan = ready.prepared, ready.prepared.plan
    _validate_late(ready, stop_asked)
    with collector_at_rest(), room_required(plan):
        for step, epoch, packs in planned_steps(prepared, ready.position.step + 1):
            report = _take(ready, step, packs)
            ready.position.step, ready.position.epoch = step, epoch
            _add_line(ready, report.metrics())
            signal_number, is_last = stop_asked(), step == plan.num_steps
            stopped = signal_number is not None and not is_last
            if ready.saver.is_due(step, signal_number):
                if prepared.validation and not stopped:
                    loss = _validate(ready, step, stop_asked)
                    stopped = loss is None
                    report = replace(report, validation_loss=loss)
                report = replace(report, checkpoint=ready.saver.save(step, is_last=is_last or stopped))
            yield report
            if stopped:
                _stop(ready, stop_asked() or signal_number)
    _finish(ready)


def _take(ready: Ready, step: int, packs: Packs) -> StepReport:
    """One step and what is known of it."""
    prepared, plan, scaling = ready.prepared, ready.prepared.plan, ready.scaling
    started = time.perf_counter()
    rate = lr_at(step, plan.num_steps, prepared.recipe.train)
    batches = collate_step(prepared, step, packs)
    loss, grad_norm = take_step(
        prepared, step, ready.stepper, ready.adapter, packs, batches, rate, scaling.now
    )
    seconds = time.perf_counter() - started
    if step % TIDY_EVERY == 0:
        gc.collect()
    ready.freed.give_back_excess()
    flops = [ready.stepper.product_flops(batch) for batch in batches]
    report = StepReport(
        step=step,
        num_steps=plan.num_steps,
        loss=loss,
        learning_rate=rate,
        target_tokens=sum(len(batch.targets_N) for batch in batches),
        tokens=sum(sum(batch.lengths) for batch in batches),
        grad_norm=grad_norm,
        seconds=round(seconds, 6),
        num_packs=len(batches),
        product_flops=None if None in flops else sum(f for f in flops if f is not None),
        peak_flops=ready.peak_flops,
        memory_mb=memory_mb(),
        peak_mb=peak_memory_mb(),
        loss_scale=scaling.now.scale if scaling.now else None,
    )
    scaling.note_step(finite=not report.skipped)
    ready.progress.note_step(seconds=seconds, tokens=report.tokens, target_tokens=report.target_tokens)
    return report


def _add_line(ready: Ready, entry: Mapping[str, Any]) -> None:
    fault = ready.saver.log.add(entry)
    if fault:
        ready.say(
            f"{ready.prepared.run.metrics_path} has no room for step {entry['step']} ({fault}); its line waits"
        )


def _validate(ready: Ready, step: int, stop_asked: StopAsked) -> float | None:
    """The validation loss with its line; None where a signal ended it."""
    loss = validation_loss(ready.prepared, ready.model, ready.stepper, stop_asked)
    if loss is not None:
        _add_line(ready, {"step": step, "validation_loss": loss})
        ready.progress.note_validation(step, loss)
    return loss


def _validate_late(ready: Ready, stop_asked: StopAsked) -> None:
    """The loss of a checkpoint that a signal left without one, where its step is one of those that have it.

    The checkpoint is saved again: with the loss in it, it is the one of a run that was not stopped.
    """
    prepared, step = ready.prepared, ready.position.step
    every, last = prepared.recipe.train.save_every_steps, prepared.plan.num_steps
    if not prepared.validation or not step or (step % every and step != last):
        return
    line = last_line(prepared.run.metrics_path) or {}
    if line.get("step") == step and "validation_loss" in line:
        return
    if _validate(ready, step, stop_asked) is None:
        _stop(ready, stop_asked())
    ready.saver.save(step, is_last=step == last)


def _stop(ready: Ready, signal_number: int | None) -> None:
    assert signal_number is not None
    step, run = ready.position.step, ready.prepared.run
    raise Interrupted(
        f"stopped after step {step} of {ready.prepared.plan.num_steps}; step-{step:06d} is saved",
        signal_number=signal_number,
        where=str(run.path),
        help="the same command with --resume goes on",
    )


def _finish(ready: Ready) -> None:
    """Writes the adapter: of the last step, or of the best validation loss where the recipe says so."""
    prepared, progress = ready.prepared, ready.progress
    if prepared.recipe.checkpoint.adapter == "best" and progress.best_step not in (None, ready.position.step):
        _take_best(ready)
    save_adapter(ready.model, prepared.run.adapter_dir, base_sha256=prepared.base.sha256)


def _take_best(ready: Ready) -> None:
    best, run = ready.progress.best_step, ready.prepared.run
    found = [path for path in list_checkpoints(run.checkpoints_dir) if step_of(path) == best]
    fault = verify_checkpoint(found[0]) if found else "it is gone"
    if fault:
        raise CheckpointError(
            f"the checkpoint of step {best}, which has the best validation loss, is damaged: {fault}",
            where=str(run.checkpoints_dir),
            help="--resume --set checkpoint.adapter=last takes the last step's adapter",
        )
    ready.saver.owners["adapter"].take_state(read_snapshot(found[0]).states["adapter"])
    ready.stepper.refresh()
    ready.say(f"the adapter is that of step {best}, whose validation loss is the least")
