import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from torch import Tensor
from torch.nn.functional import cross_entropy

from noisyclean.srem import (
    Complementary,
    EntropyWeighting,
    SremLoss,
    complementary_loss,
    srem_loss,
    swapped_weights,
    transition_complementary_loss,
    weighted_contrastive_loss,
)

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


@pytest.mark.parametrize("entropy_weighting", ["none", "swapped"])
@pytest.mark.parametrize("complementary", ["simple", "transition"])
def test_the_total_is_the_sum_of_its_terms(
    logits: Tensor, weights: Tensor, entropy_weighting: EntropyWeighting, complementary: Complementary
) -> None:
    loss = srem_loss(
        logits,
        weights,
        complementary_weight=0.2,
        similarity_bias=0.1,
        entropy_weighting=entropy_weighting,
        complementary=complementary,
    )
    image_weights, text_weights = swapped_weights(logits) if entropy_weighting == "swapped" else (None, None)
    contrastive = weighted_contrastive_loss(logits, weights, image_weights=image_weights, text_weights=text_weights)
    term = complementary_loss if complementary == "simple" else transition_complementary_loss
    summed = (SIZE - 1) * term(logits, 0.1)
    expected = SremLoss(contrastive + 0.2 * summed, contrastive, summed)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("entropy_weighting", ["none", "swapped"])
def test_the_loss_ignores_the_order_of_pairs_and_modalities(
    logits: Tensor, weights: Tensor, entropy_weighting: EntropyWeighting
) -> None:
    def loss(z: Tensor, w: Tensor) -> SremLoss:
        return srem_loss(z, w, complementary_weight=0.2, similarity_bias=0.1, entropy_weighting=entropy_weighting)

    order = torch.randperm(SIZE)
    torch.testing.assert_close(loss(logits[order][:, order], weights[order]), loss(logits, weights))
    torch.testing.assert_close(loss(logits.T, weights), loss(logits, weights))


@pytest.mark.parametrize("complementary", ["simple", "transition"])
def test_gradients_equal_finite_differences(logits: Tensor, weights: Tensor, complementary: Complementary) -> None:
    def total(z: Tensor) -> Tensor:
        return srem_loss(z, weights, complementary_weight=0.5, complementary=complementary).total

    assert torch.autograd.gradcheck(total, logits.requires_grad_())


def test_all_weights_are_held_constant(logits: Tensor, weights: Tensor) -> None:
    logits.requires_grad_()
    weights.requires_grad_()
    loss = srem_loss(logits, weights, complementary_weight=0.0, entropy_weighting="swapped").total
    gradient, weight_gradient = torch.autograd.grad(loss, (logits, weights), allow_unused=True)
    assert weight_gradient is None
    image_weights, text_weights = (w.detach() for w in swapped_weights(logits))
    frozen = weighted_contrastive_loss(logits, weights, image_weights=image_weights, text_weights=text_weights)
    torch.testing.assert_close(gradient, torch.autograd.grad(frozen, logits)[0])


@pytest.mark.parametrize("entropy_weighting", ["none", "swapped"])
@pytest.mark.parametrize("complementary", ["simple", "transition"])
@pytest.mark.parametrize("temperature", [0.05, 0.01])
def test_extreme_logits_have_finite_losses_and_gradients(
    entropy_weighting: EntropyWeighting, complementary: Complementary, temperature: float
) -> None:
    signs = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).sign()
    logits = (100 / temperature * signs).requires_grad_()
    loss = srem_loss(
        logits,
        torch.ones(8),
        complementary_weight=0.2,
        similarity_bias=0.1,
        entropy_weighting=entropy_weighting,
        complementary=complementary,
    )
    loss.total.backward()
    assert loss.total.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_a_lone_pair_can_be_trained_on() -> None:
    logits = torch.tensor([[20.0]], requires_grad=True)
    loss = srem_loss(logits, None, complementary_weight=0.2, entropy_weighting="swapped")
    loss.total.backward()
    assert [term.item() for term in loss] == [0.0, 0.0, 0.0]
