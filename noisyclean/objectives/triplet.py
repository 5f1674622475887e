"""Triplet hinge losses: a pair shall be more similar than its negatives, by a margin."""

from __future__ import annotations

import torch
from torch import Tensor

from noisyclean.srem import weighted_mean


def triplet_loss(
    similarity: Tensor,
    weights: Tensor | None = None,
    *,
    margin: Tensor | float = 0.2,
    hardest: bool = True,
) -> Tensor:
    """VSE++'s hinge [margin + s_ij − s_ii]₊, on the hardest negative j of a pair or summed over all of them.

    *Theirs*: the hinge and its two forms, of Faghri et al. (2018), "VSE++: Improving Visual-Semantic Embeddings with
    Hard Negatives"; a margin per pair, of Huang et al. (2021), "Learning with Noisy Correspondence for Cross-modal
    Matching" (NCR), which sets margin_i = 0.2·(10^y_i − 1)/9 for a pair that matches to the degree y_i. *Ours*: a
    weighted mean over the pairs and the mean of the two directions, where theirs sum both.

    Args:
        similarity: float ``[B, B]``, cosines s.
        weights: float ``[B]``, ≥ 0, one a pair. Held constant: no gradient flows into them. A pair of weight 0 is still
            a negative of the others.
        margin: a number or float ``[B]``, ≥ 0. Held constant. That of pair i holds for image i and for text i.
        hardest: the hardest negative only; otherwise the sum over the B − 1 negatives.

    Returns:
        Scalar, ≥ 0, same dtype; 0 with a gradient of 0 when the weights sum to 0 and when B < 2.
    """
    return _top_hinges(similarity, weights, margin, 1 if hardest else len(similarity) - 1)


def dynamic_hinge_loss(
    similarity: Tensor,
    weights: Tensor | None = None,
    *,
    negatives: int,
    margin: Tensor | float = 0.2,
) -> Tensor:
    """DECL's dynamic hinge: the mean of the hinges of the ``negatives`` hardest negatives.

    *Theirs*, of Qin et al. (2022), "Deep Evidential Learning with Noisy Correspondence for Cross-modal Retrieval": the
    number of negatives falls from B to 5 in the course of training, as hard negatives amplify noise. Their similarity
    is tanh(s). They add 0.8 times the *sum* over the pairs held to be clean to the *mean* of
    :func:`noisyclean.objectives.evidential_loss` over all pairs; with the mean taken here, that is a factor of 0.8
    times the number of clean pairs. *Ours*: the normalisation, see :func:`triplet_loss`.

    Args:
        similarity: float ``[B, B]``.
        weights: see :func:`triplet_loss`.
        negatives: ≥ 1; at most B − 1 are there to be used.
        margin: see :func:`triplet_loss`.

    Returns:
        Scalar, ≥ 0, same dtype; 0 with a gradient of 0 when the weights sum to 0 and when B < 2.

    Raises:
        ValueError: ``negatives`` is below 1.
    """
    if negatives < 1:
        raise ValueError(f"at least one negative is needed: {negatives}")
    negatives = min(negatives, len(similarity) - 1)
    return _top_hinges(similarity, weights, margin, negatives) / max(negatives, 1)


def _top_hinges(similarity: Tensor, weights: Tensor | None, margin: Tensor | float, negatives: int) -> Tensor:
    if len(similarity) < 2:
        return similarity.sum() * 0.0  # a zero that can still be differentiated
    weights = similarity.new_ones(len(similarity)) if weights is None else weights
    shortfall = (margin.detach() if isinstance(margin, Tensor) else margin) - similarity.diagonal()
    own = torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    others = similarity.masked_fill(own, -torch.inf)
    image_loss, text_loss = (
        (scores.topk(negatives, dim=1).values + shortfall.unsqueeze(1)).relu().sum(dim=1)
        for scores in (others, others.T)
    )
    return weighted_mean((image_loss + text_loss) / 2, weights)
