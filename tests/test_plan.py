"""The frozen plan: what it follows from, what it refuses, and that a resumed run obeys it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_families
import torch
from torch.nn.attention.flex_attention import flex_attention

import myna.engine.flex
import myna.engine.step
import myna.plan
from myna.data.epochs import Part
from myna.engine.compiler import NotNative
from myna.engine.estimate import base_shape, estimate_memory, kept_input_bytes
from myna.engine.loss import chunk_tokens
from myna.engine.step import ROUND_TOKENS
from myna.errors import MachineError, MynaError, RecipeError, UsageError
from myna.plan import (
    FrozenPlan,
    Machine,
    freeze_plan,
    longest_pack,
    planned_kernels,
    read_plan,
    this_machine,
    unused_settings,
)
from myna.recipe import Recipe, build_recipe

MACHINE = Machine(device="cpu", cores=3, fast_bf16=True, total_memory_mb=8_000, fast_int8=True)
LENGTHS = (90, 40, 12, 77, 5, 130)


def recipe(**blocks: dict[str, object]) -> Recipe:
    tree: dict[str, Any] = {"data": {"train": "rows.jsonl"}, "train": {"pack_tokens": 256}}
    for block, settings in blocks.items():
        tree[block] = {**tree.get(block, {}), **settings}
    return build_recipe(tree)


def plan(machine: Machine = MACHINE, family: str = "llama", **blocks: dict[str, object]) -> FrozenPlan:
    return freeze_plan(recipe(**blocks), tiny_families.family_config(family, 400), LENGTHS, machine)


def test_the_same_recipe_twice_is_the_same_plan() -> None:
    assert plan() == plan()
    assert plan(train={"batch_size": 2}) != plan()


def test_no_free_memory_and_no_time_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock and a memory gauge that answer otherwise each time, this machine's plan is the same."""
    import time

    import psutil

    honest = psutil.virtual_memory()
    before = plan(this_machine())
    monkeypatch.setattr(
        psutil, "virtual_memory", lambda: honest._replace(available=1, used=honest.total, free=1)
    )
    monkeypatch.setattr(time, "perf_counter", lambda: pytest.fail("a plan takes no time"))
    assert plan(this_machine()) == before


def test_everything_that_is_decided_is_in_it() -> None:
    found = plan(train={"epochs": 2, "batch_size": 4})
    assert (found.threads, found.dtype, found.num_rows, found.num_steps) == (3, "bf16", 6, 4)
    assert (found.path, found.quantize, found.checkpoint_layers, found.round_tokens) == (
        "fast",
        "none",
        0,
        ROUND_TOKENS,
    )
    assert found.head_tokens == chunk_tokens(400, 2)
    assert found.kernels in ("native", "torch") and bool(found.kernels_reason) == (found.kernels == "torch")
    gpu = replace(MACHINE, device="cuda")
    assert (plan(gpu).dtype, plan(replace(gpu, fast_bf16=False)).dtype) == ("bf16", "fp16")
    assert plan(model={"dtype": "fp16"}).dtype == "fp16"  # named, it is had on a CPU too


def test_narrow_weights_are_multiplied_in_float32_where_the_cpu_is_slower_in_theirs() -> None:
    slow = replace(MACHINE, fast_bf16=False)
    assert (plan(slow).dtype, plan(slow).widen) == ("fp32", False)
    asked = plan(slow, model={"dtype": "bf16"})
    assert (asked.dtype, asked.widen) == ("bf16", True)
    assert "kept in bf16 and multiplied in fp32" in " | ".join(asked.sentences())
    assert not plan(model={"dtype": "bf16"}).widen
    assert not plan(slow, model={"dtype": "bf16"}, train={"packed": False}).widen
    # where a float32 base would take most of the memory
    tight = plan(replace(slow, total_memory_mb=0.1))
    assert (tight.dtype, tight.widen) == ("bf16", True)
    assert plan(replace(slow, total_memory_mb=0.1), train={"packed": False}).dtype == "fp32"


def test_int8_weights_are_multiplied_in_float32_where_the_cpu_is_slow_at_integers() -> None:
    asked, slow = {"quantize": "int8"}, replace(MACHINE, fast_int8=False)
    fast, widened = plan(model=asked), plan(slow, model=asked)
    assert (fast.int8_products, widened.int8_products) == ("int8", "fp32")
    assert "kept and multiplied as int8" in " | ".join(fast.sentences())
    assert "kept as int8 and multiplied in fp32" in " | ".join(widened.sentences())
    assert (
        plan(slow).int8_products == "int8" and plan(slow) == plan()
    )  # who asks for no int8 is not concerned


def test_the_machine_s_word_about_integers_is_one_function_s(monkeypatch: pytest.MonkeyPatch) -> None:
    for fast in (True, False):
        monkeypatch.setattr(myna.plan, "fast_in_int8", lambda fast=fast: fast)
        assert this_machine().fast_int8 is fast


def test_a_file_that_is_seen_twice_may_have_its_longest_row_in_a_step_twice() -> None:
    config = tiny_families.family_config("llama", 400)
    lengths, wide = [20] * 9 + [500], recipe(train={"batch_size": 4, "pack_tokens": 2000})
    once, twice = (freeze_plan(wide, config, lengths, MACHINE, (Part(10, weight),)) for weight in (1.0, 2.0))
    assert (once.num_rows, twice.num_rows) == (10, 20)
    assert once.memory_mb and twice.memory_mb and twice.memory_mb > once.memory_mb


def test_settings_that_change_nothing_are_said() -> None:
    def said(**train: object) -> list[str]:
        asked = recipe(train=train)
        return list(unused_settings(asked, plan(train=train)))

    assert said() == [] and said(max_steps=1) == []
    assert "1 epoch is 1 steps: train.epochs" in said(max_steps=25)[0]
    assert "disk is not used" in said(checkpoint_to="disk")[0]
    assert said(checkpoint_to="disk", gradient_checkpointing="all") == []


def test_kernels_that_are_asked_for_and_not_planned_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run obeys its plan, whatever the variable says by then."""
    asked, began = recipe(), replace(plan(), kernels="native", kernels_reason="")
    monkeypatch.setenv("MYNA_KERNELS", "torch")
    (said,) = unused_settings(asked, began)
    assert said == "MYNA_KERNELS=torch changes nothing here: the run was planned with C kernels"
    monkeypatch.setenv("MYNA_KERNELS", "native")
    assert list(unused_settings(asked, began)) == []
    (said,) = unused_settings(asked, replace(began, kernels="torch", kernels_reason="no compiler"))
    assert said == "MYNA_KERNELS=native changes nothing here: no compiler"


def test_what_was_decided_is_said() -> None:
    said = " | ".join(plan(train={"packed": False}).sentences())
    assert "reference path: train.packed is false" in said and "kernels" not in said
    found = plan(model={"quantize": "int8"}, train={"gradient_checkpointing": 2})
    said = " | ".join(replace(found, kernels="torch", kernels_reason="no compiler").sentences())
    for part in ("fast path", "torch's (no compiler)", "int8", "every 2 layers", "memory: about"):
        assert part in said
    assert "may not fit" not in said
    assert "may not fit" in " | ".join(replace(found, total_memory_mb=700.0).sentences())


@pytest.mark.parametrize(("asked", "layers"), [("none", 0), ("all", 1), (3, 3)])
def test_checkpointing_is_as_asked(asked: object, layers: int) -> None:
    assert plan(train={"gradient_checkpointing": asked}).checkpoint_layers == layers


def test_checkpointing_comes_where_the_longest_pack_does_not_fit() -> None:
    """Of all memory, 60 %: nothing else turns it on."""
    needed = plan().memory_mb
    assert needed is not None
    assert plan(replace(MACHINE, total_memory_mb=needed / 0.6 + 2)).checkpoint_layers == 0
    small = plan(replace(MACHINE, total_memory_mb=needed / 0.6 - 2))
    assert small.checkpoint_layers == 1
    assert small.memory_mb is not None and small.memory_mb <= needed
    kept = plan(replace(MACHINE, total_memory_mb=1.0), train={"gradient_checkpointing": "none"})
    assert kept.checkpoint_layers == 0


def test_the_longest_pack() -> None:
    assert longest_pack((10, 20, 30), 2, 1024, padded=False) == 64  # 30 + 20, up to a whole 64
    assert longest_pack((10, 20, 30), 3, 40, padded=False) == 64
    assert longest_pack((300, 20), 2, 100, padded=False) == 320  # a row alone may be longer than a pack
    assert longest_pack((30, 2, 2), 8, 100, padded=True) == 90  # each row padded to the longest


REFUSED: list[tuple[dict[str, dict[str, object]], Machine, str]] = [
    ({"model": {"quantize": "int8"}, "train": {"packed": False}}, MACHINE, r"int8.*train\.packed is false"),
    ({"model": {"quantize": "int8"}}, replace(MACHINE, device="cuda"), "int8.*device is cuda"),
    ({"train": {"packed": False, "gradient_checkpointing": 2}}, MACHINE, "2 layers together"),
    ({"train": {"packed": False, "checkpoint_to": "disk"}}, MACHINE, r"disk is for.*train\.packed is false"),
    ({"train": {"gradient_checkpointing": "none", "checkpoint_to": "disk"}}, MACHINE, "disk has nothing"),
]


@pytest.mark.parametrize(("blocks", "machine", "words"), REFUSED)
def test_what_is_not_ours_is_refused(
    blocks: dict[str, dict[str, object]], machine: Machine, words: str
) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        plan(machine, **blocks)
    assert (caught.value.help or "").startswith("--set ")


def no_compiler(*_: object) -> Any:
    raise NotNative("there is no C compiler")


def test_the_environment_has_the_last_word_on_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MYNA_KERNELS", "torch")
    assert (plan().kernels, plan().kernels_reason) == ("torch", "MYNA_KERNELS=torch")
    monkeypatch.setenv("MYNA_KERNELS", "fast")
    with pytest.raises(UsageError, match="MYNA_KERNELS=fast"):
        plan()
    monkeypatch.setenv("MYNA_KERNELS", "native")
    with pytest.raises(
        MachineError, match="C kernels cannot be had here: the C kernels are for a CPU, the device is cuda"
    ):
        with_flex(monkeypatch)
        plan(replace(MACHINE, device="cuda"))
    monkeypatch.setattr(myna.engine.step, "load_native", no_compiler)
    with pytest.raises(MachineError, match="C kernels cannot be had here: there is no C compiler"):
        plan()
    monkeypatch.delenv("MYNA_KERNELS")
    assert (plan().kernels, plan().kernels_reason) == ("torch", "there is no C compiler")


def with_flex(monkeypatch: pytest.MonkeyPatch, *, triton: bool = True, compiler: bool = True) -> None:
    """A machine that has, or has not, what flex_attention is compiled by."""
    monkeypatch.setattr(myna.engine.flex, "COMPILER_PACKAGE", "json" if triton else "no_such_package")
    monkeypatch.setattr(myna.engine.flex, "find_compiler", (lambda: ["cc"]) if compiler else no_compiler)


def test_block_masks_are_planned_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = replace(MACHINE, device="cuda")
    with_flex(monkeypatch)
    assert plan(gpu).kernels == "torch" and "for a CPU" in plan(gpu).kernels_reason
    monkeypatch.setenv("MYNA_KERNELS", "flex")
    found = plan(gpu)
    assert (found.kernels, found.kernels_reason) == ("flex", "")
    assert "attention by block masks" in " | ".join(found.sentences())
    assert planned_kernels(found).name == "flex"
    with_flex(monkeypatch, triton=False)
    with pytest.raises(MachineError, match="no_such_package, which is not installed"):
        plan(gpu)
    with pytest.raises(MachineError, match=r"begun with attention by block masks.*not installed") as caught:
        planned_kernels(found)
    assert caught.value.code == "kernels"
    with_flex(monkeypatch, compiler=False)
    with pytest.raises(MachineError, match="there is no C compiler"):
        plan(gpu)


def test_block_masks_are_refused_where_they_cannot_train(monkeypatch: pytest.MonkeyPatch) -> None:
    with_flex(monkeypatch)
    monkeypatch.setenv("MYNA_KERNELS", "flex")
    with pytest.raises(MachineError, match="flex_attention has no backward on a CPU") as caught:
        plan()
    assert caught.value.exit_code == 4 and "unset MYNA_KERNELS" in (caught.value.help or "")
    assert plan(replace(MACHINE, device="cuda")).kernels == "flex"
    with_flex(monkeypatch, triton=False)
    with pytest.raises(MachineError, match="which is not installed"):
        plan(replace(MACHINE, device="cuda"))
    # torch's own word on it: when this changes, so may the plan
    with pytest.raises(NotImplementedError, match="backward on CPU"):
        ones = torch.ones(1, 1, 128, 16, requires_grad=True)
        flex_attention(ones, ones, ones).sum().backward()


def test_planned_kernels_that_cannot_be_had_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(myna.engine.step, "load_native", no_compiler)
    begun = replace(plan(), kernels="native")
    with pytest.raises(MachineError, match=r"begun with C kernels.*no C compiler") as caught:
        planned_kernels(begun)
    assert "C compiler" in (caught.value.help or "") and caught.value.exit_code == 4
    assert planned_kernels(replace(begun, kernels="torch")).name == "torch"


def test_a_plan_is_read_back_and_an_older_one_too(tmp_path: Path) -> None:
    path, made = tmp_path / "plan.json", plan()
    path.write_text(json.dumps(asdict(made)))
    assert read_plan(path) == made
    old = {"device": "cpu", "dtype": "bf16", "threads": 2, "path": "fast", "path_reason": ""}
    old |= {"pack_tokens": 1024, "num_rows": 36, "num_steps": 9}
    path.write_text(json.dumps(old))
    read = read_plan(path)
    assert (read.kernels, read.quantize, read.checkpoint_layers, read.round_tokens) == (
        "torch",
        "none",
        0,
        64,
    )
    assert len(list(read.sentences())) == 2
    assert read.int8_products == "int8"  # one that was begun with integers goes on with them
    path.write_text(json.dumps(old | {"moons": 3}))
    with pytest.raises(MachineError, match="moons"):
        read_plan(path)


def test_where_inputs_of_layers_wait() -> None:
    every = {"gradient_checkpointing": "all"}
    disk, memory, here = (plan(train={**every, "checkpoint_to": to}) for to in ("disk", "cpu", "device"))
    assert (disk.checkpoint_to, memory.checkpoint_to, here.checkpoint_to) == ("disk", "cpu", "device")
    assert "keeps layers' inputs on disk" in " | ".join(disk.sentences())
    assert "in CPU memory, where this device has them anyhow" in " | ".join(memory.sentences())
    assert "keeps" not in " | ".join(here.sentences())
    gpu = plan(replace(MACHINE, device="cuda"), train={**every, "checkpoint_to": "cpu"})
    assert "inputs in CPU memory" in " | ".join(gpu.sentences()) and "anyhow" not in " ".join(gpu.sentences())
    # where memory does not ask for checkpointing, nothing is kept anywhere
    assert plan(train={"checkpoint_to": "disk"}).checkpoint_to == "device"
    small = replace(MACHINE, total_memory_mb=1.0)
    assert plan(small, train={"checkpoint_to": "disk"}).checkpoint_to == "disk"


def test_the_estimate_is_told_where_inputs_wait_and_what_is_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, bool]] = []

    def noted(*shape: Any, **given: Any) -> Any:
        told.append((given["checkpoint_to"], given["widen"]))
        return estimate_memory(*shape, **given)

    monkeypatch.setattr(myna.plan, "estimate_memory", noted)
    train = {"gradient_checkpointing": "all", "checkpoint_to": "disk"}
    plan(train=train)
    plan(replace(MACHINE, fast_bf16=False), model={"dtype": "bf16"}, train=train)
    assert set(told) == {("disk", False), ("disk", True)}


def test_int8_multiplied_in_float32_takes_as_much_a_token_as_widened_weights() -> None:
    """And one byte a weight all the same."""
    shape = base_shape(tiny_families.family_config("llama", 400, num_hidden_layers=30))
    given: dict[str, Any] = {"dtype": "bf16", "rank": 16, "tokens": 1000, "fast": True, "native": True}
    given |= {"checkpoint_layers": 0}
    wide, integers, widened = (
        estimate_memory(shape, **given, **how)
        for how in (
            {"quantize": "none", "widen": True},
            {"quantize": "int8"},
            {"quantize": "int8", "int8_products": "fp32"},
        )
    )
    assert widened.weights == integers.weights < wide.weights
    assert widened.temporaries == wide.temporaries != integers.temporaries


def test_inputs_that_wait_elsewhere_are_not_in_the_estimate() -> None:
    shape = base_shape(tiny_families.family_config("llama", 400, num_hidden_layers=30))
    given: dict[str, Any] = {"dtype": "bf16", "rank": 16, "tokens": 1000, "fast": True, "native": True}
    here, disk = (
        estimate_memory(shape, **given, quantize="none", checkpoint_layers=2, checkpoint_to=to).activations
        for to in ("device", "disk")
    )
    one = kept_input_bytes(shape, dtype="bf16", tokens=1000, checkpoint_layers=2) / 15
    assert one == 1000 * 64 * 2 and here - disk == pytest.approx(13 * one / 1e6)


@pytest.mark.parametrize("value", ["some", 0, -1, 1.5, True, [1]])
def test_a_wrong_gradient_checkpointing_is_told(value: object) -> None:
    with pytest.raises(MynaError, match="gradient_checkpointing: is one of auto, none, all, or a number"):
        recipe(train={"gradient_checkpointing": value})


def test_the_tiny_base_is_what_the_estimate_reads(tiny_base: Path) -> None:
    from myna.model.load import read_config

    shape = base_shape(read_config(tiny_base))
    config = tiny.model_config()
    assert (shape.width, shape.inner, shape.layers) == (64, 128, config.num_hidden_layers)
    assert (shape.query, shape.key_value, shape.vocabulary, shape.tied) == (64, 32, 400, True)
