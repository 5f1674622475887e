import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from noisyclean.objectives import rince_loss
from noisyclean.srem import weighted_contrastive_loss


def random_logits(size: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference(logits: Tensor, q: float, density: float) -> float:
    total = 0.0
    for z in (logits.tolist(), logits.T.tolist()):
        for i, row in enumerate(z):
            everything = density * sum(math.exp(one) for one in row)
            total += -math.exp(q * row[i]) / q + everything**q / q
    return total / (2 * len(logits))


@settings(deadline=None, max_examples=40)
@given(size=st.integers(1, 9), seed=st.integers(0, 2**16), q=st.floats(0.01, 1.0), density=st.floats(1e-3, 1.0))
def test_the_loss_equals_the_reference(size: int, seed: int, q: float, density: float) -> None:
    logits = random_logits(size, seed)
    expected = reference(logits, q, density)
    assert rince_loss(logits, q=q, density=density).item() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_a_vanishing_q_makes_it_infonce() -> None:
    logits = random_logits(6).requires_grad_()
    rince, infonce = rince_loss(logits, q=1e-7, density=0.01), weighted_contrastive_loss(logits)
    torch.testing.assert_close(rince - math.log(0.01), infonce, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(rince, logits)[0], torch.autograd.grad(infonce, logits)[0], rtol=1e-4, atol=1e-6
    )


def test_with_q_of_1_the_symmetric_form() -> None:
    logits = random_logits(5)
    exp = logits.exp()
    expected = (-exp.diagonal() + 0.1 * (exp.sum(dim=1) + exp.sum(dim=0)) / 2).mean()
    torch.testing.assert_close(rince_loss(logits, q=1.0, density=0.1), expected)


def test_gradients_equal_finite_differences() -> None:
    assert torch.autograd.gradcheck(rince_loss, random_logits(5, scale=1.0).requires_grad_())


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**16), q=st.floats(0.05, 1.0), shift=st.floats(-20.0, 20.0))
def test_a_shift_only_scales_the_loss_and_its_gradient(seed: int, q: float, shift: float) -> None:
    logits = random_logits(5, seed).requires_grad_()
    plain, shifted = rince_loss(logits, q=q), rince_loss(logits, q=q, shift=shift)
    gradient, shifted_gradient = torch.autograd.grad(plain, logits)[0], torch.autograd.grad(shifted, logits)[0]
    factor = math.exp(-q * shift)
    torch.testing.assert_close(shifted, factor * plain, rtol=1e-6, atol=1e-9 * (1 + factor))
    torch.testing.assert_close(shifted_gradient, factor * gradient, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(("q", "shift"), [(0.1, 0.0), (0.5, 0.0), (0.85, 0.0), (1.0, 100.0), (0.5, 100.0)])
def test_float32_holds_logits_of_100(q: float, shift: float) -> None:
    logits = random_logits(32, scale=40.0).clamp(-100, 100).float()
    single, double = logits.clone().requires_grad_(), logits.double().requires_grad_()
    losses = rince_loss(single, q=q, shift=shift), rince_loss(double, q=q, shift=shift)
    gradients = torch.autograd.grad(losses[0], single)[0], torch.autograd.grad(losses[1], double)[0]
    torch.testing.assert_close(losses[0].double(), losses[1], rtol=1e-4, atol=0)
    # No smaller: where a softmax underflows, so does the gradient.
    smallest = 1e-20 * gradients[1].abs().max().item()
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=1e-4, atol=smallest)
    for sign in (1, -1):
        extreme = (100.0 * sign * (2 * torch.eye(8) - 1)).requires_grad_()
        value = rince_loss(extreme, q=q, shift=shift)
        assert value.isfinite()
        assert torch.autograd.grad(value, extreme)[0].isfinite().all()


def test_a_pair_that_does_not_fit_pulls_less_than_one_that_does() -> None:
    logits = torch.diag(torch.tensor([4.0, 4.0, -4.0])).requires_grad_()
    gradient = torch.autograd.grad(rince_loss(logits), logits)[0].diagonal()
    assert gradient[2].abs() < 0.1 * gradient[0].abs()


def test_the_loss_ignores_the_order_of_pairs_and_modalities() -> None:
    logits, order = random_logits(6), torch.randperm(6)
    torch.testing.assert_close(rince_loss(logits.T), rince_loss(logits))
    torch.testing.assert_close(rince_loss(logits[order][:, order]), rince_loss(logits))


@pytest.mark.parametrize(("q", "density"), [(0.0, 0.1), (1.1, 0.1), (math.nan, 0.1), (0.5, 0.0), (0.5, math.nan)])
def test_settings_out_of_range_are_refused(q: float, density: float) -> None:
    with pytest.raises(ValueError, match="must be"):
        rince_loss(random_logits(3), q=q, density=density)
