import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from torch import Tensor
from torch.nn.functional import cross_entropy

from noisyclean.srem import soft_target_loss, weighted_contrastive_loss

SIZE = 7


@pytest.fixture
def logits() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return 4 * torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64)


@pytest.fixture
def weights() -> Tensor:
    return torch.rand(SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_without_weights_it_is_infonce(logits: Tensor) -> None:
    own = torch.arange(SIZE)
    expected = (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2
    torch.testing.assert_close(weighted_contrastive_loss(logits), expected)


def test_each_direction_is_a_weighted_mean(logits: Tensor, weights: Tensor) -> None:
    image_weights, text_weights = torch.rand(2, SIZE, dtype=torch.float64)
    z, w, a, b = (tensor.numpy() for tensor in (logits, weights, image_weights, text_weights))
    image_loss = [-log_softmax(z[i])[i] for i in range(SIZE)]
    text_loss = [-log_softmax(z[:, i])[i] for i in range(SIZE)]
    expected = (np.average(image_loss, weights=w * a) + np.average(text_loss, weights=w * b)) / 2
    value = weighted_contrastive_loss(logits, weights, image_weights=image_weights, text_weights=text_weights)
    assert value.item() == pytest.approx(expected)


def test_only_the_proportions_of_the_weights_count(logits: Tensor, weights: Tensor) -> None:
    torch.testing.assert_close(
        weighted_contrastive_loss(logits, 5 * weights), weighted_contrastive_loss(logits, weights)
    )


def test_a_pair_of_weight_zero_is_still_a_negative_of_the_others(logits: Tensor) -> None:
    weights = torch.ones(SIZE, dtype=torch.float64)
    weights[2] = 0
    kept = [i for i in range(SIZE) if i != 2]
    own = torch.tensor(kept)
    expected = (cross_entropy(logits[kept], own) + cross_entropy(logits.T[kept], own)) / 2
    torch.testing.assert_close(weighted_contrastive_loss(logits, weights), expected)


def test_no_clean_pair_means_no_contrastive_loss_and_no_gradient(logits: Tensor) -> None:
    logits.requires_grad_()
    value = weighted_contrastive_loss(logits, torch.zeros(SIZE, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(value, logits)
    assert value.item() == 0.0
    assert (gradient == 0).all()


def test_all_weights_are_held_constant(logits: Tensor, weights: Tensor) -> None:
    logits.requires_grad_()
    weights.requires_grad_()
    loss = weighted_contrastive_loss(logits, weights, image_weights=weights, text_weights=weights)
    _, weight_gradient = torch.autograd.grad(loss, (logits, weights), allow_unused=True)
    assert weight_gradient is None


def test_soft_targets_are_a_cross_entropy_both_ways(logits: Tensor) -> None:
    teacher = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = (cross_entropy(logits, teacher.softmax(1)) + cross_entropy(logits.T, teacher.T.softmax(1))) / 2
    torch.testing.assert_close(soft_target_loss(logits, teacher), expected)


def test_nothing_is_left_to_learn_where_the_teacher_is_matched(logits: Tensor) -> None:
    student = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(soft_target_loss(student, logits), student)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))


def test_a_masked_candidate_is_neither_target_nor_rival(logits: Tensor) -> None:
    """Two groups with nothing between them are as two batches, each weighted by its size."""
    groups = [torch.arange(3), torch.arange(3, SIZE)]
    masked = torch.full_like(logits, -torch.inf)
    for group in groups:
        masked[group[:, None], group] = logits[group[:, None], group]
    student = (2 * logits).requires_grad_()
    value = soft_target_loss(student, masked)
    parts = [soft_target_loss(student[g][:, g], logits[g][:, g]) * len(g) / SIZE for g in groups]
    torch.testing.assert_close(value, torch.stack(parts).sum())
    assert torch.autograd.grad(value, student)[0].isfinite().all()
