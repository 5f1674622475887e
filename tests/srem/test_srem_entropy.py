import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax
from scipy.stats import entropy as reference_entropy

from noisyclean.srem import normalised_entropy, swapped_cross_entropy, swapped_weights

sizes = st.integers(1, 12)
seeds = st.integers(0, 2**16)
scales = st.floats(0.0, 500.0)


def random_logits(size: int, seed: int, scale: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return (scale * torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(
        dtype
    )


def reference_swapped(image_logits: np.ndarray, text_logits: np.ndarray) -> list[float]:
    values = []
    for image_row, text_row in zip(image_logits, text_logits, strict=True):
        p, r = softmax(image_row), softmax(text_row)
        log_p, log_r = log_softmax(image_row), log_softmax(text_row)
        values.append(-sum(p[j] * log_r[j] + r[j] * log_p[j] for j in range(len(p)) if np.isfinite(image_row[j])) / 2)
    return values


@settings(deadline=None, max_examples=50)
@given(size=sizes, seed=seeds, scale=scales)
def test_normalised_entropy_is_within_its_bounds(size: int, seed: int, scale: float) -> None:
    for dim in (0, 1):
        values = normalised_entropy(random_logits(size, seed, scale, torch.float32), dim)
        assert ((values >= 0) & (values <= 1)).all()


def test_normalised_entropy_equals_the_reference() -> None:
    logits = random_logits(7, seed=0, scale=3.0)
    expected = [reference_entropy(softmax(column)) / math.log(7) for column in logits.T.numpy()]
    np.testing.assert_allclose(normalised_entropy(logits, dim=0), expected, rtol=1e-12)


@pytest.mark.parametrize(("size", "expected"), [(1, 0.0), (2, 1.0), (1000, 1.0)])
def test_uniform_predictions_have_entropy_one_unless_there_is_no_choice(size: int, expected: float) -> None:
    assert normalised_entropy(torch.full((3, size), 7.0), dim=1).tolist() == pytest.approx([expected] * 3, abs=1e-6)


def test_each_modality_is_weighted_by_the_certainty_of_the_other() -> None:
    # Image 0 is sure of text 0; no text is sure of anything: every column is the same on top of a constant.
    logits = torch.tensor([[50.0, 0.0, 0.0], [50.0, 0.0, 0.0], [50.0, 0.0, 0.0]])
    image_weights, text_weights = swapped_weights(logits)
    torch.testing.assert_close(image_weights, torch.zeros(3))
    torch.testing.assert_close(text_weights, torch.ones(3))


@settings(deadline=None, max_examples=50)
@given(size=sizes, seed=seeds, scale=scales)
def test_swapped_cross_entropy_equals_the_reference_and_obeys_gibbs(size: int, seed: int, scale: float) -> None:
    logits = random_logits(size, seed, scale)
    values = swapped_cross_entropy(logits, logits.T)
    np.testing.assert_allclose(values, reference_swapped(logits.numpy(), logits.T.numpy()), rtol=1e-9, atol=1e-12)
    mean_entropy = math.log(size) * (normalised_entropy(logits, 1) + normalised_entropy(logits, 0)) / 2
    assert (values >= mean_entropy - 1e-9 * (1 + mean_entropy)).all()


def test_equal_predictions_meet_the_gibbs_bound() -> None:
    logits = random_logits(6, seed=1, scale=2.0)
    torch.testing.assert_close(swapped_cross_entropy(logits, logits), math.log(6) * normalised_entropy(logits, 1))


def test_swapped_cross_entropy_is_symmetric_in_the_modalities() -> None:
    logits = random_logits(6, seed=2, scale=5.0)
    torch.testing.assert_close(swapped_cross_entropy(logits, logits.T), swapped_cross_entropy(logits.T, logits))


def test_swapped_entropies_follow_a_permutation_of_the_pairs() -> None:
    logits = random_logits(6, seed=3, scale=5.0)
    order = torch.randperm(6)
    permuted = logits[order][:, order]
    torch.testing.assert_close(
        swapped_cross_entropy(permuted, permuted.T), swapped_cross_entropy(logits, logits.T)[order]
    )
    for weights, expected in zip(swapped_weights(permuted), swapped_weights(logits), strict=True):
        torch.testing.assert_close(weights, expected[order])


def test_a_masked_candidate_contributes_neither_value_nor_gradient() -> None:
    image_logits, text_logits = torch.randn(2, 4, 5, dtype=torch.float64)
    mask = torch.full((4, 1), -torch.inf, dtype=torch.float64)
    masked = torch.cat([image_logits, mask], dim=1).requires_grad_()
    values = swapped_cross_entropy(masked, torch.cat([text_logits, mask], dim=1))
    torch.testing.assert_close(values, swapped_cross_entropy(image_logits, text_logits))
    (gradient,) = torch.autograd.grad(values.sum(), masked)
    assert gradient.isfinite().all()
    assert (gradient[:, -1] == 0).all()


def test_certain_predictions_that_disagree_have_a_finite_swapped_entropy() -> None:
    # softmax underflows to 0 here, and a naive p·log r to −inf.
    image_logits = torch.tensor([[1e4, 0.0]])
    text_logits = torch.tensor([[0.0, 1e4]])
    assert swapped_cross_entropy(image_logits, text_logits).item() == pytest.approx(1e4)
