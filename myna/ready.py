"""A run made ready for its next step: its base loaded, its newest good checkpoint put back, the longest pack tried."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from myna.adapters.methods import add_adapter, trainable_parameters
from myna.changes import differences, is_accepted, made_from_json, note_forced, refuse
from myna.checkpoint import find_newest, list_checkpoints, read_manifest, read_snapshot, step_of, tidy
from myna.data.epochs import lengths_at_most
from myna.data.token_rows import lengths_of
from myna.engine.estimate import BaseShape, base_shape, kept_input_bytes
from myna.engine.kept import InputPlace, input_place
from myna.engine.memory import FreedMemory, forget_models, give_back_memory
from myna.engine.optim import FlatAdapter, flatten_adapter
from myna.engine.peaks import product_peak
from myna.engine.scaling import Scaling, loss_scale_of
from myna.engine.step import Stepper, make_stepper
from myna.metrics import MetricsLog, cut_metrics
from myna.mirror import open_mirror
from myna.model.load import load_base
from myna.model.sources import Say
from myna.plan import FrozenPlan, longest_pack, planned_kernels
from myna.prepare import Prepared, made_of, versions_here
from myna.run import require_room
from myna.saver import Saver
from myna.state import AdapterState, OptimizerState, Owners, Position, Progress, RandomState, restore
from myna.steps import first_pack, largest_pack_from
from myna.trial import FEWEST_STEPS, room_required, try_pack

ROUNDING = ("torch", "python", "numpy")  # versions that may change how a step rounds


@dataclass(frozen=True)
class Ready:
    """All that the steps to come need. `position` is the last step that is done."""

    prepared: Prepared
    model: Any
    stepper: Stepper
    adapter: FlatAdapter
    saver: Saver
    position: Position
    progress: Progress
    scaling: Scaling
    peak_flops: float | None
    freed: FreedMemory
    say: Say


def make_ready(prepared: Prepared, say: Say, *, force: bool = False) -> Ready:
    """Loads the base and its adapter, and goes back to the newest good checkpoint where there is one.

    CheckpointError where every checkpoint is damaged, RecipeError where the newest is of something else and not `force`,
    MachineError where the run's kernels cannot be had, or memory or disk have no room.
    """
    plan, run, recipe = prepared.plan, prepared.run, prepared.recipe
    torch.set_num_threads(plan.threads)
    tidy(run.checkpoints_dir)
    newest = find_newest(run.checkpoints_dir)
    for sentence in newest.said:
        say(sentence)
    if newest.path is not None:
        _compare(newest.path, prepared, say, force=force)
    mirror = open_mirror(run, recipe.checkpoint.mirror)
    peak = _product_peak(plan)
    with room_required(plan):
        model, stepper, adapter = _load(prepared)
    RandomState.seed(recipe.train.seed)
    position, progress, scaling = Position(), Progress(), Scaling(loss_scale_of(plan.dtype))
    owners: Owners = {
        "adapter": AdapterState(adapter.parameters),
        "optimizer": OptimizerState(adapter.parameters, adapter),
        "random": RandomState(),
        "scale": scaling,
        "position": position,
        "progress": progress,
    }
    if newest.path is not None:
        restore(read_snapshot(newest.path), owners)
        stepper.refresh()
        say(f"going on after step {position.step}")
    fault = cut_metrics(run.metrics_path, position.step, progress.metrics_bytes)
    if fault:
        say(fault)
    _require_room_for_checkpoints(prepared, adapter)
    if plan.path == "fast" and recipe.adapter.dropout:
        say("dropout: each row has masks of its own, so beginnings that rows share are computed for each")
    forget_models()  # what loading left behind
    freed = FreedMemory()
    if plan.num_steps - position.step >= FEWEST_STEPS:
        try_pack(largest_pack_from(prepared, position.step + 1), stepper, adapter, plan, say)
        freed.give_back_excess()
    saver = Saver(
        run,
        recipe,
        plan.num_steps,
        owners,
        progress,
        MetricsLog(run.metrics_path),
        _manifest(prepared),
        mirror,
        say,
    )
    return Ready(prepared, model, stepper, adapter, saver, position, progress, scaling, peak, freed, say)


def _manifest(prepared: Prepared) -> dict[str, Any]:
    """What a checkpoint says of the run that it is of."""
    identity = prepared.run.info().get("id")
    return {"run": identity, **made_of(prepared).as_json(), "versions": versions_here()}


def _compare(checkpoint: Path, prepared: Prepared, say: Say, *, force: bool) -> None:
    """Refuses a checkpoint that was made from something else than what stands in the run; says other versions."""
    manifest = read_manifest(checkpoint)
    if "plan" not in manifest:  # one of before, which did not say
        return
    changed = differences(made_from_json(manifest), made_of(prepared))
    if changed and not is_accepted(prepared.run, step_of(checkpoint)):
        if not force:
            refuse(prepared.run, changed, f"{checkpoint.name} of the run")
        note_forced(prepared.run, changed)
        for sentence in changed:
            say(f"forced: {sentence}")
    here: Mapping[str, str] = versions_here()
    others = [
        f"{name} {there}, here {here.get(name)}"
        for name, there in manifest["versions"].items()
        if name in ROUNDING and here.get(name) != there
    ]
    if others:
        say(
            f"{checkpoint.name} was written with other versions ({'; '.join(others)}): steps may round otherwise"
        )


def _require_room_for_checkpoints(prepared: Prepared, adapter: FlatAdapter) -> None:
    """Room for those that are still to come: of a full run only for the next one, which pruning makes room after."""
    run, settings = prepared.run, prepared.recipe.train
    # the adapter and its optimizer's two averages
    num_bytes = 3 * adapter.gradient_P.element_size() * adapter.gradient_P.numel()
    to_come = settings.keep_checkpoints + 1 - len(list_checkpoints(run.checkpoints_dir))
    require_room(run.path, num_bytes * max(1, to_come), "the checkpoints")


def _load(prepared: Prepared) -> tuple[Any, Stepper, FlatAdapter]:
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
        quantize_with=first_pack(prepared) if plan.quantize == "int8" else None,
        int8_products=plan.int8_products,
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


def _product_peak(plan: FrozenPlan) -> float | None:
    """What the machine's products reach in the format that they are done in, in FLOP/s; None off the fast path."""
    if plan.path != "fast":
        return None
    if plan.quantize == "int8":
        dtype: str = plan.int8_products
    else:
        dtype = "fp32" if plan.widen else plan.dtype
    return _measured_peak(dtype, plan.threads, plan.device)


@functools.cache
def _measured_peak(dtype: str, threads: int, device: str) -> float:
    return product_peak(dtype, threads, device)
