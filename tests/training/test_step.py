"""What a step computes: the loss of labels in chunks, gradients clipped as a whole, the rate of the schedule.

Run: pytest tests/training/test_step.py
"""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from vlm_lora.model.packing import IGNORE_INDEX
from vlm_lora.training.step import LOGITS_AT_ONCE, add_up_and_clip, apply_gradients, learning_rate, loss_sum

ALONE = SimpleNamespace(add_up=list)


def test_the_rate_rises_to_its_peak_and_falls_to_zero_after_the_last_step():
    rates = [learning_rate(step, 40, peak=2.0, warmup=0.1) for step in range(41)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0
    assert rates[22] == pytest.approx(1.0)  # half of the way down
    assert rates[31] == pytest.approx(1 + math.cos(math.pi * 0.75))
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[39] > 0
    assert rates[40] == 0
    assert learning_rate(0, 1, peak=2.0, warmup=0.0) == 2.0


@pytest.mark.parametrize(("most", "factor"), [(1.0, 0.2), (2.5, 0.5), (5.5, 1.0)])
def test_gradients_are_clipped_together_and_the_norm_is_that_before(most, factor):
    tensors = [torch.zeros(2, requires_grad=True), torch.zeros(1, requires_grad=True), torch.zeros(3)]
    tensors[0].grad, tensors[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([-4.0])
    result = add_up_and_clip(torch.tensor(7.0), tensors, most, ALONE)
    assert (result.loss, result.grad_norm) == (7.0, 5.0)
    grads = [tensor.grad.tolist() for tensor in tensors if tensor.grad is not None]
    assert grads == [pytest.approx([3 * factor, 0.0]), pytest.approx([-4 * factor]), [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_loss_or_gradient_that_is_no_number_is_not_finite(wrong):
    tensor = torch.zeros(1, requires_grad=True)
    tensor.grad = torch.ones(1)
    assert add_up_and_clip(torch.tensor(1.0), [tensor], 1.0, ALONE).finite
    assert not add_up_and_clip(torch.tensor(wrong), [tensor], 1.0, ALONE).finite
    tensor.grad = torch.full((1,), wrong)
    assert not add_up_and_clip(torch.tensor(1.0), [tensor], 1.0, ALONE).finite


def test_each_group_moves_at_its_own_share_of_the_rate():
    one, other = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([{"params": [one], "peak": 4.0}, {"params": [other], "peak": 1.0}], lr=0.0)
    one.grad = other.grad = torch.ones(1)
    apply_gradients(optimizer, rate=0.5, peak=4.0)
    assert (one.item(), other.item()) == (-0.5, -0.125)


@pytest.mark.parametrize("labelled", [3, LOGITS_AT_ONCE, LOGITS_AT_ONCE + 1, 2 * LOGITS_AT_ONCE + 500])
@pytest.mark.parametrize("weighted", [False, True])
def test_no_more_logits_are_held_than_of_so_many_labels(labelled, weighted):
    """Those of a large vocabulary are the largest tensors there are. The loss is that of all at once."""
    hidden = torch.randn(2, 1500, 4, dtype=torch.float64, requires_grad=True)
    head, held = torch.randn(4, 7, dtype=torch.float64), []

    def logits(some: torch.Tensor) -> torch.Tensor:
        held.append(len(some))
        return some @ head

    labels = torch.full((2, 1500), IGNORE_INDEX)
    flat = torch.randperm(2 * 1499, generator=torch.Generator().manual_seed(0))[:labelled]
    labels[flat // 1499, flat % 1499 + 1] = flat % 7
    weights = torch.rand(2, 1500, dtype=torch.float64) if weighted else None
    backbone = SimpleNamespace(forward=lambda *args, **_: hidden, logits=logits)
    batch = SimpleNamespace(
        input_ids=None, attention_mask=None, position_ids=None, images=None, forks=None, labels=labels, weights=weights
    )
    loss = loss_sum(backbone, batch)
    loss.backward()
    assert max(held) <= LOGITS_AT_ONCE
    assert len(held) == (1 if labelled <= LOGITS_AT_ONCE else 2 * -(-labelled // LOGITS_AT_ONCE))  # again in backward
    found, hidden.grad = hidden.grad, None
    each = F.cross_entropy((hidden[:, :-1] @ head).flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    expected = (each * (1 if weights is None else weights[:, 1:].flatten())).sum()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, hidden.grad)
