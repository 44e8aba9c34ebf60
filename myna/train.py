"""The training loop: a generator of StepReports. A terminal draws them, a test asserts them, to stop is not to ask."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import FrameType
from typing import Any

import torch

from myna.adapters.files import save_adapter
from myna.adapters.methods import add_adapter, trainable_parameters
from myna.checkpoint import collect_state, load_newest, restore_state, save_checkpoint
from myna.data.epochs import lengths_at_most, rows_an_epoch
from myna.data.packing import Batch, Step, collate, num_steps_an_epoch
from myna.data.render import Example
from myna.data.token_rows import Picked, lengths_of
from myna.engine.estimate import BaseShape, base_shape, kept_input_bytes
from myna.engine.finite import all_finite, rows_at_fault
from myna.engine.kept import InputPlace, input_place
from myna.engine.memory import (
    FreedMemory,
    collector_at_rest,
    forget_models,
    give_back_memory,
    memory_mb,
    peak_memory_mb,
)
from myna.engine.optim import FlatAdapter, flatten_adapter, lr_at
from myna.engine.peaks import product_peak
from myna.engine.scaling import LossScale, loss_scale_of, mean_loss
from myna.engine.step import Stepper, make_stepper
from myna.errors import CheckFailed, Interrupted
from myna.metrics import StepReport, append_metrics, cut_metrics
from myna.model.load import load_base
from myna.model.sources import Say
from myna.pack_facts import epoch_packs
from myna.plan import FrozenPlan, longest_pack, planned_kernels
from myna.prepare import Prepared
from myna.run import Run, require_room
from myna.trial import FEWEST_STEPS, largest_pack, room_required, try_pack
from myna.validation import is_validated, validate, validation_due

StopAsked = Callable[[], int | None]
Packs = Sequence[Sequence[Example]]

TIDY_EVERY = 50  # steps between two runs of the garbage collector


def train(prepared: Prepared, say: Say, stop_asked: StopAsked = lambda: None) -> Iterator[StepReport]:
    """Trains the adapter of a prepared run, from its newest good checkpoint where it has one.

    `stop_asked` is looked at after each step: a signal number ends training with a checkpoint behind and raises
    Interrupted. At the end the adapter is written. Raises CheckFailed where the loss or its gradient is not finite,
    CheckpointError where every checkpoint is damaged, MachineError where the run's kernels cannot be had.
    """
    plan, run, settings = prepared.plan, prepared.run, prepared.recipe.train
    torch.set_num_threads(plan.threads)
    for half in run.checkpoints_dir.glob(".tmp-*"):  # of a process that was killed while it saved
        shutil.rmtree(half, ignore_errors=True)
    found = load_newest(run.checkpoints_dir)
    for sentence in found.said:
        say(sentence)
    peak = _product_peak(plan)
    with room_required(plan):
        model, stepper, adapter = _begin(prepared)
    # adapter, its gradient's two moments, for every checkpoint kept and the one being written
    num_bytes = 4 * adapter.gradient_P.numel()
    require_room(run.path, 3 * num_bytes * (settings.keep_checkpoints + 1), "the checkpoints")
    first, scaling = 1, loss_scale_of(plan.dtype)
    if found.state is not None:
        restore_state(found.state, adapter.parameters, adapter)
        first, scaling = found.state.step + 1, loss_scale_of(plan.dtype, found.state.facts)
        stepper.refresh()
        say(f"going on after step {found.state.step}")
    cut_metrics(run.metrics_path, first - 1)
    if first > 1 and validation_due(prepared, first - 1) and not is_validated(prepared, first - 1):
        validate(prepared, first - 1, model, stepper)
    if plan.path == "fast" and prepared.recipe.adapter.dropout:
        say("dropout: each row has masks of its own, so beginnings that rows share are computed for each")
    forget_models()  # what loading left behind
    freed = FreedMemory()
    if plan.num_steps - first + 1 >= FEWEST_STEPS:
        try_pack(_largest_pack(prepared, first), stepper, adapter, plan, say)
        freed.give_back_excess()
    with collector_at_rest(), room_required(plan):
        for step, epoch, packs in planned_steps(prepared, first):
            started = time.perf_counter()
            rate = lr_at(step, plan.num_steps, settings)
            batches = _collate(prepared, step, packs)
            loss, grad_norm = _take_step(prepared, step, stepper, adapter, packs, batches, rate, scaling)
            signal_number = stop_asked()
            seconds = time.perf_counter() - started
            if step % TIDY_EVERY == 0:
                gc.collect()
            freed.give_back_excess()
            flops = [stepper.product_flops(batch) for batch in batches]
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
                peak_flops=peak,
                memory_mb=memory_mb(),
                peak_mb=peak_memory_mb(),
                loss_scale=scaling.scale if scaling else None,
            )
            scaling = scaling.after(finite=not report.skipped) if scaling else None
            # before the checkpoint: a line too many is cut on resume, a line that was never written stays missing
            append_metrics(run.metrics_path, report)
            if step % settings.save_every_steps == 0 or step == plan.num_steps or signal_number is not None:
                state = collect_state(step, adapter.parameters, adapter, _facts(epoch, scaling))
                saved = save_checkpoint(run.checkpoints_dir, state, settings.keep_checkpoints)
                report = replace(report, checkpoint=saved.name)
            # one that is asked to stop does so; the next process takes the loss of the checkpoint that it goes on from
            if validation_due(prepared, step) and (signal_number is None or step == plan.num_steps):
                report = replace(report, validation_loss=validate(prepared, step, model, stepper))
            yield report
            if signal_number is not None and step < plan.num_steps:
                raise Interrupted(
                    f"stopped after step {step} of {plan.num_steps}; {report.checkpoint} is saved",
                    signal_number=signal_number,
                    where=str(run.path),
                    help="the same command with --resume goes on",
                )
    save_adapter(model, run.adapter_dir, base_sha256=prepared.base.sha256)


def _begin(prepared: Prepared) -> tuple[Any, Stepper, FlatAdapter]:
    """The model with its adapter, as the plan says it is computed."""
    recipe, plan = prepared.recipe, prepared.plan
    kernels = planned_kernels(plan)
    give_back_memory()  # what reading the rows and measuring the products left behind
    model = load_base(prepared.base.folder, plan.dtype, device=plan.device)
    model = add_adapter(model, recipe.adapter, seed=recipe.train.seed, base_name=str(prepared.base.folder))
    adapter = flatten_adapter(trainable_parameters(model), recipe.train)
    stepper = make_stepper(
        model,
        plan.path,
        kernels=kernels,
        quantize_with=_first_pack(prepared) if plan.quantize == "int8" else None,
        checkpoint_layers=plan.checkpoint_layers,
        round_tokens=plan.round_tokens,
        head_tokens=plan.head_tokens,
        keep_inputs=_input_place(prepared, base_shape(model.config)),
    )
    return model, stepper, adapter


def _input_place(prepared: Prepared, shape: BaseShape) -> InputPlace:
    """Where checkpointed layers' inputs are kept. MachineError where that is a disk without room for the longest pack's."""
    plan, run = prepared.plan, prepared.run
    if plan.checkpoint_to == "disk":
        lengths = lengths_at_most(lengths_of(prepared.examples), prepared.parts)
        batch_size = prepared.recipe.train.batch_size
        tokens = longest_pack(lengths, batch_size, plan.pack_tokens, padded=False)
        layers = plan.checkpoint_layers
        num_bytes = kept_input_bytes(shape, dtype=plan.dtype, tokens=tokens, checkpoint_layers=layers)
        require_room(run.path, num_bytes, "the inputs of layers (train.checkpoint_to: disk)")
    return input_place(plan.checkpoint_to, device=plan.device, folder=run.path)


def _first_pack(prepared: Prepared) -> Batch:
    """The first pack of the run's first step, whichever step it goes on from: int8 is made to fit it."""
    _, _, packs = next(planned_steps(prepared, 1))
    return collate(list(packs[0]), share=True)


def _largest_pack(prepared: Prepared, first: int) -> Batch:
    """Of the packs from step `first` on, the one that takes the most memory."""
    packs = ((step, pack) for step, _, packs in planned_steps(prepared, first) for pack in packs)
    return largest_pack(
        packs,
        lambda step, pack: _collate(prepared, step, [pack])[0],
        fast=prepared.plan.path == "fast",
    )


def planned_steps(prepared: Prepared, first: int) -> Iterator[tuple[int, int, Packs]]:
    """(step, epoch, the step's rows by pack) from step `first` to the last: a pure function of recipe, plan and rows."""
    plan, settings, examples = prepared.plan, prepared.recipe.train, prepared.examples
    lengths = lengths_of(examples)
    steps_an_epoch = num_steps_an_epoch(rows_an_epoch(prepared.parts), settings.batch_size)
    epoch, planned = -1, list[Step]()
    for step in range(first, plan.num_steps + 1):
        if (step - 1) // steps_an_epoch != epoch:
            epoch = (step - 1) // steps_an_epoch
            planned = epoch_packs(lengths, prepared.parts, settings, plan, epoch=epoch)
        packs = planned[(step - 1) % steps_an_epoch]
        yield step, epoch, [Picked(examples, pack) for pack in packs]


def _collate(prepared: Prepared, step: int, packs: Packs) -> list[Batch]:
    """The packs of a step as tensors; with dropout each with what its masks are drawn from."""
    is_fast = prepared.plan.path == "fast"
    if is_fast and prepared.recipe.adapter.dropout:
        seed = prepared.recipe.train.seed
        return [collate(list(pack), draw=(seed, step, number)) for number, pack in enumerate(packs)]
    return [collate(list(pack), share=is_fast) for pack in packs]


def _take_step(
    prepared: Prepared,
    step: int,
    stepper: Stepper,
    adapter: FlatAdapter,
    packs: Packs,
    batches: Sequence[Batch],
    rate: float,
    scaling: LossScale | None,
) -> tuple[float, float | None]:
    """One optimizer update; returns loss and norm of the gradient. CheckFailed, with no update, where one is not finite.

    With `scaling`, a gradient that is not finite only skips the step, and its norm is None, unless the scale is the least.
    """
    num_targets = sum(len(batch.targets_N) for batch in batches)
    loss_sum = 0.0
    scale = scaling.scale if scaling else 1.0
    for batch in batches:
        loss = mean_loss(stepper, batch, num_targets, scaling)
        loss_sum += float(loss.detach()) / scale
        if not all_finite(loss_sum):
            break
        loss.backward()
    if scaling:
        adapter.gradient_P.div_(scale)
    grad_norm = adapter.clip(prepared.recipe.train.max_grad_norm)
    if scaling and not scaling.is_least and all_finite(loss_sum) and not all_finite(grad_norm):
        adapter.gradient_P.zero_()
        return loss_sum, None
    if not all_finite(loss_sum, grad_norm):
        rows = rows_at_fault(stepper, packs, batches, adapter.gradient_P, num_targets, scaling)
        raise CheckFailed(
            f"{_not_finite(step, loss_sum, grad_norm)}; {rows}",
            where=str(prepared.run.path),
            help=f"look at these rows, or take a smaller train.learning_rate (this step's was {rate:.2g}) in a new run; "
            + ("fp16 holds nothing above 65,504, fp32 does (model.dtype); " if scaling else "")
            + _last_good(prepared.run),
            code="loss",
        )
    adapter.step(rate)
    stepper.refresh()
    return loss_sum, grad_norm


def _not_finite(step: int, loss: float, grad_norm: float) -> str:
    if not all_finite(loss):  # then no gradient was made
        return f"the loss of step {step} is {loss}"
    return f"the norm of the gradient of step {step} is {grad_norm}, its loss {loss:.4g}"


def _last_good(run: Run) -> str:
    saved = sorted(path.name for path in run.checkpoints_dir.glob("step-*"))
    return (
        f"the last good checkpoint is checkpoints/{saved[-1]}"
        if saved
        else "no checkpoint had been saved yet"
    )


def _facts(epoch: int, scaling: LossScale | None) -> dict[str, Any]:
    """What a checkpoint keeps besides tensors."""
    return {"epoch": epoch} | ({} if scaling is None else {"loss_scale": scaling.facts()})


def _product_peak(plan: FrozenPlan) -> float | None:
    """What the machine's products reach in the format that they are done in, in FLOP/s; None off the fast path."""
    if plan.path != "fast":
        return None
    narrow = "int8" if plan.quantize == "int8" else plan.dtype
    return _measured_peak("fp32" if plan.widen and narrow != "int8" else narrow, plan.threads, plan.device)


@functools.cache
def _measured_peak(dtype: str, threads: int, device: str) -> float:
    return product_peak(dtype, threads, device)


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
