"""fp16 with loss scaling: what would vanish is kept, what overflows skips a step, a resume goes on with the same scale."""

from __future__ import annotations

import itertools
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import exactness
import pytest
import tiny
import torch
from exactness import Answer, adapted, distance, examples
from safetensors.torch import load_file

import myna.engine.scaling
import myna.train
from myna.adapters.methods import trainable_parameters
from myna.data.packing import collate
from myna.engine.loss import target_loss
from myna.engine.scaling import LossScale, Scaling, loss_scale_of, mean_loss
from myna.engine.step import KernelsName, PathName, make_stepper
from myna.engine.torch_kernels import TorchKernels
from myna.errors import CheckFailed, Interrupted
from myna.pipeline import train_stage
from myna.plan import read_plan
from myna.prepare import prepare
from myna.recipe import Recipe, load_recipe
from myna.run import Run
from myna.stored import run_of
from myna.train import train


def test_the_scale_halves_doubles_and_has_a_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(myna.engine.scaling, "GOOD_STEPS", 3)
    state = LossScale(8.0)
    seen = []
    for finite in (True, True, False, True, True, True, True, False, False, False, False, False):
        state = state.after(finite=finite)
        seen.append((state.scale, state.good_steps))
    assert seen[:7] == [(8, 1), (8, 2), (4, 0), (4, 1), (4, 2), (8, 0), (8, 1)]
    assert seen[7:] == [(4, 0), (2, 0), (1, 0), (1, 0), (1, 0)] and state.is_least
    assert loss_scale_of("bf16") is None and loss_scale_of("fp16") == LossScale(2.0**16)


def hidden_gradient(dtype: torch.dtype, scale: float, after: float = 1.0) -> torch.Tensor:
    """Of a loss whose target is all but certain; each of the 4,000 others has a probability of 1e-8, and they pull alike."""
    head_Vd = torch.ones(4000, 4, dtype=torch.float64)
    head_Vd[:, 0], head_Vd[7] = 0, torch.tensor([1.0, 0, 0, 0])
    leaf = torch.tensor([[18.5, 0, 0, 0]], dtype=dtype, requires_grad=True)
    loss = target_loss(leaf, head_Vd.to(dtype), torch.tensor([7]), TorchKernels(), scale=scale)
    (loss * after).backward()
    assert leaf.grad is not None
    return leaf.grad.double() / (scale * after)


def test_what_is_scaled_after_the_loss_is_scaled_too_late() -> None:
    exact, scale = hidden_gradient(torch.float64, 1.0), 2.0**10
    inside, outside = hidden_gradient(torch.float16, scale), hidden_gradient(torch.float16, 1.0, scale)
    assert float((inside - exact).norm()) < 0.01 * float(exact.norm())
    assert float(exact[0, 1:].min()) > 3e-5 and not outside[0, 1:].any()


@pytest.mark.slow
def test_training_scales_inside_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """By scale over target tokens, in one factor, all the way into the kernels."""
    batch, seen = collate(examples()), []
    honest = TorchKernels.loss_back

    def watched(kernels: TorchKernels, *given: Any) -> torch.Tensor:
        seen.append(given[3])
        return honest(kernels, *given)

    monkeypatch.setattr(TorchKernels, "loss_back", watched)
    stepper = make_stepper(adapted("llama", torch.float16), "fast")
    num_targets = len(batch.targets_N)
    scaled = mean_loss(stepper, batch, num_targets, LossScale(256.0))
    plain = mean_loss(stepper, batch, num_targets)
    assert seen == [256.0 / num_targets, 1.0]
    assert float(scaled.detach()) == pytest.approx(256 * float(plain.detach()), rel=1e-6)


EVERY_WAY = [("fast", *kind) for kind in exactness.KINDS] + [("reference", "torch", torch.float32)]


@pytest.mark.parametrize(("path", "kernels", "dtype"), EVERY_WAY)
def test_a_power_of_two_is_the_same_to_the_bit(
    path: PathName, kernels: KernelsName, dtype: torch.dtype
) -> None:
    """The loss and all its gradients, times the scale."""
    batch, model = collate(examples()), adapted("gemma2", dtype)  # its head has a cap
    stepper = make_stepper(model, path, kernels=exactness.kernels_named(kernels))
    plain = exactness.answer_of(stepper, model, [batch])
    model.zero_grad()
    with exactness.Double():
        loss = stepper.loss(batch, 64.0)
        loss.backward()
    assert float(loss.detach()) == 64 * plain.loss
    for name, parameter in trainable_parameters(model).items():
        assert parameter.grad is not None and torch.equal(parameter.grad, 64 * plain.gradients[name]), name


def half_answer(family: str, path: PathName, scale: float | None) -> Answer:
    """The mean loss with a base in fp16 and an adapter in float32, as training has them; unscaled again."""
    model, batch = adapted(family, torch.float16), collate(examples())
    for name, parameter in trainable_parameters(adapted(family, torch.float32)).items():
        trainable_parameters(model)[name].data = parameter.data
    scaling = None if scale is None else LossScale(scale)
    loss = mean_loss(make_stepper(model, path), batch, len(batch.targets_N), scaling)
    loss.backward()
    found = {name: p.grad / (scale or 1) for name, p in trainable_parameters(model).items()}  # type: ignore[operator]
    return Answer(float(loss.detach()) / (scale or 1), found)


@pytest.mark.parametrize("family", exactness.FEW)
def test_fp16_is_as_near_the_truth_as_the_plain_forward(family: str) -> None:
    model = adapted(family, torch.float64)
    stepper = make_stepper(model, "reference")
    truth = exactness.answer_of(stepper, model, [collate(examples())], mean=True)
    fast, plain = (half_answer(family, path, 2.0**10) for path in ("fast", "reference"))  # type: ignore[arg-type]
    assert abs(fast.loss - truth.loss) <= 5e-4 * truth.loss
    assert distance(fast, truth) <= 1.5 * distance(plain, truth) < 0.02


@pytest.fixture
def recipe(tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.chdir(tmp_path)
    rows = tiny.write_rows(tmp_path / "orders.jsonl", tiny.rows(40))
    path = tmp_path / "recipe.yaml"
    settings = {"max_steps": 9, "save_every_steps": 50}
    path.write_text(tiny.recipe_text(tiny_base, rows, train=settings, model={"dtype": "fp16"}))
    return load_recipe(path)


def named(recipe: Recipe, name: str, **model: object) -> Recipe:
    blocks = {"run": {"name": name}, "model": model}
    return recipe.model_copy(
        update={block: getattr(recipe, block).model_copy(update=new) for block, new in blocks.items()}
    )


def lines_of(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.metrics_path.read_text().splitlines()]


@pytest.mark.slow
def test_a_training_in_fp16_goes_as_one_in_float32(recipe: Recipe) -> None:
    halves, exact = (lines_of(train_stage(named(recipe, d, dtype=d))) for d in ("fp16", "fp32"))
    assert [line["loss"] for line in halves] == pytest.approx([line["loss"] for line in exact], rel=5e-3)
    assert [line["grad_norm"] for line in halves] == pytest.approx(
        [line["grad_norm"] for line in exact], rel=0.03
    )
    assert halves[-1]["loss"] < 0.8 * halves[0]["loss"]
    assert {line["loss_scale"] for line in halves} == {2.0**16}
    assert {line["loss_scale"] for line in exact} == {None}
    assert not any(line["skipped"] for line in halves + exact)


def test_the_adapter_and_its_moments_stay_float32(recipe: Recipe) -> None:
    run = train_stage(named(recipe, "fp16"))
    checkpoint = run.checkpoints_dir / "step-000009"
    for name in ("adapter", "optimizer"):
        tensors = load_file(checkpoint / f"{name}.safetensors")
        assert {t.dtype for n, t in tensors.items() if not n.startswith("random/")} == {torch.float32}
    assert read_plan(run.plan_path).dtype == "fp16"


def test_an_overflow_skips_the_step_and_halves_the_scale(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first scale far too large: steps are skipped until it fits, and the rest learn."""
    monkeypatch.setattr(myna.engine.scaling, "FIRST_SCALE", 2.0**24)
    states: list[tuple[bytes, float]] = []
    honest = myna.train.take_step

    def watched(prepared: Any, step: int, stepper: Any, adapter: Any, *rest: Any) -> Any:
        found = honest(prepared, step, stepper, adapter, *rest)
        values = torch.cat([p.detach().flatten() for p in adapter.parameters.values()])
        assert not adapter.gradient_P.any()  # nothing of a skipped step goes into the next
        (count,) = {float(state["step"]) for state in adapter.state.values()}
        states.append((values.numpy().tobytes(), count))
        return found

    monkeypatch.setattr(myna.train, "take_step", watched)
    lines = lines_of(train_stage(named(recipe, "over")))
    skipped = [line["skipped"] for line in lines]
    assert skipped[0] and 2 <= sum(skipped) <= 7
    assert [line["grad_norm"] is None for line in lines] == skipped
    assert lines[0]["loss_scale"] == 2.0**24
    for line, after in itertools.pairwise(lines):
        assert after["loss_scale"] == line["loss_scale"] / (2 if line["skipped"] else 1)
    values, counts = zip(*states, strict=True)
    assert list(counts) == list(itertools.accumulate(not was_skipped for was_skipped in skipped))
    # a step that was skipped left the adapter as it found it; the first that was not moved it from where it began
    found = [before == after for before, after in itertools.pairwise(values)]
    assert found == skipped[1:]


def stopping_after(step: int) -> Iterator[int | None]:
    yield from [None] * (step - 1)
    while True:
        yield signal.SIGTERM


KEYS = ("step", "loss", "grad_norm", "loss_scale", "skipped")


def told(run: Run) -> list[list[Any]]:
    return [[line[key] for key in KEYS] for line in lines_of(run)]


def stopped_and_resumed(recipe: Recipe, stop: int) -> Run:
    asked = stopping_after(stop)
    with pytest.raises(Interrupted):
        list(train(prepare(recipe, run_of(recipe), print), print, lambda: next(asked)))
    return train_stage(recipe, resume=True)


@pytest.mark.slow
def test_resumed_across_a_change_of_scale_is_not_stopped(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between two overflows, and one good step before a doubling; and a planted fault, a scale that is forgotten."""
    monkeypatch.setattr(myna.engine.scaling, "FIRST_SCALE", 2.0**21)
    monkeypatch.setattr(myna.engine.scaling, "GOOD_STEPS", 2)
    straight = train_stage(named(recipe, "straight"))
    scales = [line["loss_scale"] for line in lines_of(straight)]
    turns = {after > before for before, after in itertools.pairwise(scales) if after != before}
    assert turns == {False, True}  # it fell and rose
    for stop in (1, 6):
        run = stopped_and_resumed(named(recipe, f"stopped-{stop}"), stop)
        assert told(run) == told(straight)
        paths = (r.adapter_dir / "adapter_model.safetensors" for r in (run, straight))
        assert len({path.read_bytes() for path in paths}) == 1
    monkeypatch.setattr(Scaling, "take_state", lambda *_: None)
    assert told(stopped_and_resumed(named(recipe, "forgets"), 1)) != told(straight)


def test_a_gradient_that_never_becomes_finite_ends_the_run(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is finite and its gradient is not, at any scale: skipped down to the least, then exit 5 with the rows."""
    monkeypatch.setattr(myna.engine.scaling, "FIRST_SCALE", 2.0**3)
    wild = recipe.adapter.model_copy(update={"alpha": 4e37})
    with pytest.raises(CheckFailed, match=r"the gradient of step 4 is (inf|nan), its loss \d") as caught:
        train_stage(named(recipe, "wild").model_copy(update={"adapter": wild}))
    assert "orders.jsonl:" in caught.value.message and caught.value.exit_code == 5
    assert "65,504" in (caught.value.help or "")
    lines = lines_of(Run(Path("runs/wild")))
    assert [(line["loss_scale"], line["skipped"]) for line in lines] == [(8, True), (4, True), (2, True)]
    assert not Path("runs/wild/adapter").exists()


def test_a_loss_that_is_not_finite_is_no_matter_of_scaling(recipe: Recipe, tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "own", tie_word_embeddings=False)
    from safetensors.torch import save_file

    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= (
        60_000 / tensors["model.layers.1.mlp.up_proj.weight"].max()
    )
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckFailed, match=r"the loss of step 1 is (nan|inf)"):
        train_stage(named(recipe, "broken", base=str(base)))
