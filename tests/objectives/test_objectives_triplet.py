import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from noisyclean.objectives import dynamic_hinge_loss, triplet_loss

hardest_or_all = pytest.mark.parametrize("hardest", [True, False])


def random_similarity(size: int, seed: int = 0) -> Tensor:
    return 2 * torch.rand(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1


def random_vector(size: int, seed: int = 1) -> Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference(similarity: Tensor, weights: Tensor, margins: Tensor, negatives: int) -> float:
    """Both directions averaged, the hinges of the hardest negatives summed."""
    size = len(similarity)
    total = 0.0
    for s in (similarity.tolist(), similarity.T.tolist()):
        for i in range(size):
            hinges = sorted(max(0.0, margins[i].item() + s[i][j] - s[i][i]) for j in range(size) if j != i)
            total += weights[i].item() * sum(hinges[-negatives:])
    return total / (2 * weights.sum().item())


@settings(deadline=None, max_examples=40)
@given(size=st.integers(2, 9), seed=st.integers(0, 2**16), negatives=st.integers(1, 10), hardest=st.booleans())
def test_losses_equal_the_reference(size: int, seed: int, negatives: int, hardest: bool) -> None:
    similarity, weights, margins = random_similarity(size, seed), random_vector(size, seed), random_vector(size, seed)
    expected = reference(similarity, weights, margins, 1 if hardest else size - 1)
    assert triplet_loss(similarity, weights, margin=margins, hardest=hardest).item() == pytest.approx(expected)
    used = min(negatives, size - 1)
    expected = reference(similarity, weights, margins, used) / used
    dynamic = dynamic_hinge_loss(similarity, weights, negatives=negatives, margin=margins)
    assert dynamic.item() == pytest.approx(expected)


def test_the_dynamic_hinge_spans_the_two_forms() -> None:
    similarity = random_similarity(6)
    torch.testing.assert_close(dynamic_hinge_loss(similarity, negatives=1), triplet_loss(similarity))
    torch.testing.assert_close(
        5 * dynamic_hinge_loss(similarity, negatives=99), triplet_loss(similarity, hardest=False)
    )


@hardest_or_all
def test_equal_weights_and_margins_are_the_defaults(hardest: bool) -> None:
    similarity = random_similarity(6)
    torch.testing.assert_close(
        triplet_loss(similarity, torch.full((6,), 3.0), margin=torch.full((6,), 0.2).double(), hardest=hardest),
        triplet_loss(similarity, hardest=hardest),
    )


@hardest_or_all
def test_a_separated_batch_costs_nothing(hardest: bool) -> None:
    similarity = torch.eye(5).requires_grad_()
    value = triplet_loss(similarity, hardest=hardest)
    assert value.item() == 0.0
    assert (torch.autograd.grad(value, similarity)[0] == 0).all()
    assert triplet_loss(torch.eye(5), margin=1.5, hardest=hardest).item() == pytest.approx(0.5 * (1 if hardest else 4))


@hardest_or_all
def test_gradients_equal_finite_differences(hardest: bool) -> None:
    weights = random_vector(6)

    def loss(similarity: Tensor) -> Tensor:
        return triplet_loss(similarity, weights, hardest=hardest)

    assert torch.autograd.gradcheck(loss, random_similarity(6).requires_grad_())


def test_only_the_hardest_negative_is_pushed_away() -> None:
    similarity = torch.tensor([[0.5, 0.6, 0.7], [0.0, 0.9, 0.0], [0.0, 0.0, 0.9]], requires_grad=True)
    (gradient,) = torch.autograd.grad(triplet_loss(similarity), similarity)
    assert gradient[0, 2] > 0
    assert gradient[0, 1] == 0
    (gradient,) = torch.autograd.grad(triplet_loss(similarity, hardest=False), similarity)
    assert gradient[0, 1] > 0


@hardest_or_all
def test_weights_and_margins_are_held_constant(hardest: bool) -> None:
    similarity, weights, margins = (
        tensor.requires_grad_() for tensor in (random_similarity(5), random_vector(5), random_vector(5, 2))
    )
    value = triplet_loss(similarity, weights, margin=margins, hardest=hardest)
    gradients = torch.autograd.grad(value, (similarity, weights, margins), allow_unused=True)
    assert gradients[0] is not None
    assert gradients[1:] == (None, None)


@pytest.mark.parametrize(("size", "weight"), [(5, 0.0), (1, 1.0)])
@hardest_or_all
def test_nothing_to_learn_from_is_zero_with_a_zero_gradient(size: int, weight: float, hardest: bool) -> None:
    similarity = random_similarity(size).requires_grad_()
    weights = torch.full((size,), weight, dtype=torch.float64)
    for value in (
        triplet_loss(similarity, weights, hardest=hardest),
        dynamic_hinge_loss(similarity, weights, negatives=3),
    ):
        (gradient,) = torch.autograd.grad(value, similarity)
        assert value.item() == 0.0
        assert (gradient == 0).all()


@hardest_or_all
def test_the_loss_ignores_the_order_of_pairs_and_modalities(hardest: bool) -> None:
    similarity, weights, order = random_similarity(7), random_vector(7), torch.randperm(7)
    expected = triplet_loss(similarity, weights, hardest=hardest)
    torch.testing.assert_close(triplet_loss(similarity.T, weights, hardest=hardest), expected)
    shuffled = triplet_loss(similarity[order][:, order], weights[order], hardest=hardest)
    torch.testing.assert_close(shuffled, expected)


def test_no_negatives_at_all_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one negative"):
        dynamic_hinge_loss(random_similarity(3), negatives=0)
