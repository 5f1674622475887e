"""Two-component mixtures over the losses of pairs: what is learned easily is held to be clean."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal, TypeAlias, assert_never

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betaln, expit
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

Float64: TypeAlias = NDArray[np.float64]
Mixture: TypeAlias = Literal["gaussian", "beta"]

_BETA_ITERATIONS = 10
# A Beta density may be 0 or infinite at 0 and 1.
_BETA_EDGE = 1e-3
_BETA_LEAST_VARIANCE = 1e-6
_LEAST_RANGE = 1e-9
_LEAST_RESPONSIBILITY = 1e-12


def clean_posterior(losses: ArrayLike, kind: Mixture) -> Float64:
    """The posterior probability that a pair belongs to the component of the lower mean loss.

    *Theirs*, ``"gaussian"``: NCR (Huang et al. 2021, "Learning with Noisy Correspondence for Cross-modal Matching"), on
    losses scaled to [0, 1], with its settings of scikit-learn's mixture: at most 10 iterations, tolerance 0.01, 5e-4
    added to the variances. *Theirs*, ``"beta"``: Arazo et al. (2019), "Unsupervised Label Noise Modeling and Loss
    Correction": fitted by 10 rounds of EM with weighted moments, from Beta(1, 2) and Beta(2, 1), to the losses between
    the 5th and the 95th percentile, scaled to [0, 1].

    *Ours*: the posterior never rises with the loss. The component of the larger variance wins at both far ends,
    whichever it is, so that the posterior of the fit has a turning point outside the two means; beyond it, it is kept
    at its value there (Arazo et al. do so above the means). *Ours* too: neither the order of the losses nor a seed
    matters.

    Args:
        losses: (N,) finite, any scale.
        kind: the family of the components.

    Returns:
        (N,) float64 in [0, 1], non-increasing in the loss; all 1 where the losses are all the same, as then nothing
        speaks against any.

    Raises:
        ValueError: ``losses`` are not one-dimensional or not finite.
    """
    losses = np.asarray(losses, dtype=np.float64)
    if losses.ndim != 1 or not np.isfinite(losses).all():
        raise ValueError(f"losses must be one-dimensional and finite: shape {losses.shape}")
    half = losses / 2  # the difference of two finite numbers may not be finite, that of their halves is
    span = np.ptp(half) if len(half) else 0.0
    if span == 0.0:
        return np.ones(len(losses))
    scaled = np.asarray((half - half.min()) / span, dtype=np.float64)
    match kind:
        case "gaussian":
            log_odds = _gaussian_log_odds(np.sort(scaled))
        case "beta":
            log_odds = _beta_log_odds(np.sort(scaled))
        case _:
            assert_never(kind)
    ascending, position = np.unique(scaled, return_inverse=True)
    posterior = np.asarray(expit(log_odds(ascending)), dtype=np.float64)
    # Monotone already but for rounding.
    return np.minimum.accumulate(posterior)[position]


_LogOdds: TypeAlias = Callable[[Float64], Float64]


def _gaussian_log_odds(losses: Float64) -> _LogOdds:
    mixture = GaussianMixture(n_components=2, max_iter=10, tol=1e-2, reg_covar=5e-4, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 10 iterations are the published setting, met or not
        mixture.fit(losses[:, None])
    order = np.argsort(mixture.means_.ravel(), kind="stable")
    mean: Float64 = mixture.means_.ravel()[order]
    precision: Float64 = 1.0 / mixture.covariances_.ravel()[order]
    log_height = np.log(mixture.weights_[order]) + np.log(precision) / 2

    def log_odds(x: Float64) -> Float64:
        x = _up_to_turning_point(x, precision[0] * mean[0] - precision[1] * mean[1], precision[0] - precision[1])
        low, high = (log_height[k] - precision[k] * (x - mean[k]) ** 2 / 2 for k in (0, 1))
        return np.asarray(low - high, dtype=np.float64)

    return log_odds


def _beta_log_odds(losses: Float64) -> _LogOdds:
    low, high = (float(one) for one in np.percentile(losses, (5, 95)))
    kept = losses[(losses >= low) & (losses <= high)]
    if len(kept) < 2 or kept[-1] - kept[0] < _LEAST_RANGE:
        low, high, kept = 0.0, 1.0, losses

    def rescaled(x: Float64) -> Float64:
        return np.clip((x - low) / (high - low), _BETA_EDGE, 1.0 - _BETA_EDGE)

    x = rescaled(kept)
    a, b, weight = np.array([1.0, 2.0]), np.array([2.0, 1.0]), np.array([0.5, 0.5])
    for _ in range(_BETA_ITERATIONS):
        first = expit(_beta_difference(x, a, b, weight))
        # No component may die out, which would leave it without moments.
        share = np.stack([first, 1.0 - first]).clip(_LEAST_RESPONSIBILITY)
        mean = share @ x / share.sum(axis=1)
        variance = (share * (x - mean[:, None]) ** 2).sum(axis=1) / share.sum(axis=1)
        size = mean * (1.0 - mean) / variance.clip(_BETA_LEAST_VARIANCE) - 1.0
        a, b = mean * size, (1.0 - mean) * size
        weight = share.sum(axis=1) / share.sum()
    order = np.argsort(a / (a + b), kind="stable")
    a, b, weight = a[order], b[order], weight[order]

    def log_odds(x: Float64) -> Float64:
        x = _up_to_turning_point(rescaled(x), a[0] - a[1], a[0] + b[0] - a[1] - b[1])
        return _beta_difference(x, a, b, weight)

    return log_odds


def _beta_difference(x: Float64, a: Float64, b: Float64, weight: Float64) -> Float64:
    """The log odds of the first of two weighted Beta components."""
    # Not by scipy.stats, whose log densities of narrow components end at −inf.
    log_height = np.log(weight) - betaln(a, b)
    log_odds = log_height[0] - log_height[1] + (a[0] - a[1]) * np.log(x) + (b[0] - b[1]) * np.log1p(-x)
    return np.asarray(log_odds, dtype=np.float64)


def _up_to_turning_point(x: Float64, numerator: float, denominator: float) -> Float64:
    """x, but no further than where the log odds of the lower component turn, at numerator/denominator.

    ``denominator`` is how much more concentrated the lower component is (in precision or in a + b). If more, the odds
    have a maximum, at or below the lower mean, and fall towards smaller losses; if less, they have a minimum, at or
    above the higher mean, and rise towards larger ones. In both families they fall all the way from mean to mean.
    """
    if denominator == 0:
        return x
    # Within the data, or the quotient of two rounding errors could send x anywhere.
    turning_point = float(np.clip(numerator / denominator, x.min(), x.max()))
    return np.maximum(x, turning_point) if denominator > 0 else np.minimum(x, turning_point)
