"""The frozen plan: what the machine decides about a run, before its first step. A pure function; every resume obeys it.

recipe, base, lengths of the rows, Machine (cores, total memory, number formats) ─ freeze_plan ─► FrozenPlan ─► plan.json
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from myna.data.epochs import Part, lengths_at_most, rows_an_epoch
from myna.data.packing import num_steps_an_epoch
from myna.engine.compiler import NotNative
from myna.engine.estimate import BYTES, BaseShape, base_shape, estimate_memory
from myna.engine.flex import COMPILER_PACKAGE, flex_missing
from myna.engine.frozen import Int8Products
from myna.engine.kept import PlaceName
from myna.engine.kernels import Kernels
from myna.engine.loss import chunk_tokens
from myna.engine.memory import total_memory_mb
from myna.engine.step import (
    ROUND_TOKENS,
    UNPACKED,
    KernelsName,
    PathName,
    ProductsName,
    best_kernels,
    choose_kernels,
    choose_path,
)
from myna.engine.threads import fast_in_bfloat16, fast_in_int8, usable_cores
from myna.errors import MachineError, RecipeError, UsageError
from myna.recipe import Recipe
from myna.run import read_json
from myna.settings import TrainSettings

KERNELS_VARIABLE = "MYNA_KERNELS"  # torch: plain torch · native, flex: refused where they cannot be had
KERNELS_WORDS = {"native": "C kernels", "flex": "attention by block masks"}
MEMORY_SHARE = (
    0.6  # of all memory: the rest is for the page cache, other programs, and what an estimate misses
)
FP32_SHARE = (
    0.25  # of all memory that the weights may take in fp32 where fp32 is the faster format by a little
)
NEW_RUN = "or start another run: --set run.name=NAME"


@dataclass(frozen=True)
class FrozenPlan:
    """What the machine decided. The defaults are what runs of Myna 0.1 without these entries were trained with."""

    device: str
    dtype: str
    threads: int
    path: PathName
    path_reason: str
    pack_tokens: int
    num_rows: int
    num_steps: int
    kernels: KernelsName = "torch"
    kernels_reason: str = "the run began before there were C kernels"
    quantize: str = "none"
    checkpoint_layers: int = 0
    round_tokens: int = 64
    widen: bool = False  # products of narrower weights in float32
    products: ProductsName = "torch"  # who widens and multiplies them
    int8_products: Int8Products = "int8"  # what int8 weights are multiplied in
    head_tokens: int | None = (
        None  # target tokens that the head projects at a time; None: as the engine has it
    )
    checkpoint_to: PlaceName = "device"
    memory_mb: float | None = None
    total_memory_mb: float | None = None

    def sentences(self) -> Iterator[str]:
        """What is said before the first step."""
        fast = self.path == "fast"
        way = "packed, fast path" if fast else f"reference path: {self.path_reason}"
        count = f"{self.num_steps} step{'' if self.num_steps == 1 else 's'}"
        yield f"{count} in {self.dtype} on {self.device} with {self.threads} threads ({way})"
        if fast:
            yield {
                "native": "kernels: C, compiled here",
                "flex": "kernels: torch's, attention by block masks (flex_attention)",
                "torch": f"kernels: torch's ({self.kernels_reason})",
            }[self.kernels]
        if self.widen:
            yield f"weights are kept in {self.dtype} and multiplied in fp32, which this CPU does faster"
        if self.quantize != "none" and self.int8_products == "fp32":
            yield f"the frozen base is kept as {self.quantize} and multiplied in fp32, which this CPU does faster"
        elif self.quantize != "none":
            yield f"the frozen base is kept and multiplied as {self.quantize}"
        if self.checkpoint_layers:
            every = "every layer" if self.checkpoint_layers == 1 else f"every {self.checkpoint_layers} layers"
            yield f"gradient checkpointing: {every} again in the backward, slower and smaller"
        if self.checkpoint_to != "device":
            place = "on disk" if self.checkpoint_to == "disk" else "in CPU memory"
            same = ", where this device has them anyhow" if self.checkpoint_to == self.device else ""
            yield f"gradient checkpointing keeps layers' inputs {place}{same}"
        if self.memory_mb is not None and self.total_memory_mb is not None:
            yield f"memory: about {self.memory_mb:,.0f} MB of {self.total_memory_mb:,.0f}{self._doubt()}"

    def _doubt(self) -> str:
        assert self.memory_mb is not None and self.total_memory_mb is not None
        if self.memory_mb <= MEMORY_SHARE * self.total_memory_mb:
            return ""
        return "; it may not fit: a smaller train.pack_tokens or data.max_length takes less"


@dataclass(frozen=True)
class Machine:
    """All of this machine that a plan may depend on: no timings, and nothing that differs from minute to minute."""

    device: str
    cores: int
    fast_bf16: bool
    total_memory_mb: float
    fast_int8: bool


def this_machine() -> Machine:
    """The machine this process runs on."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    # GPUs before Ampere compute bf16 by way of fp32: torch counts that as support unless it is told not to
    fast_bf16 = (
        torch.cuda.is_bf16_supported(including_emulation=False) if device == "cuda" else fast_in_bfloat16()
    )
    return Machine(device, usable_cores(), fast_bf16, round(total_memory_mb(device)), fast_in_int8())


def freeze_plan(
    recipe: Recipe, config: Any, lengths: Sequence[int], machine: Machine, parts: Sequence[Part] = ()
) -> FrozenPlan:
    """Decides everything. `config` is the base's, `lengths` are the rows' tokens, the recipe has its defaults written out.

    `parts` are the files that the rows are of, where they are several.

    Raises RecipeError where the recipe asks for what this path or device does not have, MachineError where
    MYNA_KERNELS=native asks for kernels that cannot be had.
    """
    settings, quantize = recipe.train, recipe.model.quantize
    path, reason = choose_path(config, recipe.adapter, packed=settings.packed)
    dtype = recipe.model.dtype if recipe.model.dtype != "auto" else _best_dtype(config, machine, path)
    kernels, kernels_reason = plan_kernels(machine.device, dtype, path)
    _refuse_int8(quantize, path, reason, machine.device)
    assert settings.pack_tokens is not None
    parts = parts or (Part(len(lengths)),)
    num_rows, num_steps = planned_length(settings, parts)
    lengths = lengths_at_most(lengths, parts)
    shape = base_shape(config)

    # what a CPU computes is in CPU memory
    place = "device" if (settings.checkpoint_to, machine.device) == ("cpu", "cpu") else settings.checkpoint_to
    _refuse_place(settings.checkpoint_to, settings.gradient_checkpointing, path, reason)
    widen = path == "fast" and machine.device == "cpu" and dtype != "fp32" and not machine.fast_bf16
    int8_products: Int8Products = "fp32" if quantize == "int8" and not machine.fast_int8 else "int8"

    def needed_mb(checkpoint_layers: int) -> float:
        return estimate_memory(
            shape,
            dtype=dtype,
            rank=recipe.adapter.r,
            tokens=longest_pack(
                lengths, settings.batch_size, settings.pack_tokens or 0, padded=path != "fast"
            ),
            fast=path == "fast",
            native=kernels == "native",
            quantize=quantize,
            checkpoint_layers=checkpoint_layers,
            checkpoint_to=place,
            widen=widen,
            int8_products=int8_products,
        ).total

    asked = settings.gradient_checkpointing
    if asked == "auto":
        checkpoint_layers = int(needed_mb(0) > MEMORY_SHARE * machine.total_memory_mb)
    else:
        checkpoint_layers = asked if isinstance(asked, int) else int(asked == "all")
    _refuse_groups(checkpoint_layers, path, reason)
    return FrozenPlan(
        device=machine.device,
        dtype=dtype,
        threads=machine.cores,
        path=path,
        path_reason=reason,
        pack_tokens=settings.pack_tokens,
        num_rows=num_rows,
        num_steps=num_steps,
        kernels=kernels,
        kernels_reason=kernels_reason,
        quantize=quantize,
        checkpoint_layers=checkpoint_layers,
        checkpoint_to=settings.checkpoint_to if checkpoint_layers else "device",
        round_tokens=ROUND_TOKENS,
        widen=widen,
        products="native" if widen and kernels == "native" else "torch",
        int8_products=int8_products,
        head_tokens=chunk_tokens(shape.vocabulary, BYTES[dtype]),
        memory_mb=round(needed_mb(checkpoint_layers)),
        total_memory_mb=machine.total_memory_mb,
    )


def planned_length(settings: TrainSettings, parts: Sequence[Part]) -> tuple[int, int]:
    """(rows an epoch, steps of the run)."""
    num_rows = rows_an_epoch(parts)
    num_steps = settings.epochs * num_steps_an_epoch(num_rows, settings.batch_size)
    return num_rows, min(num_steps, settings.max_steps or num_steps)


def _best_dtype(config: Any, machine: Machine, path: PathName) -> str:
    if machine.device != "cpu":
        return "bf16" if machine.fast_bf16 else "fp16"
    if path != "fast":  # transformers would compute in bf16 what the fast path only keeps in it
        return "bf16" if machine.fast_bf16 else "fp32"
    return cpu_dtype(base_shape(config), fast_bf16=machine.fast_bf16, total_memory_mb=machine.total_memory_mb)


def cpu_dtype(shape: BaseShape, *, fast_bf16: bool, total_memory_mb: float) -> str:
    """What `model.dtype: auto` is on a CPU: bf16 where it is fast at it, or a base in fp32 would take most of the memory."""
    weights_mb = shape.num_weights * BYTES["fp32"] / 1e6
    return "bf16" if fast_bf16 or weights_mb > FP32_SHARE * total_memory_mb else "fp32"


def read_plan(path: Path) -> FrozenPlan:
    """The plan of a run; MachineError as `plan_of`."""
    return plan_of(read_json(path), where=path)


def plan_of(entries: Mapping[str, Any], *, where: Path | str = "plan") -> FrozenPlan:
    """A plan from its entries. MachineError where another version of Myna wrote what this one does not know."""
    unknown = sorted(entries.keys() - {field.name for field in fields(FrozenPlan)})
    if unknown:
        raise MachineError(
            f"the plan has entries that Myna here does not know: {', '.join(unknown)}",
            where=str(where),
            help=f"go on with the version that run.json names under versions.myna, {NEW_RUN}",
        )
    return FrozenPlan(**entries)


def unused_settings(recipe: Recipe, plan: FrozenPlan) -> Iterator[str]:
    """Settings that were given and change nothing here, said before the first step."""
    settings = recipe.train
    if settings.max_steps is not None and settings.max_steps > plan.num_steps:
        epochs = "1 epoch is" if settings.epochs == 1 else f"{settings.epochs} epochs are"
        yield f"train.max_steps is {settings.max_steps}, but {epochs} {plan.num_steps} steps: train.epochs gives more"
    if settings.checkpoint_to != "device" and not plan.checkpoint_layers:
        yield f"train.checkpoint_to: {settings.checkpoint_to} is not used: no layer is run again in the backward"
    asked = os.environ.get(KERNELS_VARIABLE, plan.kernels)
    if asked not in ("", plan.kernels):
        why = plan.kernels_reason or f"the run was planned with {KERNELS_WORDS[plan.kernels]}"
        yield f"{KERNELS_VARIABLE}={asked} changes nothing here: {why}"


def longest_pack(lengths: Sequence[int], batch_size: int, pack_tokens: int, *, padded: bool) -> int:
    """Tokens of the longest pack that any order of the rows can give; `padded`: with the padding of the plain forward."""
    longest = max(lengths)
    if padded:
        return max(longest, min(batch_size, len(lengths)) * min(longest, pack_tokens))
    of_a_step = sum(sorted(lengths)[-batch_size:])
    tokens = max(longest, min(pack_tokens, of_a_step))
    return -(-tokens // ROUND_TOKENS) * ROUND_TOKENS


def plan_kernels(device: str, dtype: str, path: PathName) -> tuple[KernelsName, str]:
    """Which kernels a new run is to have, and why where they are torch's; $MYNA_KERNELS has the last word."""
    asked = os.environ.get(KERNELS_VARIABLE, "")
    if asked not in ("", "native", "torch", "flex"):
        raise UsageError(f"{KERNELS_VARIABLE}={asked}: it is native, flex, torch, or not set")
    if path != "fast":
        return "torch", "the reference path has no kernels of its own"
    if asked == "torch":
        return "torch", f"{KERNELS_VARIABLE}=torch"
    name, why = asked_flex(device) if asked == "flex" else best_kernels(device, dtype)
    if asked and name != asked:
        raise MachineError(
            f"{KERNELS_VARIABLE}={asked}, but {KERNELS_WORDS[asked]} cannot be had here: {why}",
            help=f"unset {KERNELS_VARIABLE}",
        )
    return name, why


def asked_flex(device: str) -> tuple[KernelsName, str]:
    """Attention by block masks, or torch's kernels and why it must be these."""
    why = flex_missing(device)
    return ("torch", why) if why else ("flex", "")


def planned_kernels(plan: FrozenPlan) -> Kernels:
    """The kernels that a run was planned with. MachineError where they cannot be had any more."""
    why = flex_missing(plan.device) if plan.kernels == "flex" else ""
    if why:
        raise MachineError(
            f"the run was begun with attention by block masks, which can't be had now: {why}",
            help=f"pip install {COMPILER_PACKAGE}, and a C compiler; {NEW_RUN}",
            code="kernels",
        )
    try:
        return choose_kernels(plan.kernels, plan.threads, widen=plan.widen, products=plan.products)
    except NotNative as error:
        raise MachineError(
            f"the run was begun with C kernels, which cannot be had now: {error}",
            help=f"install a C compiler (gcc, clang, or pip install ziglang), {NEW_RUN}",
            code="kernels",
        ) from error


def _refuse_int8(quantize: str, path: PathName, reason: str, device: str) -> None:
    why = f"this run takes the reference path ({reason})" if path != "fast" else f"the device is {device}"
    if quantize == "int8" and (path != "fast" or device != "cpu"):
        raise RecipeError(
            f"model.quantize: int8 is for the fast path on a CPU; {why}",
            help=_or_packed("--set model.quantize=none", reason),
        )


def _refuse_place(place: PlaceName, checkpointing: str | int, path: PathName, reason: str) -> None:
    if place != "device" and path != "fast":
        raise RecipeError(
            f"train.checkpoint_to: {place} is for the fast path; this run takes the reference path ({reason})",
            help=_or_packed("--set train.checkpoint_to=device", reason),
        )
    if place != "device" and checkpointing == "none":
        raise RecipeError(
            f"train.checkpoint_to: {place} has nothing to keep: train.gradient_checkpointing is none",
            help="--set train.gradient_checkpointing=all, or --set train.checkpoint_to=device",
        )


def _refuse_groups(checkpoint_layers: int, path: PathName, reason: str) -> None:
    if path != "fast" and checkpoint_layers > 1:
        raise RecipeError(
            f"train.gradient_checkpointing: {checkpoint_layers} layers together are for the fast path; "
            f"this run takes the reference path ({reason})",
            help=_or_packed("--set train.gradient_checkpointing=all", reason),
        )


def _or_packed(cure: str, reason: str) -> str:
    return f"{cure}, or --set train.packed=true" if reason == UNPACKED else cure
