"""DECL: similarities as evidence of a Dirichlet distribution, which knows how little it knows.

After Qin et al. (ACM MM 2022), "Deep Evidential Learning with Noisy Correspondence for Cross-modal Retrieval".
*Theirs*: evidence e = exp(tanh(s)/τ) and the Dirichlet α = e + 1 over the B candidates, the loss, the uncertainty and
which pairs they hold to be clean. Their full objective adds :func:`noisyclean.objectives.dynamic_hinge_loss` on
tanh(s).

*Ours*: s is a cosine, where theirs is the unbounded output of a similarity network. tanh(s) then ends at ±0.76, so that
the evidence of a perfect match is exp(0.76/τ), not exp(1/τ).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# From here on the asymptotic series is exact to 1e-11, and float32 begins to lose digits without it.
_LARGE = 32.0


def evidential_loss(
    similarity: Tensor,
    temperature: Tensor | float,
    labels: Tensor | None = None,
    *,
    kl_weight: float = 0.1,
) -> Tensor:
    """The Bayes risk of the squared error under Dir(α), plus a penalty on evidence for wrong candidates.

    Of image i, with S_i = Σ_j α_ij, π_ij = α_ij/S_i, and the target y_ij, which is ``labels[i]`` at j = i and else 0:
    Σ_j [(y_ij − π_ij)² + π_ij (1 − π_ij)/(S_i + 1)] + ``kl_weight`` · KL(Dir(1 + e_i (1 − y_i)) ‖ Dir(1)). Averaged
    over the images, and so for the texts.

    *Theirs*: all of it, with a weight of 0.1 and hard labels: a pair that they hold to be mismatched stays in the batch
    with a target of zeros. *Ours*: the mean of the two directions, where they sum; labels may be soft.

    Args:
        similarity: float ``[B, B]``, cosines s.
        temperature: their τ, 0.1 in their code, a number or a scalar tensor. At least 0.01 in float32: below, the
            evidence overflows.
        labels: float ``[B]`` in [0, 1], how well each pair is held to match; None: all 1, as in their warm-up. Held
            constant.
        kl_weight: ≥ 0.

    Returns:
        Scalar, same dtype.
    """
    evidence = _log_evidence(similarity, temperature).exp()
    labels = similarity.new_ones(len(similarity)) if labels is None else labels.detach().to(similarity.dtype)
    target = torch.diag(labels)
    return (_one_way(evidence, target, kl_weight) + _one_way(evidence.T, target, kl_weight)) / 2


def uncertainty(similarity: Tensor, temperature: Tensor | float) -> Tensor:
    """u = B/S, the share of the Dirichlet's strength that is not evidence: 1 is none, 0 is endless.

    *Theirs*: the sum over the two directions. *Ours*: their mean.

    Args:
        similarity: float ``[B, B]``, cosines s.
        temperature: see :func:`evidential_loss`.

    Returns:
        Float ``[B]`` in (0, 1], same dtype.
    """
    alpha = _log_evidence(similarity, temperature).exp() + 1.0
    return len(similarity) * (1.0 / alpha.sum(dim=1) + 1.0 / alpha.sum(dim=0)) / 2


def evidence_agreement(similarity: Tensor, temperature: Tensor | float) -> Tensor:
    """Which pairs DECL holds to match: those with i = argmax_j (e_ij + e_ji). *Theirs*.

    Args:
        similarity: float ``[B, B]``, cosines s. Which of exactly tied candidates is the best is left open.
        temperature: see :func:`evidential_loss`.

    Returns:
        Bool ``[B]``. In their training it becomes the ``labels`` of the next epoch.
    """
    log_evidence = _log_evidence(similarity, temperature)
    best = torch.logaddexp(log_evidence, log_evidence.T).argmax(dim=1)
    return best == torch.arange(len(similarity), device=similarity.device)


def _log_evidence(similarity: Tensor, temperature: Tensor | float) -> Tensor:
    return similarity.tanh() / temperature


def _one_way(evidence: Tensor, target: Tensor, kl_weight: float) -> Tensor:
    alpha = evidence + 1.0
    strength = alpha.sum(dim=1, keepdim=True)
    mean = alpha / strength
    # The variance as mean·(1 − mean)/(S + 1): α(S − α)/(S²(S + 1)) overflows float32 from S = 1e13.
    risk = ((target - mean).square() + mean * (1.0 - mean) / (strength + 1.0)).sum(dim=1)
    return (risk + kl_weight * _kl_to_uniform(evidence * (1.0 - target) + 1.0)).mean()


def _kl_to_uniform(alpha: Tensor) -> Tensor:
    """KL(Dir(α) ‖ Dir(1)) of each row, ``[B]``.

    The textbook form subtracts numbers of the size S·log S from each other. In float32 that costs its gradient a tenth
    of its length at τ = 0.05 and all of it at 0.02. In terms of h they cancel on paper, as Σ_j α_j = S.
    """
    size = alpha.shape[1]
    strength = alpha.sum(dim=1)
    return _h(alpha).sum(dim=1) - _h(strength) + (size - 1) * strength.digamma() - math.lgamma(size)


def _h(alpha: Tensor) -> Tensor:
    """h(α) = (α − 1)·digamma(α) − log Γ(α) − α for α ≥ 1; it falls only as −½ log α."""
    small, large = alpha.clamp(max=_LARGE), alpha.clamp(min=_LARGE)
    exact = (small - 1.0) * small.digamma() - small.lgamma() - small
    r = 1.0 / large  # Stirling's series
    tail = r * (1 / 3 + r * (1 / 12 + r * (1 / 90 + r * (-1 / 120 - r / 210))))
    series = tail - (large.log() + 1.0 + math.log(2 * math.pi)) / 2
    return torch.where(alpha < _LARGE, exact, series)
