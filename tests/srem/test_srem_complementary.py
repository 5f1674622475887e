import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp, softmax
from torch import Tensor

from noisyclean.srem import complementary_loss, transition_complementary_loss

Loss = Callable[..., Tensor]
both_losses = pytest.mark.parametrize("loss", [complementary_loss, transition_complementary_loss])


def random_logits(size: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels_of(row: np.ndarray, own: int, bias: float) -> np.ndarray:
    others = np.delete(row, own)
    return np.insert(softmax(bias * others), own, 0.0)


def log_one_minus_p(row: np.ndarray, j: int) -> float:
    return float(logsumexp(np.delete(row, j)) - logsumexp(row))


def rcl_log_loss(logits: np.ndarray) -> float:
    """−Σ_{j≠i} log(1 − p_ij), averaged over rows and directions."""
    size = len(logits)
    total = 0.0
    for z in (logits, logits.T):
        for i in range(size):
            total -= sum(log_one_minus_p(z[i], j) for j in range(size) if j != i)
    return total / (2 * size)


def reference_complementary(logits: np.ndarray, bias: float) -> float:
    size = len(logits)
    total = 0.0
    for z in (logits, logits.T):
        for i in range(size):
            q = labels_of(z[i], i, bias)
            total -= sum(q[j] * log_one_minus_p(z[i], j) for j in range(size) if j != i)
    return total / (2 * size)


def reference_transition(logits: np.ndarray, bias: float) -> float:
    size = len(logits)
    total = 0.0
    for z in (logits, logits.T):
        transition = np.stack(
            [(1 - 1e-6) * labels_of(z[k], k, bias) + 1e-6 * labels_of(z[k], k, 0.0) for k in range(size)]
        )
        for i in range(size):
            p = softmax(z[i])
            for j in range(size):
                if j != i:
                    total -= transition[i, j] * math.log(sum(transition[k, j] * p[k] for k in range(size)))
    return total / (2 * size)


@settings(deadline=None, max_examples=40)
@given(size=st.integers(2, 9), seed=st.integers(0, 2**16), bias=st.floats(-2.0, 2.0), scale=st.floats(0.0, 8.0))
def test_losses_equal_their_references(size: int, seed: int, bias: float, scale: float) -> None:
    logits = random_logits(size, seed, scale)
    assert complementary_loss(logits, bias).item() == pytest.approx(reference_complementary(logits.numpy(), bias))
    assert transition_complementary_loss(logits, bias).item() == pytest.approx(
        reference_transition(logits.numpy(), bias), rel=1e-9
    )


@pytest.mark.parametrize("size", [2, 3, 17])
def test_without_bias_both_are_the_rcl_log_loss_up_to_constants(size: int) -> None:
    logits = random_logits(size)
    rcl = rcl_log_loss(logits.numpy()) / (size - 1)
    assert complementary_loss(logits).item() == pytest.approx(rcl)
    assert transition_complementary_loss(logits).item() == pytest.approx(rcl + math.log(size - 1))


def test_without_bias_both_have_one_gradient() -> None:
    logits = random_logits(8).requires_grad_()
    torch.testing.assert_close(
        *(torch.autograd.grad(loss(logits), logits) for loss in (complementary_loss, transition_complementary_loss))
    )


@both_losses
@pytest.mark.parametrize("size", [2, 3, 6])
def test_gradients_equal_finite_differences(loss: Loss, size: int) -> None:
    assert torch.autograd.gradcheck(loss, random_logits(size).requires_grad_())


def test_the_bias_is_held_constant_in_the_gradient() -> None:
    logits, bias = random_logits(6).requires_grad_(), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    naive = torch.zeros((), dtype=torch.float64)
    for z in (logits, logits.T):
        q = torch.stack([torch.tensor(labels_of(z[i].detach().numpy(), i, 0.7)) for i in range(6)])
        naive = naive - (q * (1 - z.softmax(dim=1)).log()).sum() / (2 * 6)
    loss = complementary_loss(logits, bias)
    torch.testing.assert_close(torch.autograd.grad(loss, logits), torch.autograd.grad(naive, logits))
    assert torch.autograd.grad(complementary_loss(logits, bias), bias, allow_unused=True) == (None,)


@both_losses
def test_a_positive_bias_dwells_on_the_similar_negative(loss: Loss) -> None:
    # Image 0 mistakes text 1 for its own: the bias shall make that cost more.
    logits = 5 * torch.eye(6)
    logits[0, 1] = 8.0
    assert loss(logits, 0.5) > loss(logits, 0.0) > loss(logits, -0.5)


@both_losses
@pytest.mark.parametrize("bias", [0.0, 0.3])
def test_losses_ignore_the_order_of_pairs_and_modalities(loss: Loss, bias: float) -> None:
    logits = random_logits(7)
    order = torch.randperm(7)
    torch.testing.assert_close(loss(logits[order][:, order], bias), loss(logits, bias))
    torch.testing.assert_close(loss(logits.T, bias), loss(logits, bias))


@both_losses
@pytest.mark.parametrize("bias", [0.0, 0.1, 1.0, -1.0])
@pytest.mark.parametrize("temperature", [0.05, 0.01])
@pytest.mark.parametrize("case", ["all wrong", "all right", "one column", "random", "all equal"])
def test_extreme_logits_have_finite_losses_and_gradients(
    loss: Loss, bias: float, temperature: float, case: str
) -> None:
    size = 8
    match case:
        case "all wrong":
            signs = 2 * torch.eye(size).roll(1, dims=0) - 1
        case "all right":
            signs = 2 * torch.eye(size) - 1
        case "one column":
            signs = -torch.ones(size, size)
            signs[:, 0] = 1
        case "random":
            signs = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).sign()
        case _:
            signs = torch.ones(size, size)
    logits = (100 / temperature * signs).requires_grad_()
    value = loss(logits, bias)
    value.backward()
    assert value.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@both_losses
def test_a_certain_mistake_still_has_a_gradient(loss: Loss) -> None:
    # p = 1 to the last bit of float32: log(1 − p) taken naively is −inf, or clamped and without a gradient.
    logits = (100 * torch.eye(4).roll(1, dims=0)).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(logits), logits)
    assert (gradient[logits.detach() > 0] > 0.05).all()


@both_losses
def test_float32_is_as_good_as_float64(loss: Loss) -> None:
    logits = random_logits(32, scale=20.0)
    torch.testing.assert_close(
        loss(logits.float(), 0.1).double(), loss(logits.float().double(), 0.1), rtol=1e-6, atol=0
    )


@both_losses
def test_a_lone_pair_has_nothing_complementary(loss: Loss) -> None:
    logits = torch.tensor([[3.0]], requires_grad=True)
    value = loss(logits, 0.5)
    value.backward()
    assert value.item() == 0.0
    assert logits.grad is not None
    assert logits.grad.item() == 0.0
