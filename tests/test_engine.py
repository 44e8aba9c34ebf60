"""The parts of the step against their textbook forms."""

from __future__ import annotations

import math

import exactness
import pytest
import torch
import torch.nn.functional as F

import myna.engine.loss
from myna.data.packing import Batch, Segment, collate
from myna.engine.layout import plan_layout
from myna.engine.loss import chunk_tokens, target_loss
from myna.engine.optim import default_learning_rate, lr_at
from myna.engine.step import KernelsName, make_stepper, round_up
from myna.engine.threads import usable_cores
from myna.engine.torch_kernels import TorchKernels
from myna.settings import TrainSettings

LARGE_VOCABULARY = 128_256  # Llama 3's


@pytest.mark.parametrize("num_targets", [0, 1, 5, 13])
def test_the_loss_and_its_gradient_are_cross_entropys(num_targets: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(num_targets, 6, dtype=torch.float64, requires_grad=True)
    head, targets = torch.randn(11, 6, dtype=torch.float64), torch.randint(11, (num_targets,))
    ours = target_loss(hidden, head, targets, TorchKernels(), chunk=4)
    (gradient,) = torch.autograd.grad(ours * 0.3, hidden)
    theirs = F.cross_entropy(hidden @ head.T, targets, reduction="sum")
    (expected,) = torch.autograd.grad(theirs * 0.3, hidden)
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


@exactness.each_kind
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_chunks_of_a_large_vocabulary_are_the_whole(
    kernels: KernelsName, dtype: torch.dtype, softcap: float | None
) -> None:
    """Chunked = full, and nothing larger than a chunk's logits is ever made."""
    torch.manual_seed(0)
    hidden = torch.randn(50, 8, dtype=dtype, requires_grad=True)
    head, targets = torch.randn(LARGE_VOCABULARY, 8, dtype=dtype), torch.randint(LARGE_VOCABULARY, (50,))
    chunk = chunk_tokens(LARGE_VOCABULARY, dtype.itemsize)
    assert chunk < 50 and chunk * LARGE_VOCABULARY * dtype.itemsize <= 25_000_000
    with exactness.Made() as made:
        ours = target_loss(hidden, head, targets, exactness.kernels_named(kernels), softcap=softcap)
        ours.backward()
    assert made.largest == chunk * LARGE_VOCABULARY
    assert hidden.grad is not None
    exact_loss, exact = whole_loss(hidden.double(), head.double(), targets, softcap)
    assert abs(ours.item() - exact_loss) <= (1e-12 if dtype == torch.float64 else 2e-6) * exact_loss
    allowed = 1e-12 * exact.norm()
    if (
        dtype == torch.float32
    ):  # its sums over so many columns are off by 5e-5: no further than with full logits
        allowed = 1.2 * (whole_loss(hidden, head, targets, softcap)[1] - exact).norm()
    assert (hidden.grad - exact).norm() <= allowed


def whole_loss(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, softcap: float | None
) -> tuple[float, torch.Tensor]:
    """Cross-entropy with full logits, and its gradient in the hidden states."""
    leaf = hidden.detach().clone().requires_grad_()
    logits = leaf @ head.T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(logits, targets, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.item(), gradient


@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_a_step_makes_no_logits_of_all_tokens(kernels: KernelsName, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary, chunk = 20_000, 16
    monkeypatch.setattr(myna.engine.loss, "CHUNK_BYTES", chunk * vocabulary * 4)
    model = exactness.adapted("llama", torch.float32, vocab_size=vocabulary)
    stepper = make_stepper(model, "fast", kernels=exactness.kernels_named(kernels))
    batch = collate(exactness.examples((90, 100)))
    assert len(batch.targets_N) > 4 * chunk
    with exactness.Made() as made:
        stepper.loss(batch).backward()
    assert made.largest == chunk * vocabulary


def test_the_layout_puts_every_token_back() -> None:
    lengths = (30, 2, 29, 3, 1, 28)
    layout = plan_layout(collate(exactness.examples(lengths)))
    tokens = torch.arange(94)
    gathered = torch.cat([tokens[g.gather_F][g.keep_N] for g in layout.groups])
    assert gathered[layout.restore_T].tolist() == list(range(93))
    padded = sum(len(g.gather_F) for g in layout.groups)
    assert padded <= 1.25 * sum(lengths)  # one long document does not make the short ones long


def test_the_layout_of_shared_beginnings_puts_every_token_back_once() -> None:
    batch = collate(exactness.related_examples(), share=True)
    layout, num_tokens = plan_layout(batch), len(batch.input_ids_T)
    tokens = torch.arange(num_tokens + 1)
    gathered = torch.cat([tokens[g.gather_F][g.keep_N] for g in layout.groups])
    assert gathered[layout.restore_T].tolist() == list(range(num_tokens))
    tree = layout.tree
    for number, (start, length, position, parent) in enumerate(tree.segments.tolist()):
        assert batch.segments[number] == Segment(start, length, parent)
        assert batch.position_ids_T[start] == position
        below = tree.below[int(tree.below_at[number]) : int(tree.below_at[number + 1])].tolist()
        expected = {s for path in batch.documents if number in path for s in path[path.index(number) + 1 :]}
        assert sorted(below) == sorted(expected)
    covered = [t for _, first, count in tree.blocks.tolist() for t in range(first, first + count)]
    assert sorted(covered) == list(range(num_tokens))


def test_rounding_up_adds_a_document_that_changes_nothing() -> None:
    ids = torch.arange(5)
    batch = Batch(
        ids, ids, torch.tensor([1]), torch.tensor([7]), (Segment(0, 3), Segment(3, 2, 0)), ((0,), (0, 1))
    )
    rounded = round_up(batch, 4)
    assert rounded.input_ids_T.tolist() == [0, 1, 2, 3, 4, 0, 0, 0]
    assert rounded.position_ids_T.tolist() == [0, 1, 2, 3, 4, 0, 0, 0]
    assert rounded.segments == (*batch.segments, Segment(5, 3))
    assert (rounded.documents, rounded.lengths) == (((0,), (0, 1), (2,)), (3, 5, 3))
    assert rounded.target_index_N is batch.target_index_N
    assert round_up(batch, 5) is batch


@exactness.each_kind
def test_filling_tokens_change_no_answer(kernels: KernelsName, dtype: torch.dtype) -> None:
    """A pack of 64 tokens needs no filler; the decoder is asked once without and once with 64 of them."""
    model = exactness.adapted("phi3", dtype)
    stepper = make_stepper(model, "fast", kernels=exactness.kernels_named(kernels))
    batch = collate(exactness.examples((30, 34)))
    assert round_up(batch) is batch
    expected = exactness.answer_of(stepper, model, [batch])
    found = exactness.answer_of(stepper, model, [round_up(batch, 128)])
    exactness.require_same(found, expected, exactness.ORDER_BOUND[dtype], each=exactness.PATH_BOUND[dtype])


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
