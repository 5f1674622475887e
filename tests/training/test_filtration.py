"""How a judge's probabilities become weights: selective, yet never on a handful of pairs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from noisyclean.training.filtration import LEAST_PROBABILITY, more_telling, selective_weights

probabilities = arrays(np.float64, st.integers(1, 300), elements=st.floats(0, 1))
exponents = st.floats(1, 6)
shares = st.floats(0, 0.9)


def trained_share(weight: NDArray[np.float64]) -> float:
    return float(weight.sum() ** 2 / (weight**2).sum() / len(weight))


@given(probabilities, exponents, shares)
def test_enough_pairs_are_trained_on(probability: NDArray[np.float64], selectivity: float, share: float) -> None:
    weight = selective_weights(probability, selectivity, share)
    assert ((weight >= 0) & (weight <= 1)).all()
    assert trained_share(weight) >= share - 1e-6


@given(probabilities, exponents, shares)
def test_the_surer_pair_weighs_no_less(probability: NDArray[np.float64], selectivity: float, share: float) -> None:
    weight = selective_weights(np.sort(probability), selectivity, share)
    assert (np.diff(weight) >= 0).all()


@given(probabilities, exponents, shares)
def test_the_exponent_is_lowered_no_further_than_needed(
    probability: NDArray[np.float64], selectivity: float, share: float
) -> None:
    asked = np.maximum(probability, LEAST_PROBABILITY) ** selectivity
    weight = selective_weights(probability, selectivity, share)
    if trained_share(asked) >= share:
        np.testing.assert_allclose(weight, asked)
    else:
        assert trained_share(weight) == pytest.approx(share, abs=1e-6)


def test_a_sure_judge_is_taken_at_its_word() -> None:
    probability = np.array([0.99] * 5 + [0.01] * 5)
    np.testing.assert_allclose(selective_weights(probability, 3.0, 0.3), probability**3)


def test_a_judge_that_knows_nothing_leaves_the_warm_up_as_it_was() -> None:
    np.testing.assert_array_equal(np.unique(selective_weights(np.zeros(50), 3.0, 0.3)), LEAST_PROBABILITY**3)


def test_a_few_sure_pairs_among_many_do_not_take_all_of_the_training() -> None:
    probability = np.array([0.9] * 2 + [0.1] * 98)
    cubed, weight = probability**3, selective_weights(probability, 3.0, 0.3)
    assert cubed[:2].sum() / cubed.sum() > 0.9
    assert weight[:2].sum() / weight.sum() < 0.3


@pytest.mark.parametrize("rate", [0.0, 0.02, 0.05, 0.2, 0.4, 0.8])
def test_the_better_opinion_tells_more(rate: float) -> None:
    """The worse one takes three true pairs in ten for mismatches, and is sure of all."""
    random = np.random.default_rng(0)
    clean = random.random(20_000) >= rate
    sure = np.where(clean, random.random(20_000) ** 8, random.random(20_000))
    unseen = np.where(clean & (random.random(20_000) < 0.7), random.random(20_000) ** 30, random.random(20_000))
    assert more_telling([sure, unseen], null_pairs=5_000) == 0
    assert more_telling([unseen, sure], null_pairs=5_000) == 1
