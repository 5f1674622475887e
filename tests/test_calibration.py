"""Rates from scores: checked against brute force, scipy, and mixtures whose truth is known."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from helpers import simulate_scores
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import false_discovery_control, norm

from noisyclean.calibration import (
    Calibration,
    NoiseRate,
    close_noise,
    information,
    match_probability,
    noise_rate,
    noise_rate_of_tail,
    p_values,
    q_values,
)

few_values = st.integers(-8, 8).map(float)  # so that ties are common
probabilities = st.one_of(st.floats(1e-6, 1.0), st.sampled_from([0.01, 0.05, 0.5, 1.0]))
p_arrays = arrays(np.float64, st.integers(1, 60), elements=probabilities)
rates = st.floats(0.0, 1.0)


class TestPValues:
    @given(
        arrays(np.float64, st.integers(0, 20), elements=few_values),
        arrays(np.float32, st.integers(1, 20), elements=few_values),
    )
    def test_is_the_share_of_the_null_at_least_as_high(self, scores: np.ndarray, null: np.ndarray) -> None:
        expected = [(1 + sum(other >= score for other in null)) / (1 + len(null)) for score in scores]
        found = p_values(scores, np.sort(null))
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, expected, rtol=1e-15)

    def test_never_0(self) -> None:
        null = np.zeros(999, np.float32)
        np.testing.assert_allclose(p_values([1.0, 0.0, -1.0], null), [0.001, 1.0, 1.0])

    def test_a_score_ties_with_itself_in_the_null_whatever_its_precision(self) -> None:
        null = np.array([0.1, 0.2, 0.3], np.float32)
        np.testing.assert_allclose(p_values([0.1, 0.2, 0.3], null), [1.0, 0.75, 0.5])

    def test_empty_null(self) -> None:
        with pytest.raises(ValueError, match="empty"):
            p_values([0.0], [])

    def test_no_scores(self) -> None:
        assert p_values([], [0.0]).shape == (0,)

    def test_uniform_for_mismatches(self) -> None:
        _, _, p = simulate_scores(5000, noise=1.0, seed=1)
        for level in (0.01, 0.1, 0.5, 0.9):
            assert np.mean(p <= level) == pytest.approx(level, abs=4 * (2 * level * (1 - level) / 5000) ** 0.5)


class TestNoiseRate:
    @pytest.mark.parametrize("noise", [0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.95])
    def test_estimate_and_interval_on_mixtures(self, noise: float) -> None:
        """Pairs and null are drawn anew for each seed, so both sampling errors are in play."""
        pairs = null_pairs = 2000
        found, truth = [], []
        for seed in range(100):
            matched, _, p = simulate_scores(pairs, noise, seed, null_pairs=null_pairs)
            found.append(noise_rate(p, null_pairs=null_pairs))
            truth.append(np.mean(~matched))
        estimates = np.array([one.estimate for one in found])
        covered = [one.low <= true <= one.high for one, true in zip(found, truth, strict=True)]
        assert np.mean(covered) >= 0.9
        assert np.mean(estimates) == pytest.approx(noise, abs=0.01)
        # Each single estimate is within three of the standard errors that its interval claims (99.7 %, two-sided).
        errors = np.array([(one.high - one.low) / 2 / 1.96 for one in found])
        inside = (estimates < 1) & (np.abs(estimates - truth) <= 3 * errors)
        assert np.mean(inside | (estimates == 1)) >= 0.97

    def test_nothing_but_matches(self) -> None:
        _, _, p = simulate_scores(2000, noise=0.0, seed=0, separation=12)
        rate = noise_rate(p, null_pairs=2000)
        assert (rate.estimate, rate.low) == (0.0, 0.0)
        assert 0 < rate.high < 0.01

    def test_nothing_but_mismatches(self) -> None:
        _, _, p = simulate_scores(2000, noise=1.0, seed=0)
        rate = noise_rate(p, null_pairs=2000)
        assert rate.estimate == pytest.approx(1.0, abs=0.1)
        assert rate.high == 1.0

    @given(arrays(np.float64, st.integers(0, 50), elements=probabilities), st.integers(0, 10_000))
    def test_bounds(self, p: np.ndarray, null_pairs: int) -> None:
        rate = noise_rate(p, null_pairs=null_pairs)
        assert 0 <= rate.low <= rate.estimate <= rate.high <= 1

    def test_interval_narrows_with_pairs_and_with_the_null(self) -> None:
        p = np.linspace(0.001, 1, 1000)
        widths = [
            (rate.high - rate.low)
            for rate in (
                noise_rate(p * 0.9, null_pairs=100),
                noise_rate(p * 0.9, null_pairs=10_000),
                noise_rate(np.repeat(p, 100) * 0.9, null_pairs=10_000),
            )
        ]
        assert widths == sorted(widths, reverse=True)
        assert widths[0] > 2 * widths[1] > 2 * widths[2]

    def test_no_pairs_say_nothing(self) -> None:
        rate = noise_rate([], null_pairs=100)
        assert (rate.estimate, rate.low, rate.high) == (0.0, 0.0, 1.0)

    def test_is_an_upper_bound_for_a_weak_encoder(self) -> None:
        _, _, p = simulate_scores(20_000, noise=0.4, seed=3, separation=1.0)
        assert noise_rate(p, null_pairs=20_000).low > 0.4


class TestQValues:
    @given(p_arrays)
    def test_without_a_noise_rate_is_benjamini_hochberg(self, p: np.ndarray) -> None:
        np.testing.assert_allclose(q_values(p, 1.0), false_discovery_control(p), rtol=1e-12)

    @given(p_arrays, rates)
    def test_is_scaled_by_the_noise_rate(self, p: np.ndarray, noise: float) -> None:
        np.testing.assert_allclose(q_values(p, noise), noise * false_discovery_control(p), rtol=1e-12, atol=1e-300)

    @given(p_arrays, rates)
    def test_is_monotone_and_ties_stay_tied(self, p: np.ndarray, noise: float) -> None:
        q = q_values(p, noise)
        assert np.all((q >= 0) & (q <= 1))
        order = np.argsort(p)
        assert np.all(np.diff(q[order]) >= 0)
        assert np.all(np.diff(q[order])[np.diff(p[order]) == 0] == 0)

    @given(p_arrays, rates, st.randoms(use_true_random=False))
    def test_order_of_the_pairs_does_not_matter(self, p: np.ndarray, noise: float, random: Random) -> None:
        order = np.array(random.sample(range(len(p)), len(p)))
        np.testing.assert_array_equal(q_values(p[order], noise), q_values(p, noise)[order])

    def test_no_pairs(self) -> None:
        assert q_values([], 0.5).shape == (0,)

    @pytest.mark.parametrize("asked", [0.01, 0.05, 0.1])
    @pytest.mark.parametrize("noise", [0.1, 0.4, 0.7])
    def test_asked_rate_is_the_realised_rate(self, asked: float, noise: float) -> None:
        realised, recalls = [], []
        for seed in range(10):
            matched, _, p = simulate_scores(4000, noise, seed)
            kept = q_values(p, noise_rate(p, null_pairs=4000).estimate) <= asked
            realised.append(np.mean(~matched[kept]))
            recalls.append(np.mean(kept[matched]))
        assert np.mean(realised) <= asked + 0.01
        assert np.mean(realised) >= asked / 2  # nor is recall thrown away by being too careful
        assert np.mean(recalls) > 0.8


class TestMatchProbability:
    @given(p_arrays, rates)
    def test_bounds_and_monotone(self, p: np.ndarray, noise: float) -> None:
        probability = match_probability(p, noise)
        assert np.all((probability >= 0) & (probability <= 1))
        assert np.all(np.diff(probability[np.argsort(p)]) <= 0)

    @settings(max_examples=30)
    @given(p_arrays, rates, st.randoms(use_true_random=False))
    def test_order_of_the_pairs_does_not_matter(self, p: np.ndarray, noise: float, random: Random) -> None:
        order = np.array(random.sample(range(len(p)), len(p)))
        np.testing.assert_array_equal(match_probability(p[order], noise), match_probability(p, noise)[order])

    @pytest.mark.parametrize("noise", [0.2, 0.5, 0.8])
    def test_close_to_the_true_local_false_discovery_rate(self, noise: float) -> None:
        separation = 3.0
        _, score, p = simulate_scores(50_000, noise, seed=5, separation=separation, null_pairs=50_000)
        false, true = noise * norm.pdf(score), (1 - noise) * norm.pdf(score - separation)
        error = np.abs(match_probability(p, noise) - true / (false + true))
        assert error.mean() < 0.02
        assert np.quantile(error, 0.99) < 0.1

    def test_mean_over_a_set_is_its_share_of_matches(self) -> None:
        matched, _, p = simulate_scores(50_000, noise=0.4, seed=6, null_pairs=50_000)
        probability = match_probability(p, 0.4)
        for part in (probability > 0.9, probability < 0.1, (probability >= 0.1) & (probability <= 0.9)):
            assert probability[part].mean() == pytest.approx(matched[part].mean(), abs=0.03)

    def test_nothing_known_to_be_wrong(self) -> None:
        np.testing.assert_array_equal(match_probability([0.001, 0.3, 1.0], 0.0), 1.0)

    def test_no_pairs(self) -> None:
        assert match_probability([], 0.5).shape == (0,)


class TestCounts:
    """A table of the different p-values says what all the pairs say."""

    @given(st.lists(st.tuples(probabilities, st.integers(1, 5)), min_size=1, max_size=30), rates)
    def test_as_if_each_pair_were_there(self, table: list[tuple[float, int]], noise: float) -> None:
        p, counts = np.array([one for one, _ in table]), np.array([count for _, count in table])
        pairs = np.repeat(p, counts)
        first = np.cumsum(counts) - counts
        assert noise_rate(p, counts=counts, null_pairs=50) == noise_rate(pairs, null_pairs=50)
        np.testing.assert_allclose(q_values(p, noise, counts=counts), q_values(pairs, noise)[first], rtol=1e-12)
        np.testing.assert_allclose(
            match_probability(p, noise, counts=counts), match_probability(pairs, noise)[first], atol=1e-12
        )

    def test_what_is_looked_up_is_what_is_computed(self) -> None:
        _, _, p = simulate_scores(3000, 0.4, seed=0)
        pairs = p.astype(np.float32)
        noise = noise_rate(pairs, null_pairs=4000)
        found = Calibration.of(*np.unique(pairs, return_counts=True), noise)
        at = found.places(pairs)
        np.testing.assert_allclose(found.q_value[at], q_values(pairs, noise.estimate), rtol=1e-6)
        np.testing.assert_allclose(found.match_probability[at], match_probability(pairs, noise.estimate), atol=1e-6)
        assert found.pairs == 3000

    def test_the_worst_pairs_are_mismatches_whatever_else_says_of_the_rate(self) -> None:
        """The rate may be known to be lower than the p-values say; the pairs of the largest ones stay noisy."""
        _, _, p = simulate_scores(20_000, 0.4, seed=0)
        pairs = p.astype(np.float32)
        found = Calibration.of(*np.unique(pairs, return_counts=True), NoiseRate(0.3, 0.29, 0.31))
        assert found.match_probability[found.places(pairs[pairs > 0.9])].max() < 0.1


class TestCloseNoise:
    @pytest.mark.parametrize(("random_share", "close_share"), [(0.0, 0.0), (0.3, 0.0), (0.0, 0.3), (0.2, 0.2)])
    def test_mixtures(self, random_share: float, close_share: float) -> None:
        """True pairs score about 12, near misses 6, random pairs 0."""
        covered = []
        for seed in range(50):
            draw = np.random.default_rng(seed)
            kind = draw.random(4000)
            random, close = kind < random_share, kind > 1 - close_share
            score = draw.normal(size=4000) + np.where(random, 0, np.where(close, 6, 12))
            low_share = float(np.mean(score < 6))
            share = float(random.mean())
            rate = NoiseRate(share, share - 0.01, share + 0.01)
            found = close_noise(low_share, rate, random_low_share=1.0, pairs=4000)
            assert found.low <= found.estimate <= found.high
            covered.append(found.low <= close.mean() <= found.high)
            assert found.estimate == pytest.approx(close_share, abs=0.08)
        assert np.mean(covered) >= 0.9

    def test_no_more_than_is_left(self) -> None:
        rate = NoiseRate(0.4, 0.35, 0.45)
        assert close_noise(1.0, rate, 1.0, pairs=1000) == NoiseRate(0.6, 0.6, 0.6)
        assert close_noise(0.1, rate, 1.0, pairs=1000) == NoiseRate(0.0, 0.0, 0.0)


@given(st.integers(1, 1000), st.integers(0, 1000), st.integers(0, 1000))
def test_of_two_tails_the_smaller_one_is_the_smaller_rate(pairs: int, one: int, other: int) -> None:
    tails = [min(one, pairs), min(other, pairs)]
    rates = [noise_rate_of_tail(tail, pairs=pairs, null_pairs=50) for tail in tails]
    found = noise_rate_of_tail(min(tails), pairs=pairs, null_pairs=50)
    assert found.estimate == min(rate.estimate for rate in rates)
    if rates[0].estimate != rates[1].estimate:  # both may be cut to 1
        assert found == min(rates, key=lambda rate: rate.estimate)


def test_information_is_that_of_a_channel() -> None:
    """By the definition of mutual information, of a score with two values."""
    assert information(np.array([1.0, 1.0, 0.0, 0.0])) == pytest.approx(1.0)
    assert information(np.full(5, 0.3)) == pytest.approx(0.0)
    probability = np.array([0.9] * 30 + [0.2] * 70)
    joint = np.array([[0.3 * 0.9, 0.3 * 0.1], [0.7 * 0.2, 0.7 * 0.8]])
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    assert information(probability) == pytest.approx((joint * np.log2(joint / independent)).sum())
