import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import digamma, gammaln
from scipy.stats import dirichlet
from torch import Tensor

from noisyclean.objectives import evidence_agreement, evidential_loss, uncertainty


def random_similarity(size: int, seed: int = 0) -> Tensor:
    return 2 * torch.rand(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1


def random_labels(size: int, seed: int = 1) -> Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kl_to_uniform(alpha: np.ndarray) -> float:
    strength = alpha.sum()
    log_ratio = gammaln(strength) - gammaln(alpha).sum() - gammaln(len(alpha))
    return float(log_ratio + ((alpha - 1) * (digamma(alpha) - digamma(strength))).sum())


def reference(similarity: np.ndarray, temperature: float, labels: np.ndarray, kl_weight: float) -> float:
    size = len(similarity)
    total = 0.0
    for s in (similarity, similarity.T):
        for i in range(size):
            evidence = np.exp(np.tanh(s[i]) / temperature)
            target = labels[i] * np.eye(size)[i]
            belief = dirichlet(evidence + 1)
            total += ((target - belief.mean()) ** 2).sum() + belief.var().sum()
            total += kl_weight * kl_to_uniform(evidence * (1 - target) + 1)
    return total / (2 * size)


@settings(deadline=None, max_examples=40)
@given(
    size=st.integers(2, 9),
    seed=st.integers(0, 2**16),
    temperature=st.floats(0.08, 2.0),
    kl_weight=st.floats(0.0, 2.0),
)
def test_the_loss_equals_the_reference(size: int, seed: int, temperature: float, kl_weight: float) -> None:
    similarity, labels = random_similarity(size, seed), random_labels(size, seed)
    expected = reference(similarity.numpy(), temperature, labels.numpy(), kl_weight)
    value = evidential_loss(similarity, temperature, labels, kl_weight=kl_weight)
    assert value.item() == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("temperature", [1.0, 0.1, 0.05])
def test_gradients_equal_finite_differences(temperature: float) -> None:
    labels = random_labels(5)

    def loss(similarity: Tensor) -> Tensor:
        return evidential_loss(similarity, temperature, labels)

    assert torch.autograd.gradcheck(loss, random_similarity(5).requires_grad_(), rtol=1e-3)


def test_by_default_every_pair_is_held_to_match() -> None:
    similarity = random_similarity(5)
    torch.testing.assert_close(evidential_loss(similarity, 0.1), evidential_loss(similarity, 0.1, torch.ones(5)))


@pytest.mark.parametrize(("label", "direction"), [(1.0, 1), (0.0, -1)])
def test_evidence_for_its_own_text_is_wanted_only_of_a_matching_pair(label: float, direction: int) -> None:
    similarity = torch.zeros(4, 4, requires_grad=True)
    loss = evidential_loss(similarity, 0.1, torch.full((4,), label))
    (gradient,) = torch.autograd.grad(loss, similarity)
    assert (-direction * gradient.diagonal() > 0).all()
    assert (gradient[0, 1:] > 0).all()


def test_labels_are_held_constant_and_the_temperature_is_not() -> None:
    similarity, labels = random_similarity(4).requires_grad_(), random_labels(4).requires_grad_()
    temperature = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    loss = evidential_loss(similarity, temperature, labels)
    gradients = torch.autograd.grad(loss, (similarity, labels, temperature), allow_unused=True)
    assert gradients[1] is None
    assert gradients[2] is not None
    assert gradients[2] != 0


@pytest.mark.parametrize("temperature", [0.1, 0.05, 0.02, 0.01])
def test_float32_is_as_good_as_float64(temperature: float) -> None:
    similarity = random_similarity(32).float()
    single, double = similarity.clone().requires_grad_(), similarity.double().requires_grad_()
    losses = evidential_loss(single, temperature), evidential_loss(double, temperature)
    gradients = torch.autograd.grad(losses[0], single)[0], torch.autograd.grad(losses[1], double)[0]
    torch.testing.assert_close(losses[0].double(), losses[1], rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=1e-3, atol=1e-5 * gradients[1].max().item())


@pytest.mark.parametrize("temperature", [0.05, 0.01])
def test_extreme_similarities_have_finite_losses_and_gradients(temperature: float) -> None:
    for similarity in (2 * torch.eye(8) - 1, 1 - 2 * torch.eye(8), torch.ones(8, 8), -torch.ones(8, 8)):
        similarity.requires_grad_()
        value = evidential_loss(similarity, temperature, torch.tensor([0.0, 1.0]).repeat(4))
        (gradient,) = torch.autograd.grad(value, similarity)
        assert value.isfinite()
        assert gradient.isfinite().all()


def test_the_loss_ignores_the_order_of_pairs_and_modalities() -> None:
    similarity, labels, order = random_similarity(6), random_labels(6), torch.randperm(6)
    expected = evidential_loss(similarity, 0.1, labels)
    torch.testing.assert_close(evidential_loss(similarity.T, 0.1, labels), expected)
    torch.testing.assert_close(evidential_loss(similarity[order][:, order], 0.1, labels[order]), expected)


def test_uncertainty_equals_the_reference() -> None:
    similarity = random_similarity(6)
    alpha = np.exp(np.tanh(similarity.numpy()) / 0.1) + 1
    expected = (6 / alpha.sum(axis=1) + 6 / alpha.sum(axis=0)) / 2
    np.testing.assert_allclose(uncertainty(similarity, 0.1).numpy(), expected)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**16), temperature=st.floats(0.01, 10.0))
def test_uncertainty_is_a_share_and_never_rises_with_the_evidence(seed: int, temperature: float) -> None:
    similarity = random_similarity(5, seed)
    low, high = uncertainty(similarity, temperature), uncertainty(similarity - 0.1, temperature)
    assert (low > 0).all()
    assert (high <= 1).all()
    assert (low <= high).all()


def test_agreement_weighs_both_directions_together() -> None:
    # Image 0 prefers text 1, but text 0 prefers image 0 by more.
    similarity = torch.tensor([[0.55, 0.6, 0.0], [0.0, 0.1, 0.3], [0.0, 0.3, 0.2]])
    assert evidence_agreement(similarity, 0.1).tolist() == [True, False, False]


def test_agreement_holds_where_the_evidence_itself_overflows() -> None:
    assert evidence_agreement(torch.eye(3), 1e-3).all()
