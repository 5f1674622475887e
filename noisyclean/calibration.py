"""The statistics that turn match scores into rates: null distribution, noise rate, p- and q-values, match probability.

Pure functions of arrays. All of it is *ours* (not of the SREM paper) and put together from standard parts:

* **null**: match scores of pairs known to be mismatched, made by pairing bank images with other pairs' captions;
* **p-value** of a pair: the share of null scores at least as high, (1 + #{null ≥ s}) / (1 + n) (Phipson & Smyth 2010);
* **noise rate** π₀: Storey's estimator (Storey 2002), the share of p-values above λ over 1 − λ. It is an upper bound,
  since a true pair that looks random is counted; of two, by two statistics of the pairs, the smaller is the better;
* **q-value**: Benjamini–Hochberg scaled by π₀ (Storey 2003): the mismatch rate of all pairs at least as good;
* **match probability**: 1 − local false discovery rate, π₀ / f(p), with f the Grenander estimator, that is the
  isotonic (non-increasing) density of the p-values.

Everything that is said of a pair is a function of its p-value and of how often each p-value occurs. A null of n scores
allows n + 1 p-values, so a corpus of any size comes down to a table of bounded size: :class:`Calibration`.

What is controlled: mismatches that score like random pairings. A caption that is nearly right scores above the null
and is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64: TypeAlias = NDArray[np.float64]

STOREY_LAMBDA = 0.5
"""p-values above this are taken to be of mismatched pairs only."""


@dataclass(frozen=True)
class NoiseRate:
    """π₀, the share of mismatched pairs, with a 95 % interval; all in [0, 1]."""

    estimate: float
    low: float
    high: float


def p_values(scores: ArrayLike, null: ArrayLike) -> Float64:
    """The chance that a random pairing scores at least as high.

    Args:
        scores: (N,) match scores.
        null: (n,) match scores of known mismatches, sorted in ascending order; n ≥ 1.

    Returns:
        (N,) float64 in (0, 1], never 0: nothing is rarer than the null can tell.
    """
    null = np.asarray(null)
    if null.size == 0:
        raise ValueError("the null distribution is empty")
    # Compared in the null's precision, so that a score that is in the null ties with itself.
    at_least = null.size - np.searchsorted(null, np.asarray(scores, dtype=null.dtype), side="left")
    return np.asarray((1.0 + at_least) / (1.0 + null.size), dtype=np.float64)


def noise_rate(p: ArrayLike, *, null_pairs: int, counts: ArrayLike | None = None) -> NoiseRate:
    """Storey's estimate of the share of mismatched pairs.

    Args:
        p: (N,) p-values.
        null_pairs: independent pairs behind the null (the bank's size): its sampling error widens the interval.
        counts: (N,) how many pairs have each p-value; None: one each.

    Returns:
        The estimate with a normal-approximation 95 % interval. Of an encoder that cannot tell some true pairs from
        random ones the estimate is an upper bound. Without pairs it is (0, 0, 1).
    """
    p = np.asarray(p, dtype=np.float64)
    counts = np.ones(p.size) if counts is None else np.asarray(counts, dtype=np.float64)
    return noise_rate_of_tail(float(counts[p > STOREY_LAMBDA].sum()), pairs=int(counts.sum()), null_pairs=null_pairs)


def noise_rate_of_tail(tail_pairs: float, *, pairs: int, null_pairs: int) -> NoiseRate:
    """The same, where ``tail_pairs`` of ``pairs`` pairs have a p-value above ``STOREY_LAMBDA``.

    As that is a half, these are the pairs below the median of the null.
    """
    if pairs == 0:
        return NoiseRate(0.0, 0.0, 1.0)
    tail = 1.0 - STOREY_LAMBDA
    share = tail_pairs / pairs
    estimate = share / tail
    of_pairs = share * (1.0 - share) / pairs / tail**2
    of_null = estimate**2 * STOREY_LAMBDA / (tail * max(null_pairs, 1))
    # With no p-value in the tail the normal approximation claims certainty; the rule of three does not.
    half = max(1.96 * (of_pairs + of_null) ** 0.5, 3.0 / pairs)
    return NoiseRate(min(estimate, 1.0), min(max(estimate - half, 0.0), 1.0), min(estimate + half, 1.0))


def close_noise(low_share: float, random: NoiseRate, random_low_share: float, *, pairs: int) -> NoiseRate:
    """An estimate of the share of pairs that are mismatched, but close: like near misses (ours, after Storey).

    Half of the near misses score under their median, and so do nearly all random mismatches, the share of which is
    known. What is left of the pairs down there is taken for half of the close mismatches. True pairs down there are
    counted too, so it is rather high; but where most pairs are close mismatches, so are those that the near misses are
    made of, and it is low.

    Args:
        low_share: share of the pairs that score lower than the near misses' median.
        random: share of the pairs that are random mismatches.
        random_low_share: share of random mismatches that score lower than that median.
        pairs: how many there are.

    Returns:
        It, from 0 to 1 − π₀, with a 95 % interval for its sampling error.
    """
    of_pairs = 1.96 * (low_share * (1 - low_share) / max(pairs, 1)) ** 0.5
    of_random = random_low_share * (random.high - random.low) / 2
    half = (of_pairs**2 + of_random**2) ** 0.5 / STOREY_LAMBDA
    share = (low_share - random.estimate * random_low_share) / STOREY_LAMBDA
    most = 1 - random.estimate
    return NoiseRate(*(min(max(one, 0.0), most) for one in (share, share - half, share + half)))


def q_values(p: ArrayLike, noise: float, *, counts: ArrayLike | None = None) -> Float64:
    """The expected share of mismatches among all pairs whose p-value is at most this pair's.

    Args:
        p: (N,) p-values.
        noise: π₀ in [0, 1].
        counts: (N,) how many pairs have each p-value; None: one each.

    Returns:
        (N,) float64 in [0, 1], non-decreasing in p; equal p-values have equal q-values.
    """
    p = np.asarray(p, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    ordered = p[order]
    up_to = np.arange(1, p.size + 1) if counts is None else np.cumsum(np.asarray(counts)[order])
    accepted = up_to[np.searchsorted(ordered, ordered, side="right") - 1]  # ties are accepted together
    q = np.empty_like(p)
    total = up_to[-1] if p.size else 0
    q[order] = np.minimum.accumulate((noise * total * ordered / accepted)[::-1])[::-1]
    return np.asarray(np.clip(q, 0.0, 1.0))


def match_probability(p: ArrayLike, noise: float, *, counts: ArrayLike | None = None) -> Float64:
    """1 − local false discovery rate: the probability that this pair is no random mismatch.

    Args:
        p: (N,) p-values.
        noise: π₀ in [0, 1].
        counts: (N,) how many pairs have each p-value; None: one each.

    Returns:
        (N,) float64 in [0, 1], non-increasing in p.
    """
    from sklearn.isotonic import IsotonicRegression

    p = np.asarray(p, dtype=np.float64)
    if p.size == 0:
        return np.zeros(0)
    # Fine bins near 0, where the density is steep, and even ones elsewhere: thousands of times fewer than pairs.
    edges = np.unique(np.concatenate([[0.0], np.geomspace(1e-6, 1.0, 400), np.linspace(0.0, 1.0, 401)]))
    edges[-1] = 1.0
    widths = np.diff(edges)
    bins = np.minimum(np.searchsorted(edges, p, side="left") - 1, widths.size - 1)
    weights = np.ones(p.size) if counts is None else np.asarray(counts, dtype=np.float64)
    density = np.bincount(bins, weights, minlength=widths.size) / weights.sum() / widths
    smooth = IsotonicRegression(increasing=False).fit_transform(edges[1:], density, sample_weight=widths)
    mismatch = np.divide(noise, smooth, out=np.ones_like(smooth), where=smooth > 0)
    probability: Float64 = 1.0 - np.clip(mismatch, 0.0, 1.0)[bins]
    return probability


def information(probability: Float64) -> float:
    """Bits that match probabilities tell of a pair, on average.

    The mutual information of "clean or not" and the score, H(mean probability) − mean H(probability), H the entropy of
    a yes or no. No label is needed, as far as the probabilities are calibrated.

    Args:
        probability: (N,) in [0, 1], N ≥ 1.
    """
    from scipy.special import entr

    each = (entr(probability) + entr(1 - probability)).mean()
    mean = probability.mean()
    return float((entr(mean) + entr(1 - mean) - each) / np.log(2))


@dataclass(frozen=True)
class Calibration:
    """What a corpus says of each p-value that occurs in it.

    Attributes:
        noise: π₀.
        p: (D,) float32, the different p-values, ascending.
        counts: (D,) int64, how many pairs have each.
        q_value, match_probability: (D,) float32, of a pair with that p-value. In the precision they are written in, so
            that the rule can be checked (and redrawn) from the manifest.
    """

    noise: NoiseRate
    p: NDArray[np.float32]
    counts: NDArray[np.int64]
    q_value: NDArray[np.float32]
    match_probability: NDArray[np.float32]

    @classmethod
    def of(cls, p: NDArray[np.float32], counts: NDArray[np.int64], noise: NoiseRate) -> Calibration:
        """Of (D,) different p-values, ascending, and how many pairs have each."""
        q = q_values(p, noise.estimate, counts=counts).astype(np.float32)
        # A pair that looks like the worst ones is a mismatch for certain: the local rate is relative to the density of
        # the p-values there, also where ``noise`` is an estimate by something else than p-values, and lower.
        by_p = noise_rate(p, counts=counts, null_pairs=1).estimate
        probability = match_probability(p, max(noise.estimate, by_p), counts=counts).astype(np.float32)
        return cls(noise, p, counts, q, probability)

    @property
    def pairs(self) -> int:
        """How many pairs there are."""
        return int(self.counts.sum())

    def places(self, p: NDArray[np.float32]) -> NDArray[np.int64]:
        """(N,) p-values of the corpus → (N,) where they are in the table."""
        return np.searchsorted(self.p, p)
