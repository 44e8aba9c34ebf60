"""What training needs to go on: whoever owns some of it gives it as named tensors and JSON values, and takes it back.

    owner        of                                          its tensors are in
    adapter      the trained numbers                         adapter.safetensors
    optimizer    its averages and counts of steps            optimizer.safetensors, as are the others'
    random       torch's generators, Python's and numpy's
    scale        the loss scale of fp16
    position     the step, and the epoch of its rows
    progress     totals, best validation loss, where metrics.jsonl ended

The learning rate is a pure function of the step and the order of rows one of recipe and epoch: neither has a state.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Protocol

import numpy as np
import torch

from myna.errors import CheckpointError


@dataclass(frozen=True)
class State:
    """Named tensors, which may be the live ones, and values that JSON holds."""

    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


class StateOwner(Protocol):
    """Something whose state a run needs to go on bit for bit."""

    def give_state(self) -> State:
        """Its state now. The tensors may be live: they are saved before anything changes them."""
        ...

    def take_state(self, state: State) -> None:
        """Puts a state back, bit for bit. CheckpointError where it is not one of this owner's."""
        ...


Owners = Mapping[str, StateOwner]


@dataclass(frozen=True)
class Snapshot:
    """The state of all owners after a step."""

    step: int
    states: Mapping[str, State]


def gather(step: int, owners: Owners) -> Snapshot:
    """The state of every owner after `step`."""
    return Snapshot(step, {name: owner.give_state() for name, owner in owners.items()})


def restore(snapshot: Snapshot, owners: Owners) -> None:
    """Gives every owner its state back. CheckpointError where the snapshot lacks one, or has one that nobody takes."""
    if snapshot.states.keys() != owners.keys():
        odd = sorted(snapshot.states.keys() ^ owners.keys())
        raise CheckpointError(f"the checkpoint of step {snapshot.step} differs in who owns state: {odd}")
    for name, owner in owners.items():
        try:
            owner.take_state(snapshot.states[name])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"the checkpoint of step {snapshot.step} has a state of {name} that is not one: {error!r}"
            ) from error


def copy_into(held: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor], what: str) -> None:
    """Copies tensors into those that are held. CheckpointError where names, shapes or number formats are others."""
    ours, theirs = ({n: (tuple(t.shape), t.dtype) for n, t in part.items()} for part in (held, given))
    if ours != theirs:
        odd = min(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        raise CheckpointError(
            f"the checkpoint holds another {what} than the recipe makes: {odd} is {_told(theirs.get(odd))} there "
            f"and {_told(ours.get(odd))} here"
        )
    with torch.no_grad():
        for name, tensor in held.items():
            tensor.copy_(given[name])


def _told(shape: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "not" if shape is None else f"{list(shape[0])} in {str(shape[1]).removeprefix('torch.')}"


@dataclass(frozen=True)
class AdapterState:
    """The trained numbers, by name."""

    parameters: Mapping[str, torch.nn.Parameter]

    def give_state(self) -> State:
        return State({name: parameter.detach() for name, parameter in self.parameters.items()})

    def take_state(self, state: State) -> None:
        copy_into(self.parameters, state.tensors, "adapter")


class ByParameter(Protocol):
    """An optimizer: by parameter, its tensors by name, as torch.optim.Optimizer has them."""

    @property
    def state(self) -> Mapping[Any, Any]: ...


@dataclass(frozen=True)
class OptimizerState:
    """What an optimizer holds of each parameter."""

    parameters: Mapping[str, torch.nn.Parameter]
    optimizer: ByParameter

    def give_state(self) -> State:
        # one count of steps may stand for all: safetensors refuses tensors that share their memory
        return State({name: held if held.ndim else held.clone() for name, held in self._held().items()})

    def take_state(self, state: State) -> None:
        if self._held():
            copy_into(self._held(), state.tensors, "optimizer")
            return
        for name, tensor in state.tensors.items():  # one that makes its tensors at its first step
            kind, _, parameter = name.partition("/")
            self.optimizer.state[self.parameters[parameter]][kind] = tensor.clone()

    def _held(self) -> dict[str, torch.Tensor]:
        return {
            f"{kind}/{name}": tensor
            for name, parameter in self.parameters.items()
            for kind, tensor in self.optimizer.state[parameter].items()
        }


class RandomState:
    """The random generators of torch (and of its GPUs, where there are some), of Python and of numpy.

    Training itself draws from torch's alone; what a base's own code draws from is not known.
    """

    @staticmethod
    def seed(number: int) -> None:
        """The beginning of Python's and numpy's; torch's is seeded with the adapter."""
        random.seed(number)
        np.random.seed(number % 2**32)

    def give_state(self) -> State:
        _, python, gauss = random.getstate()
        _, numpy, position, has_gauss, cached = np.random.get_state(legacy=True)
        tensors = {
            "torch": torch.get_rng_state(),
            "python": torch.tensor(python, dtype=torch.int64),
            "numpy": torch.from_numpy(np.asarray(numpy).astype(np.int64)),
        }
        if torch.cuda.is_available():
            tensors |= {f"cuda{n}": state for n, state in enumerate(torch.cuda.get_rng_state_all())}
        return State(tensors, {"python": gauss, "numpy": [int(position), int(has_gauss), float(cached)]})

    def take_state(self, state: State) -> None:
        torch.set_rng_state(state.tensors["torch"])
        if "python" in state.tensors:  # checkpoints of before have torch's alone
            random.setstate((3, tuple(state.tensors["python"].tolist()), state.facts["python"]))
            numpy = state.tensors["numpy"].numpy().astype(np.uint32)
            np.random.set_state(("MT19937", numpy, *state.facts["numpy"]))
        for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            if f"cuda{number}" in state.tensors:
                torch.cuda.set_rng_state(state.tensors[f"cuda{number}"], number)


@dataclass
class Position:
    """The last step that is done, and the epoch that its rows were of. Which rows those are follows from recipe and plan."""

    step: int = 0
    epoch: int = 0

    def give_state(self) -> State:
        return State(facts={"step": self.step, "epoch": self.epoch})

    def take_state(self, state: State) -> None:
        self.step, self.epoch = int(state.facts["step"]), int(state.facts["epoch"])


@dataclass
class Progress:
    """What a run has done so far, over all of its processes. `seconds` are those of its steps."""

    seconds: float = 0.0
    tokens: int = 0
    target_tokens: int = 0
    best_loss: float | None = None  # of the validation rows
    best_step: int | None = None
    metrics_bytes: int | None = None  # of metrics.jsonl; None: a checkpoint of before, which did not say

    def __post_init__(self) -> None:
        self._best_before: tuple[float | None, int | None] = (None, None)

    def note_step(self, *, seconds: float, tokens: int, target_tokens: int) -> None:
        self.seconds += seconds
        self.tokens += tokens
        self.target_tokens += target_tokens

    def note_validation(self, step: int, loss: float) -> bool:
        """Whether it is the best so far."""
        if self.best_loss is not None and loss >= self.best_loss:
            return False
        self._best_before = (self.best_loss, self.best_step)
        self.best_loss, self.best_step = loss, step
        return True

    def forget_best(self, step: int) -> None:
        """Where the best is of `step`: the one before it is the best again."""
        if self.best_step == step:
            self.best_loss, self.best_step = self._best_before

    def give_state(self) -> State:
        return State(facts=asdict(self))

    def take_state(self, state: State) -> None:
        names = {one.name for one in fields(self)}
        for name, value in state.facts.items():
            if name not in names:
                raise KeyError(name)
            setattr(self, name, value)
