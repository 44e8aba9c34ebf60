"""What the exactness tests share: families, rows, a path's answer on them, and the comparison of two answers.

An answer is the sum of the losses and the gradient of every adapter tensor. Gradients are compared by norm: elementwise, two
correct orders of a float32 sum differ by 5e-3.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tiny_families
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from myna.adapters.methods import add_adapter, trainable_parameters
from myna.data.packing import Batch, collate
from myna.data.render import IGNORE, Example
from myna.engine.compiler import NotNative, find_compiler
from myna.engine.families import FAST
from myna.engine.kernels import Kernels
from myna.engine.step import KernelsName, Stepper, choose_kernels, make_stepper
from myna.engine.threads import usable_cores
from myna.settings import AdapterSettings

VOCABULARY = 400
LENGTHS = (9, 3, 24, 1, 7, 25)
# wide enough that each weight moves the answer; wider ones make softmaxes so sharp that float32 itself is off by 1e-5
INITIALIZER_RANGE = 0.12
# what two ways to compute one thing may differ by: a path, an order of rows, a way to lay them
PATH_BOUND = {torch.float32: 1e-5, torch.float64: 1e-9}
ORDER_BOUND = {torch.float32: 1e-6, torch.float64: 1e-10}

# by family: what is changed in the tiny config of its real shape (windows shorter than the rows, caps that bend)
FAMILIES: dict[str, dict[str, Any]] = {name: {} for name in FAST} | {
    "mistral-window": {"sliding_window": 5},
    "llama-bias": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "qwen2-tied": {"tie_word_embeddings": True, "num_key_value_heads": 4},
    "phi3-window": {"sliding_window": 7},
    "gemma2-window": {"sliding_window": 5},
    "gemma3_text-window": {"sliding_window": 5},
    "gpt_neox-serial": {"use_parallel_residual": False, "attention_bias": False},
}
# of each kind one, where all of them would say the same again
FEW = ("llama", "gemma2-window", "qwen3", "gpt_neox")
KINDS = [("torch", torch.float32), ("native", torch.float32), ("torch", torch.float64)]
KIND_NAMES = ["torch-fp32", "native-fp32", "torch-fp64"]
each_kind = pytest.mark.parametrize(("kernels", "dtype"), KINDS, ids=KIND_NAMES)


@dataclass(frozen=True)
class Answer:
    """The sum of the losses, and the gradient of every adapter tensor by name."""

    loss: float
    gradients: dict[str, torch.Tensor]

    @property
    def norm(self) -> float:
        return float(torch.cat([g.flatten() for g in self.gradients.values()]).norm())


def require_same(found: Answer, expected: Answer, bound: float, *, each: float | None = None) -> None:
    """Fails where the loss or the whole gradient is off by more than `bound`, or one tensor's by more than `each`."""
    assert expected.norm > 0.1, "a gradient of nothing shows nothing"
    assert found.gradients.keys() == expected.gradients.keys()
    assert np.isfinite(found.loss), found.loss
    off = abs(found.loss - expected.loss) / abs(expected.loss)
    assert off <= bound, f"the loss is off by {off:.1e}"
    distances = {name: float((found.gradients[name] - g).norm()) for name, g in expected.gradients.items()}
    off = float(np.linalg.norm(list(distances.values()))) / expected.norm
    assert off <= bound, f"the gradient is off by {off:.1e}"
    for name, gradient in expected.gradients.items():
        off = distances[name] / max(float(gradient.norm()), 1e-30)
        assert off <= (each or bound), f"the gradient of {name} is off by {off:.1e}"


def same(found: Answer, expected: Answer, bound: float) -> bool:
    try:
        require_same(found, expected, bound)
    except AssertionError:
        return False
    return True


def distance(found: Answer, expected: Answer) -> float:
    """Of the gradients, relative, by norm."""
    pairs = [(found.gradients[name].double(), g.double()) for name, g in expected.gradients.items()]
    return float(torch.stack([(mine - theirs).norm() for mine, theirs in pairs]).norm()) / expected.norm


@functools.cache
def kernels_named(name: KernelsName) -> Kernels:
    """The kernels of that name; skips the test where this machine has no C compiler for them."""
    if name == "native":
        try:
            find_compiler()
        except NotNative as error:
            pytest.skip(str(error))
    return choose_kernels(name, usable_cores())


def example(ids: npt.ArrayLike, trained: npt.ArrayLike | None = None) -> Example:
    """A row; without `trained` all of its tokens but the first are in the loss."""
    tokens = np.asarray(ids, dtype=np.int64)
    mask = True if trained is None else np.asarray(trained)
    return Example(tokens, np.where(mask, tokens, IGNORE))


def examples(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[Example]:
    """Rows of random tokens, six in ten of them in the loss."""
    random = np.random.default_rng(seed)
    return [example(random.integers(3, VOCABULARY, n), random.random(n) < 0.6) for n in lengths]


def related_examples(seed: int = 0) -> list[Example]:
    """Rows that begin alike: chains of three levels, equal rows, whole prefixes, and one that shares nothing.

    Targets lie inside the shared parts too, in some of the rows that share them and not in others.
    """
    random = np.random.default_rng(seed)
    trunk, left, right, alone = (random.integers(3, VOCABULARY, n).tolist() for n in (13, 8, 6, 11))
    tails = [random.integers(3, VOCABULARY, n).tolist() for n in (7, 1, 9, 5, 4)]
    rows = [
        trunk + left + tails[0],
        trunk + left + tails[1],
        trunk + right + tails[2],
        trunk + left,  # a whole prefix of the first two
        trunk,  # and of these
        trunk + tails[3],
        alone,
        alone,  # twice the same
        alone + tails[4],
        trunk[:2] + tails[2],  # too little in common to share
        tails[1],
    ]
    order = random.permutation(len(rows))
    return [example(rows[k], random.random(len(rows[k])) < 0.6) for k in order]


def adapted(
    name: str,
    dtype: torch.dtype,
    method: str = "lora",
    *,
    targets: str | Sequence[str] = "all-linear",
    **changes: Any,
) -> Any:
    """A tiny model of a family, or of a family with something changed, and an adapter whose B is not zero."""
    named = targets if isinstance(targets, str) else tuple(targets)
    return copy.deepcopy(_adapted(name, method, named, tuple(changes.items()))).to(dtype)


@functools.cache
def _adapted(name: str, method: str, targets: str | tuple[str, ...], changes: tuple[Any, ...]) -> Any:
    """The same in float64."""
    from transformers import AutoModelForCausalLM

    settings = {
        "vocab_size": VOCABULARY,
        "initializer_range": INITIALIZER_RANGE,
        **FAMILIES[name],
        **dict(changes),
    }
    config = tiny_families.family_config(name.partition("-")[0], settings.pop("vocab_size"), **settings)
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).to(torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases that do something
                parameter.add_(torch.randn_like(parameter) * 0.2)
    asked = {"method": method, "target_modules": targets if isinstance(targets, str) else list(targets)}
    adapter = AdapterSettings.model_validate({"r": 4, "alpha": 8, **asked})
    model = add_adapter(model.requires_grad_(False), adapter, seed=3, base_name="tiny").to(torch.float64)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, dtype=torch.float64) * 0.1)
    return model


class Double(TorchFunctionMode):
    """float64 stays float64: transformers turns to float32 inside norms, rotary embeddings and softmax."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64:
            if func is torch.Tensor.float:
                return args[0]
            if func is torch.Tensor.to and torch.float32 in (*args[1:], kwargs.get("dtype")):
                return args[0]
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def answer_of(stepper: Stepper, model: Any, batches: Sequence[Batch], *, mean: bool = False) -> Answer:
    """The answer over a step's batches together; `mean`: over the step's target tokens, as training asks."""
    parameters = trainable_parameters(model)
    for parameter in parameters.values():
        parameter.grad = None
    total, num_targets = 0.0, sum(len(batch.targets_N) for batch in batches) if mean else 1
    with Double():
        for batch in batches:
            loss = stepper.loss(batch) / num_targets
            loss.backward()
            total += float(loss.detach())
    found = {name: p.grad.detach().clone() for name, p in parameters.items() if p.grad is not None}
    assert len(found) == len(parameters)
    return Answer(total, found)


def fast_answer(
    model: Any, batches: Sequence[Batch], kernels: Kernels | KernelsName = "torch", **settings: Any
) -> Answer:
    """What the fast path says of a fresh model, which it takes apart."""
    named = kernels_named(kernels) if isinstance(kernels, str) else kernels
    return answer_of(make_stepper(model, "fast", kernels=named, **settings), model, batches)


def reference_answer(model: Any, batches: Sequence[Batch]) -> Answer:
    """What the plain forward of transformers and peft says."""
    return answer_of(make_stepper(model, "reference"), model, batches)


@functools.cache
def reference_of(family: str, dtype: torch.dtype, method: str = "lora") -> Answer:
    """The reference's answer to `examples()`, computed once for all that is held against it."""
    return reference_answer(adapted(family, dtype, method), [collate(examples())])


class Made(TorchDispatchMode):
    """Every tensor that torch makes while it is on: the largest one's elements, and the bytes of those that still live.

    Views and what is written in place are not made anew.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self._storages: list[tuple[StorageWeakRef, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        given = {
            t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)
        }
        for tensor in tree_leaves(answer):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                self.largest = max(self.largest, tensor.numel())
                storage = tensor.untyped_storage()
                self._storages.append((StorageWeakRef(storage), storage.nbytes()))
        return answer

    def held_bytes(self) -> int:
        """What is alive now of all that was made."""
        alive = {ref.cdata: num_bytes for ref, num_bytes in self._storages if not ref.expired()}
        return sum(alive.values())
