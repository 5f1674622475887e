from typing import get_args

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import beta
from sklearn.mixture import GaussianMixture

from noisyclean.objectives import Mixture, clean_posterior

both_kinds = pytest.mark.parametrize("kind", get_args(Mixture))
few_values = st.sampled_from([0.0, 0.0, 0.1, 0.5, 1.0, 7.0, -3.0, 1e-300, 5e-324, 1e300, -1.7e308, 1.7e308])
elements = st.one_of(few_values, st.floats(-5.0, 5.0))


def gaussian_losses(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """600 clean and 400 mismatched pairs, the latter spread more."""
    rng = np.random.default_rng(seed)
    losses = np.concatenate([rng.normal(1.0, 0.3, 600), rng.normal(4.0, 0.6, 400)])
    return losses, np.arange(1000) < 600


@both_kinds
@settings(deadline=None, max_examples=60)
@given(losses=arrays(np.float64, st.integers(0, 30), elements=elements))
@example(losses=np.repeat([0.0, 1.0], [15, 5]))
@example(losses=np.repeat([0.0, 1e-8, 1.0], [100, 20, 1]))
@example(losses=np.repeat([-1.7e308, 0.0, 1e300], [1, 1, 12]))
def test_it_is_a_probability_that_never_rises_with_the_loss(kind: Mixture, losses: np.ndarray) -> None:
    posterior = clean_posterior(losses, kind)
    assert posterior.dtype == np.float64
    assert posterior.shape == losses.shape
    assert ((posterior >= 0) & (posterior <= 1)).all()
    order = np.argsort(losses, kind="stable")
    assert (np.diff(posterior[order]) <= 0).all()


@both_kinds
@pytest.mark.parametrize("size", [0, 1, 2, 50])
def test_of_equal_losses_none_is_singled_out(kind: Mixture, size: int) -> None:
    np.testing.assert_array_equal(clean_posterior(np.full(size, 2.5), kind), np.ones(size))


@both_kinds
def test_of_two_losses_the_lower_is_the_cleaner(kind: Mixture) -> None:
    low, high = clean_posterior(np.array([1.0, 3.0]), kind)
    assert low > 0.9
    assert high < 0.1


@both_kinds
def test_separated_components_are_told_apart(kind: Mixture) -> None:
    losses, clean = gaussian_losses()
    posterior = clean_posterior(losses, kind)
    assert np.mean((posterior > 0.5) == clean) > 0.97
    assert posterior[losses > 6].max(initial=0.0) < 0.01
    assert posterior[losses < 0.5].min() > 0.99


def test_between_its_turning_points_it_is_scikit_learns_posterior() -> None:
    losses, _ = gaussian_losses()
    losses = np.sort(losses)
    scaled = ((losses - losses.min()) / np.ptp(losses))[:, None]
    mixture = GaussianMixture(2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=0).fit(scaled)
    expected = mixture.predict_proba(scaled)[:, mixture.means_.argmin()]
    between = (scaled[:, 0] >= mixture.means_.min()) & (scaled[:, 0] <= mixture.means_.max())
    np.testing.assert_allclose(clean_posterior(losses, "gaussian")[between], expected[between], atol=1e-9)


def test_a_clean_component_of_larger_variance_does_not_win_back_the_far_end() -> None:
    rng = np.random.default_rng(0)
    losses = np.concatenate([rng.normal(1.0, 1.0, 700), rng.normal(4.0, 0.1, 300), [7.0]])
    scaled = ((losses - losses.min()) / np.ptp(losses))[:, None]
    mixture = GaussianMixture(2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=0).fit(np.sort(scaled, axis=0))
    assert mixture.predict_proba(scaled)[-1, mixture.means_.argmin()] > 0.99
    assert clean_posterior(losses, "gaussian")[-1] < 0.1


def test_a_very_low_loss_is_as_clean_as_any() -> None:
    losses, _ = gaussian_losses()
    losses = np.append(losses, -4.0)
    assert clean_posterior(losses, "gaussian")[-1] > 0.99


def test_beta_is_the_published_algorithm_between_its_turning_points() -> None:
    losses, _ = gaussian_losses()
    low, high = np.percentile(losses, 5), np.percentile(losses, 95)
    scaled = ((losses - low) / (high - low)).clip(1e-3, 1 - 1e-3)
    fitted = scaled[(losses >= low) & (losses <= high)]
    components, weights = [beta(1, 2), beta(2, 1)], [0.5, 0.5]

    def shares(x: np.ndarray) -> list[np.ndarray]:
        joint = [weight * component.pdf(x) for weight, component in zip(weights, components, strict=True)]
        return [one / sum(joint) for one in joint]

    for _ in range(10):
        responsible = shares(fitted)
        for k, share in enumerate(responsible):
            mean = np.average(fitted, weights=share)
            variance = np.average((fitted - mean) ** 2, weights=share)
            a = mean * (mean * (1 - mean) / variance - 1)
            components[k] = beta(a, a * (1 - mean) / mean)
        weights = [share.mean() for share in responsible]
    between = (scaled >= components[0].mean()) & (scaled <= components[1].mean())
    assert between.mean() > 0.3
    np.testing.assert_allclose(clean_posterior(losses, "beta")[between], shares(scaled)[0][between], atol=1e-9)


def test_beta_components_are_told_apart_as_well_as_they_can_be() -> None:
    rng = np.random.default_rng(0)
    low, high = beta(2, 10), beta(8, 3)
    losses = np.concatenate([low.rvs(3000, random_state=rng), high.rvs(2000, random_state=rng)])
    best = 3 * low.pdf(losses) > 2 * high.pdf(losses)
    assert np.mean((clean_posterior(losses, "beta") > 0.5) == best) > 0.95


@both_kinds
def test_neither_order_nor_scale_matters(kind: Mixture) -> None:
    losses, _ = gaussian_losses()
    posterior = clean_posterior(losses, kind)
    order = np.random.default_rng(1).permutation(len(losses))
    np.testing.assert_array_equal(clean_posterior(losses[order], kind), posterior[order])
    np.testing.assert_allclose(clean_posterior(8 * losses + 16, kind), posterior, atol=1e-9)


@both_kinds
@pytest.mark.parametrize("losses", [np.zeros((2, 2)), np.array([0.0, np.nan]), np.array([0.0, np.inf])])
def test_what_is_no_list_of_numbers_is_refused(kind: Mixture, losses: np.ndarray) -> None:
    with pytest.raises(ValueError, match="one-dimensional and finite"):
        clean_posterior(losses, kind)
