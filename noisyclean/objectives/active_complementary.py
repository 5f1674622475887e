"""CRCL: learn a match as far as it is believed, and from every pair what it is not.

After Qin et al. (NeurIPS 2023), "Cross-modal Active Complementary Learning with Self-refining Correspondence". In their
training the labels start at 1 and stay so during a warm-up of two epochs, at whose end they become the model's own
probabilities; from then on each visit of a pair refines its label. The whole is repeated in stages of a few epochs
(6, 6, 6 and 25): each starts with a new model and the labels of the stage before.
"""

from __future__ import annotations

import torch
from torch import Tensor


def active_complementary_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    complementary_weight: float = 5.0,
    q: Tensor | float | None = None,
) -> Tensor:
    """−y_i log p_ii + λ Σ_{j≠i} tan(p_ij) / [Σ_j tan(p_ij)]^{q_i}, averaged over the pairs and over the two directions.

    *Theirs*: all of it; their code sets q_i = 1 − y_i, so that the less a pair is believed the more robust its
    complementary term, and λ = 5. *Ours*: the mean of the two directions, where they sum.

    Args:
        logits: float ``[B, B]``, see :func:`noisyclean.srem.pair_logits`. Their temperature is 0.05.
        labels: float ``[B]`` in [0, 1], how well each pair is held to match. Held constant. They weight the active term
            without being normalised: little belief means a small term.
        complementary_weight: λ ≥ 0.
        q: in [0, 1], a number or float ``[B]``, held constant; None: 1 − ``labels``.

    Returns:
        Scalar, ≥ 0, same dtype; 0 when B < 2.
    """
    labels = labels.detach()
    if q is None:
        q = 1.0 - labels
    elif isinstance(q, Tensor):
        q = q.detach()
    return (_one_way(logits, labels, complementary_weight, q) + _one_way(logits.T, labels, complementary_weight, q)) / 2


@torch.no_grad()
def refine_labels(previous: Tensor, logits: Tensor, momentum: float = 0.8, *, floor: float = 0.1) -> Tensor:
    """y_i ← β y_i + (1 − β) (p_ii + r_ii)/2, and 0 where that is below ``floor``.

    *Theirs*: all of it, with β = 0.8 and a floor of 0.1. The result is both the label of this step and the
    ``previous`` of the next.

    Args:
        previous: float ``[B]`` in [0, 1].
        logits: float ``[B, B]``, see :func:`noisyclean.srem.pair_logits`.
        momentum: β in [0, 1]; 0 takes the model's word, 1 keeps the labels that are not below the floor.
        floor: what is believed less is not believed at all; 0 turns this off.

    Returns:
        Float ``[B]`` in [0, 1], the dtype of ``logits``, without a gradient.

    Raises:
        ValueError: ``momentum`` is out of range.
    """
    if not 0.0 <= momentum <= 1.0:
        raise ValueError(f"the momentum must be in [0, 1]: {momentum}")
    believed = (logits.softmax(dim=1).diagonal() + logits.softmax(dim=0).diagonal()) / 2
    refined = momentum * previous.to(logits.dtype) + (1.0 - momentum) * believed
    return torch.where(refined < floor, 0.0, refined).clamp(0.0, 1.0)


def _one_way(logits: Tensor, labels: Tensor, complementary_weight: float, q: Tensor | float) -> Tensor:
    log_p = logits.log_softmax(dim=1)
    tangents = log_p.exp().tan()
    # p ≤ 1 is far from the pole at π/2, and tan(p) ≥ p makes the sum at least 1: neither term can overflow.
    wrong = (tangents - torch.diag(tangents.diagonal())).sum(dim=1)
    complementary = wrong / tangents.sum(dim=1) ** q
    return (complementary_weight * complementary - labels * log_p.diagonal()).mean()
