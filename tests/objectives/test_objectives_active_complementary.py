import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from noisyclean.objectives import active_complementary_loss, refine_labels
from noisyclean.srem import weighted_contrastive_loss


def random_logits(size: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_labels(size: int, seed: int = 1) -> Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference(logits: Tensor, labels: Tensor, weight: float, q: list[float]) -> float:
    size = len(logits)
    total = 0.0
    for z in (logits, logits.T):
        for i in range(size):
            p = z[i].softmax(dim=0).tolist()
            tangents = [math.tan(one) for one in p]
            total += -labels[i].item() * math.log(p[i])
            total += weight * sum(t for j, t in enumerate(tangents) if j != i) / sum(tangents) ** q[i]
    return total / (2 * size)


@settings(deadline=None, max_examples=40)
@given(size=st.integers(1, 9), seed=st.integers(0, 2**16), weight=st.floats(0.0, 10.0), q=st.floats(0.0, 1.0))
def test_the_loss_equals_the_reference(size: int, seed: int, weight: float, q: float) -> None:
    logits, labels = random_logits(size, seed), random_labels(size, seed)
    value = active_complementary_loss(logits, labels, complementary_weight=weight)
    assert value.item() == pytest.approx(reference(logits, labels, weight, (1 - labels).tolist()), abs=1e-12)
    value = active_complementary_loss(logits, labels, complementary_weight=weight, q=q)
    assert value.item() == pytest.approx(reference(logits, labels, weight, [q] * size), abs=1e-12)


def test_with_every_pair_believed_and_nothing_complementary_it_is_infonce() -> None:
    logits = random_logits(6)
    value = active_complementary_loss(logits, torch.ones(6).double(), complementary_weight=0.0)
    torch.testing.assert_close(value, weighted_contrastive_loss(logits))


def test_a_pair_that_is_not_believed_keeps_a_bounded_loss() -> None:
    # Σ_{j≠i} tan(p_ij) is below Σ_j tan(p_ij), so that with q = 1 no pair costs more than λ.
    logits = random_logits(8, scale=500.0)
    assert active_complementary_loss(logits, torch.zeros(8).double()) <= 5.0


def test_gradients_equal_finite_differences() -> None:
    labels = random_labels(5)

    def loss(logits: Tensor) -> Tensor:
        return active_complementary_loss(logits, labels)

    assert torch.autograd.gradcheck(loss, random_logits(5).requires_grad_())


def test_labels_and_q_are_held_constant() -> None:
    logits, labels, q = (
        tensor.requires_grad_() for tensor in (random_logits(5), random_labels(5), random_labels(5, 2))
    )
    for value in (active_complementary_loss(logits, labels), active_complementary_loss(logits, labels, q=q)):
        gradients = torch.autograd.grad(value, (logits, labels, q), allow_unused=True)
        assert gradients[0] is not None
        assert gradients[1:] == (None, None)


@pytest.mark.parametrize("temperature", [0.05, 0.01])
def test_extreme_logits_have_finite_losses_and_gradients(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for signs in (2 * torch.eye(8) - 1, 1 - 2 * torch.eye(8), torch.randn(8, 8, generator=generator).sign()):
        logits = (signs / temperature).requires_grad_()
        value = active_complementary_loss(logits, torch.linspace(0, 1, 8))
        (gradient,) = torch.autograd.grad(value, logits)
        assert value.isfinite()
        assert gradient.isfinite().all()


def test_a_lone_pair_costs_nothing() -> None:
    logits = torch.tensor([[3.0]], requires_grad=True)
    value = active_complementary_loss(logits, torch.ones(1))
    assert value.item() == 0.0
    assert torch.autograd.grad(value, logits)[0].item() == 0.0


def test_the_loss_ignores_the_order_of_pairs_and_modalities() -> None:
    logits, labels, order = random_logits(6), random_labels(6), torch.randperm(6)
    expected = active_complementary_loss(logits, labels)
    torch.testing.assert_close(active_complementary_loss(logits.T, labels), expected)
    torch.testing.assert_close(active_complementary_loss(logits[order][:, order], labels[order]), expected)


@settings(deadline=None, max_examples=40)
@given(
    size=st.integers(1, 9), seed=st.integers(0, 2**16), momentum=st.floats(0.0, 1.0), floor=st.sampled_from([0.0, 0.1])
)
def test_refined_labels_equal_the_reference(size: int, seed: int, momentum: float, floor: float) -> None:
    logits, previous = random_logits(size, seed), random_labels(size, seed)
    refined = refine_labels(previous, logits, momentum, floor=floor)
    for i in range(size):
        believed = (logits[i].softmax(dim=0)[i] + logits[:, i].softmax(dim=0)[i]).item() / 2
        expected = momentum * previous[i].item() + (1 - momentum) * believed
        assert refined[i].item() == pytest.approx(expected if expected >= floor else 0.0, abs=1e-12)
    assert ((refined >= 0) & (refined <= 1)).all()


def test_refined_labels_carry_no_gradient() -> None:
    assert not refine_labels(torch.ones(4), random_logits(4).requires_grad_()).requires_grad


def test_labels_settle_on_what_the_model_believes() -> None:
    logits, labels = random_logits(6), torch.ones(6)
    for _ in range(200):
        labels = refine_labels(labels, logits)
    believed = refine_labels(labels, logits, 0.0)
    torch.testing.assert_close(labels[believed > 0], believed[believed > 0])


@pytest.mark.parametrize("momentum", [-0.1, 1.1, math.nan])
def test_a_momentum_out_of_range_is_refused(momentum: float) -> None:
    with pytest.raises(ValueError, match="momentum"):
        refine_labels(torch.ones(3), random_logits(3), momentum)
