"""The longest pack tried first: where memory ends, it ends before the first step and not hours later."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from myna.data.packing import Batch
from myna.data.render import Example
from myna.data.token_rows import lengths_of
from myna.engine.memory import peak_memory_mb
from myna.engine.optim import FlatAdapter
from myna.engine.step import Stepper
from myna.errors import MachineError
from myna.model.load import NO_MEMORY, first_line
from myna.model.sources import Say
from myna.plan import NEW_RUN, FrozenPlan

FEWEST_STEPS = 20  # a shorter run tells by itself soon enough, and would be a twentieth longer


def largest_pack(
    packs: Iterable[tuple[int, Sequence[Example]]],
    lay: Callable[[int, Sequence[Example]], Batch],
    *,
    fast: bool,
) -> Batch:
    """Of packs, each with its step, the one that takes the most memory, as `lay` lays it out for training.

    It is judged by its tokens; off the fast path with the padding of its rows. Rows that share a beginning make a shorter
    pack than their lengths say, so packs are laid out from the largest on until no other can be longer.
    """

    def size(pack: Sequence[Example]) -> int:
        lengths = lengths_of(pack)
        return sum(lengths) if fast else len(lengths) * max(lengths)

    longest: Batch | None = None
    for step, pack in sorted(packs, key=lambda numbered: -size(numbered[1])):
        if longest is not None and (not fast or size(pack) <= len(longest.input_ids_T)):
            break
        batch = lay(step, pack)
        if longest is None or len(batch.input_ids_T) > len(longest.input_ids_T):
            longest = batch
    assert longest is not None
    return longest


def try_pack(batch: Batch, stepper: Stepper, adapter: FlatAdapter, plan: FrozenPlan, say: Say) -> None:
    """A forward and backward over the pack that leave no trace in the run, and a sentence of what they took.

    MachineError where there is no room.
    """
    devices = [torch.cuda.current_device()] if plan.device == "cuda" else []
    if devices:
        torch.cuda.reset_peak_memory_stats()
    with torch.random.fork_rng(devices), room_required(plan):
        (stepper.loss(batch) / len(batch.targets_N)).backward()
    adapter.gradient_P.zero_()
    peak = torch.cuda.max_memory_allocated() / 1e6 if devices else peak_memory_mb()
    estimated = "" if plan.memory_mb is None else f" ({plan.memory_mb:,.0f} were estimated)"
    say(
        f"the longest pack fits: {'the GPU' if devices else 'this process'} held {peak:,.0f} MB at most{estimated}"
    )


@contextlib.contextmanager
def room_required(plan: FrozenPlan) -> Iterator[None]:
    """Inside, an allocation that fails becomes a MachineError that says what takes less."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch's for a GPU is a RuntimeError too
        if not isinstance(error, MemoryError) and not re.search(NO_MEMORY, str(error)):
            raise
        raise MachineError(
            f"a step does not fit into memory: {first_line(error)}",
            help=f"{' or '.join(_cures(plan))}; {NEW_RUN.removeprefix('or ')} where this one has begun",
            code="memory",
        ) from error


def _cures(plan: FrozenPlan) -> Iterator[str]:
    yield f"--set train.pack_tokens={max(1, plan.pack_tokens // 2)}, where no single row is longer"
    yield "a smaller data.max_length (with data.cut_long=true)"
    if not plan.checkpoint_layers:
        yield "--set train.gradient_checkpointing=all"
    if plan.quantize == "none" and plan.path == "fast" and plan.device == "cpu":
        yield "--set model.quantize=int8"
