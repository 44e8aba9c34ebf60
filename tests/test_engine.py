"""The parts of the step against their textbook forms."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from myna.data.packing import Batch
from myna.engine.attention import plan_layout
from myna.engine.lora import _LoraLinear
from myna.engine.loss import target_loss
from myna.engine.optim import default_learning_rate, lr_at
from myna.engine.step import round_up
from myna.engine.threads import usable_cores
from myna.recipe import TrainSettings


@pytest.mark.parametrize("num_targets", [1, 5, 13])
def test_the_loss_and_its_gradient_are_cross_entropys(num_targets: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(num_targets, 6, dtype=torch.float64, requires_grad=True)
    head, targets = torch.randn(11, 6, dtype=torch.float64), torch.randint(11, (num_targets,))
    ours = target_loss(hidden, head, targets, chunk=4)
    (gradient,) = torch.autograd.grad(ours * 0.3, hidden)
    theirs = F.cross_entropy(hidden @ head.T, targets, reduction="sum")
    (expected,) = torch.autograd.grad(theirs * 0.3, hidden)
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


def test_the_lora_linear_has_the_gradient_of_its_formula() -> None:
    torch.manual_seed(0)
    x, a, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((7, 5), (3, 5), (4, 3)))
    weight, bias = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    torch.testing.assert_close(
        _LoraLinear.apply(x, weight, bias, a, b, 0.5), x @ weight.T + bias + 0.5 * x @ a.T @ b.T
    )
    assert torch.autograd.gradcheck(
        lambda *t: _LoraLinear.apply(t[0], weight, bias, t[1], t[2], 0.5), (x, a, b)
    )


def test_the_layout_puts_every_token_back() -> None:
    lengths = (30, 2, 29, 3, 1, 28)
    starts = (0, 30, 32, 61, 64, 65)
    empty = torch.zeros(93, dtype=torch.long)
    layout = plan_layout(Batch(empty, empty, empty, empty, starts, lengths))
    tokens = torch.arange(94)
    gathered = torch.cat([tokens[g.gather_F][g.keep_N] for g in layout.groups])
    assert gathered[layout.restore_T].tolist() == list(range(93))
    padded = sum(g.num_documents * g.longest for g in layout.groups)
    assert padded <= 1.25 * sum(lengths)  # one long document does not make the short ones long


def test_rounding_up_adds_a_document_that_changes_nothing() -> None:
    ids = torch.arange(5)
    batch = Batch(ids, ids, torch.tensor([1]), torch.tensor([7]), (0, 3), (3, 2))
    rounded = round_up(batch, 4)
    assert rounded.input_ids_T.tolist() == [0, 1, 2, 3, 4, 0, 0, 0]
    assert (rounded.starts, rounded.lengths) == ((0, 3, 5), (3, 2, 3))
    assert rounded.target_index_N is batch.target_index_N
    assert round_up(batch, 5) is batch


def test_the_learning_rate_is_a_pure_function_of_the_step() -> None:
    settings = TrainSettings(learning_rate=1.0, warmup_steps=2)
    rates = [lr_at(step, 6, settings) for step in range(1, 7)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25])
    cosine = [lr_at(step, 6, settings.model_copy(update={"schedule": "cosine"})) for step in range(3, 7)]
    assert cosine == pytest.approx([0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)])
    assert lr_at(6, 6, settings.model_copy(update={"schedule": "constant"})) == 1.0
    assert lr_at(1, 1, settings) == 1.0


def test_the_default_rate_is_the_tried_one_and_falls_with_width() -> None:
    assert default_learning_rate(576) == 1e-3
    assert default_learning_rate(4096) == pytest.approx(2e-4, rel=0.05)


def test_there_is_a_core() -> None:
    assert usable_cores() >= 1
